"""All collectives of this package. They are counted, and their errors name the ranks that are missing (`progress`).

`what` always says what the collective is for, such as "sum of losses". It appears in the rank's note and in the error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat.pytorch import number, real_tensors
from ..errors import DcftError, TemporaryError, WorldError
from .progress import arrive, missing_ranks

Op = Literal["sum", "max", "min"]


_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class Count:
    """What this rank sent.

    Attributes:
        calls: number of collectives.
        num_bytes: payload of these collectives in bytes.
    """

    calls: int = 0
    num_bytes: int = 0


_total = Count()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def counted() -> Iterator[Count]:
    """Counts the collectives inside the block. The yielded `Count` is filled when the block ends."""
    before = Count(_total.calls, _total.num_bytes)
    count = Count()
    yield count
    count.calls = _total.calls - before.calls
    count.num_bytes = _total.num_bytes - before.num_bytes


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Explains a collective that fails or times out inside the block.

    Raises:
        WorldError: a collective between several ranks failed; the message names the missing ranks. Also if another error of
            this package arose while things were put in order after it.
    """
    try:
        yield
    except (dist.DistError, RuntimeError, DcftError) as error:
        if world_size() == 1 or isinstance(error, TemporaryError) or (lost := _lost_contact(error)) is None:
            raise
        first_line = str(lost).strip().splitlines()[0][:200]
        raise WorldError(f"rank {rank()}: {what} failed: {missing_ranks()} [{first_line}]") from error


def _lost_contact(error: BaseException | None) -> BaseException | None:
    """The error of the communication that this one is, or that it arose after; None if there is none."""
    while error is not None:
        if isinstance(error, dist.DistError | RuntimeError) and is_communication(error):
            return error
        error = None if error.__suppress_context__ else error.__context__
    return None


def is_communication(error: Exception) -> bool:
    """Whether an error comes from the communication between ranks."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "timed out", "connection", "peer", "store")
    )


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, moved if necessary to a device that the process group can use: NCCL takes no CPU tensors."""
    if f"{tensor.device.type}:" in str(dist.get_backend_config()):
        return tensor
    return tensor.to(torch.device("cuda", torch.cuda.current_device()) if tensor.device.type == "cpu" else "cpu")


def _count(payload: Tensor) -> None:
    _total.calls += 1
    _total.num_bytes += payload.numel() * payload.element_size()


def all_reduce(tensor: Tensor, op: Op = "sum", *, what: str, group: dist.ProcessGroup | None = None) -> Tensor:
    """Reduces a tensor over all ranks. Collective.

    Args:
        tensor: of the same shape on every rank. It may be overwritten.
        op: `sum`, `max` or `min`.
        what: what the collective is for, for error messages.
        group: process group of all ranks, for a thread beside the training; None: the default one.

    Returns:
        The result on the tensor's own device; with one rank, `tensor` itself.

    Raises:
        WorldError: the ranks did not meet.
    """
    _count(tensor)
    if world_size() == 1:
        return tensor
    if group is None:
        arrive(what)
    moved = tensor if group else _reachable(tensor)
    references = sys.getrefcount(moved)
    with explained(what):
        dist.all_reduce(moved, op=_OPS[op], group=group)
    # gloo's worker thread releases the tensor a moment later, and needs the Python interpreter for it. If the interpreter is
    # shutting down by then, the process aborts ("terminate called without an active exception", torch 2.13). A finished job
    # would then count as failed. So wait here.
    deadline = time.monotonic() + 1.0
    while sys.getrefcount(moved) > references and time.monotonic() < deadline:
        time.sleep(0)
    return moved.to(tensor.device)


def all_reduce_begun(tensor: Tensor, *, what: str) -> tuple[Tensor, Any]:
    """Begins to sum a tensor over all ranks. Collective.

    Returns:
        The sum, to be read after `wait()` of the second value; that is None if there is nothing to wait for.
    """
    _count(tensor)
    if world_size() == 1:
        return tensor, None
    moved = _reachable(tensor)
    with explained(what):
        return moved, dist.all_reduce(moved, async_op=True)


def reduce_numbers(values: Sequence[Any], op: Op = "sum", *, what: str) -> list[float]:
    """Reduces a list of numbers over all ranks, in float64. Collective.

    Args:
        values: numbers or one-element tensors, as many on every rank.
        op: `sum`, `max` or `min`.
        what: what the collective is for, for error messages.
    """
    with real_tensors():
        table = torch.tensor([number(value) for value in values], dtype=torch.float64)
        return all_reduce(table, op, what=what).tolist()


def all_gather_ints(values: list[int], *, what: str, group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """Gathers integers from every rank. Collective.

    Args:
        values: this rank's integers, as many on every rank.
        what: what the collective is for, for error messages.
        group: as for `all_reduce`.

    Returns:
        One list per rank, in rank order.
    """
    if dist.is_initialized() and dist.get_backend() == "fake":  # `dcft plan`: assume that all ranks have equal values
        return [list(values)] * world_size()
    with real_tensors():
        table = torch.zeros(world_size(), len(values), dtype=torch.int64)
        table[rank()] = torch.tensor(values, dtype=torch.int64)
        return all_reduce(table, what=what, group=group).tolist()


def all_gather_equal(mine: Tensor, *, what: str) -> Tensor:
    """Gathers flat tensors of equal length from all ranks. Collective.

    Args:
        mine: this rank's tensor, of shape `(n,)` on every rank.
        what: what the collective is for, for error messages.

    Returns:
        Tensor of shape `(ranks * n,)` in rank order, on the device of `mine`.
    """
    gathered = mine.new_empty(world_size() * len(mine))
    _count(gathered)
    if world_size() == 1:
        return mine
    arrive(what)
    moved = _reachable(gathered)
    with explained(what):
        dist.all_gather_into_tensor(moved, _reachable(mine))
    return moved.to(mine.device)


def all_gather_begun(mine: Tensor, *, what: str) -> tuple[Tensor, Any] | None:
    """Begins `all_gather_equal`. Collective.

    Returns:
        The gathered tensor, to be read after `wait()` of the second value. None if there is nothing to gather, or if the
        process group cannot send from the device of `mine`.
    """
    if world_size() == 1 or _reachable(mine) is not mine:
        return None
    gathered = mine.new_empty(world_size() * mine.numel())
    _count(gathered)
    with explained(what):
        return gathered, dist.all_gather_into_tensor(gathered, mine, async_op=True)


def all_gather_uneven(mine: Tensor, sizes: list[int], *, what: str) -> Tensor:
    """Gathers flat integer tensors of different lengths from all ranks. Collective.

    Args:
        mine: this rank's tensor, of shape `(sizes[rank()],)`.
        sizes: length of every rank's tensor, in rank order.
        what: what the collective is for, for error messages.

    Returns:
        Tensor of shape `(sum(sizes),)` in rank order.
    """
    table = torch.zeros(sum(sizes), dtype=mine.dtype)
    table[sum(sizes[: rank()]) :][: sizes[rank()]] = mine
    return all_reduce(table, what=what)


def on_every_rank(flag: bool) -> bool:
    """Whether `flag` is True on every rank: a new file may be visible on some ranks only. Collective."""
    return all(value for (value,) in all_gather_ints([int(flag)], what="files of an earlier attempt"))


def broadcast_text(text: str, source: int, *, what: str, group: dist.ProcessGroup | None = None) -> str:
    """Sends the text of rank `source` to every rank; the text of other ranks is ignored. Collective."""
    if world_size() == 1:
        return text
    data = text.encode() if rank() == source else b""
    length = max(n for (n,) in all_gather_ints([len(data)], what=what, group=group))
    buffer = torch.zeros(length, dtype=torch.int32)
    if rank() == source:
        buffer[: len(data)] = torch.tensor(list(data), dtype=torch.int32)
    return bytes(all_reduce(buffer, what=what, group=group).tolist()).decode()


@contextmanager
def agreed(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Makes an error on one rank an error on all ranks. Every rank must enter the block. Its end is collective.

    The block itself must not contain collectives.

    Args:
        what: what the block does, such as "write the masks", for error messages.
        group: as for `all_reduce`.

    Raises:
        TemporaryError: this rank had an OSError, or another rank had an error after which running again may help.
        DcftError: another rank had an error after which running again cannot help.
        Exception: this rank had any other error, which is raised unchanged. Errors of other ranks name the rank.
    """
    error: Exception | None = None
    try:
        yield
    except OSError as caught:
        error = TemporaryError(f"{what}: {caught}")
    except Exception as caught:
        error = caught
    if world_size() > 1:
        # 0: no error; 1: running again may help; 2: it cannot
        outcome = 0 if error is None else 2 if isinstance(error, DcftError) and error.exit_code == 2 else 1
        outcomes = [code for (code,) in all_gather_ints([outcome], what=what, group=group)]
        if any(outcomes):
            worst = outcomes.index(max(outcomes))
            message = broadcast_text(str(error) if error else "", worst, what=what, group=group)
            if error is None:
                raise (DcftError if outcomes[worst] == 2 else TemporaryError)(f"rank {worst}: {message}")
    if error is not None:
        raise error
