"""Every collective this package issues, counted, and explained when ranks fail to meet.

Before a collective each rank writes its progress to the process group's key-value store. If the collective
fails or times out, the ranks that were reached read those notes and name the ones that lag behind or do not answer.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DcftError, PassingError, WorldError

Op = Literal["sum", "max", "min"]


_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Count:
    """Collectives issued and payload bytes sent by this rank."""

    calls: int = 0
    num_bytes: int = 0


ANSWER_S = 5.0  # how long a rank that met a failure waits for the others to report theirs


_total = Count()


_progress = 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def counted() -> Iterator[Count]:
    """Counts the collectives issued inside the block."""
    before = Count(_total.calls, _total.num_bytes)
    count = Count()
    yield count
    count.calls = _total.calls - before.calls
    count.num_bytes = _total.num_bytes - before.num_bytes


def _store() -> Any:
    from ..compat.pytorch import default_store  # late: the engines import this module

    return default_store()


def arrive(what: str) -> None:
    """Notes in the store how far this rank got, for the error message of the ranks that wait for it."""
    global _progress
    _progress += 1
    if world_size() > 1:
        _store().set(f"dcft_dist/progress/{rank()}", f"{_progress} {socket.gethostname()} {what}")


def missing_ranks() -> str:
    """Names the ranks whose last note is behind this one's, or that do not answer; for after a collective failed."""
    try:
        store = _store()
        others = [r for r in range(world_size()) if r != rank()]
        notes = {r: _note(store, r) for r in others}
        lines = [
            f"rank {r}{host} has not arrived (its last report: {what})"
            for r, (n, host, what) in notes.items()
            if n < _progress
        ]
        return "; ".join(lines) or _silent_ranks(store, {r: host for r, (_, host, _) in notes.items()})
    except Exception:
        host = os.environ.get("MASTER_ADDR", "its host")
        return f"the store is out of reach: {host}, where it lives (usually with rank 0), has died or is cut off"


def _note(store: Any, r: int) -> tuple[int, str, str]:
    key = f"dcft_dist/progress/{r}"
    if not store.check([key]):
        return 0, "", "nothing yet"
    number, host, what = store.get(key).decode().split(" ", 2)
    return int(number), f" on {host}", what


def _silent_ranks(store: Any, hosts: dict[int, str]) -> str:
    """Every rank came to the same place: those that live report the failure as well, within moments."""
    store.set(f"dcft_dist/failed/{rank()}", "")
    end, silent = time.monotonic() + ANSWER_S, list(hosts)
    while silent and time.monotonic() < end:
        silent = [r for r in silent if not store.check([f"dcft_dist/failed/{r}"])]
        time.sleep(0.05)
    lines = [f"rank {r}{hosts[r]} does not answer" for r in silent]
    return "; ".join(lines) or "every rank arrived and answers, so the network failed between some of them"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns a failed or timed-out collective inside the block into a WorldError that names the missing ranks."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if world_size() == 1 or not _is_communication(error):
            raise
        first = str(error).strip().splitlines()[0][:200]
        raise WorldError(f"rank {rank()}: {what} failed: {missing_ranks()} [{first}]") from error


def _is_communication(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "timed out", "connection", "peer", "store")
    )


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor on a device that the process group can reduce: NCCL alone takes no CPU tensors."""
    if f"{tensor.device.type}:" in str(dist.get_backend_config()):
        return tensor
    return tensor.to(torch.device("cuda", torch.cuda.current_device()) if tensor.device.type == "cpu" else "cpu")


def _count(payload: Tensor) -> None:
    _total.calls += 1
    _total.num_bytes += payload.numel() * payload.element_size()


def all_reduce(tensor: Tensor, op: Op = "sum", *, what: str) -> Tensor:
    """Reduces `tensor` over all ranks; returns the result on the tensor's own device (one rank: unchanged)."""
    _count(tensor)
    if world_size() == 1:
        return tensor
    arrive(what)
    moved = _reachable(tensor)
    references = sys.getrefcount(moved)
    with explained(what):
        dist.all_reduce(moved, op=_OPS[op])
    # gloo's worker thread drops the tensor a moment later and needs the interpreter for it. If that is shutting down by
    # then, the process aborts ("terminate called without an active exception", torch 2.13) and a done job counts as failed.
    end = time.monotonic() + 1.0
    while sys.getrefcount(moved) > references and time.monotonic() < end:
        time.sleep(0)
    return moved.to(tensor.device)


def reduce_numbers(values: Sequence[Any], op: Op = "sum", *, what: str) -> list[float]:
    """Sums (maxima, minima) over the ranks of float64 numbers; a tensor with one element counts as its value."""
    from ..compat.pytorch import number, real_tensors  # late: the engines import this module

    with real_tensors():
        table = torch.tensor([number(value) for value in values], dtype=torch.float64)
        return all_reduce(table, op, what=what).tolist()


def all_gather_ints(values: list[int], *, what: str) -> list[list[int]]:
    """The same number of integers from every rank, in rank order."""
    if dist.is_initialized() and dist.get_backend() == "fake":  # `dcft plan`: the others would do as this one does
        return [list(values)] * world_size()
    from ..compat.pytorch import real_tensors  # late: the engines import this module

    with real_tensors():
        table = torch.zeros(world_size(), len(values), dtype=torch.int64)
        table[rank()] = torch.tensor(values, dtype=torch.int64)
        return all_reduce(table, what=what).tolist()


def all_gather_equal(mine: Tensor, *, what: str) -> Tensor:
    """The flat tensors of all ranks, of equal length, one after the other, on the tensors' own device."""
    everyone = mine.new_empty(world_size() * len(mine))
    _count(everyone)
    if world_size() == 1:
        return mine
    arrive(what)
    near = _reachable(everyone)
    with explained(what):
        dist.all_gather_into_tensor(near, _reachable(mine))
    return near.to(mine.device)


def all_gather_uneven(mine: Tensor, sizes: list[int], *, what: str) -> Tensor:
    """The flat integer tensors of all ranks, one after the other; `sizes[r]` is the length of rank r's."""
    table = torch.zeros(sum(sizes), dtype=mine.dtype)
    table[sum(sizes[: rank()]) :][: sizes[rank()]] = mine
    return all_reduce(table, what=what)


def on_every_rank(flag: bool) -> bool:
    """Whether it is so on every rank: ranks may see a shared file system at different moments."""
    return all(value for (value,) in all_gather_ints([int(flag)], what="files of an earlier attempt"))


def broadcast_text(text: str, source: int, *, what: str) -> str:
    """The text that rank `source` gives, on every rank."""
    if world_size() == 1:
        return text
    data = text.encode() if rank() == source else b""
    length = max(n for (n,) in all_gather_ints([len(data)], what=what))
    buffer = torch.zeros(length, dtype=torch.int32)
    if rank() == source:
        buffer[: len(data)] = torch.tensor(list(data), dtype=torch.int32)
    return bytes(all_reduce(buffer, what=what).tolist()).decode()


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Runs a block without collectives on every rank; an error on one rank becomes an error on all of them.

    The failing rank raises its own error (a PassingError in place of an OSError), the others one that names the rank: a
    PassingError if running again may help.
    """
    error: Exception | None = None
    try:
        yield
    except OSError as caught:
        error = PassingError(f"{what}: {caught}")
    except Exception as caught:
        error = caught
    if world_size() > 1:
        outcome = 0 if error is None else 2 if isinstance(error, DcftError) and error.exit_code == 2 else 1
        outcomes = [found for (found,) in all_gather_ints([outcome], what=what)]
        if any(outcomes):
            worst = outcomes.index(max(outcomes))
            message = broadcast_text(str(error) if error else "", worst, what=what)
            if error is None:
                raise (DcftError if outcomes[worst] == 2 else PassingError)(f"rank {worst}: {message}")
    if error is not None:
        raise error
