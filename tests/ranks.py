"""Runs a test body on several gloo ranks: real processes, a FileStore, a deadline, and every rank's traceback on failure."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEVICE = os.environ.get("DCFT_TEST_DEVICE", "cpu")
os.environ.setdefault("DS_ACCELERATOR", DEVICE)  # before the fork server starts: it imports DeepSpeed once for all
context: Any = multiprocessing.get_context("spawn" if DEVICE == "cuda" else "forkserver")  # CUDA does not outlive a fork
# The fork server imports once what all ranks need. DeepSpeed's Muon alone takes seconds: it compiles a function, for which
# torch imports its compiler. `tests.freeze` comes last.
PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.tensorboard", "deepspeed"]
PRELOAD += ["deepspeed.runtime.zero.muon.muon_optimizer", "transformers", "transformers.models.bert.modeling_bert"]
PRELOAD += ["matplotlib.pyplot", "torchmetrics.functional", "dcft_dist.train.run", "tests.prepared", "tests.freeze"]
if DEVICE == "cpu":
    context.set_forkserver_preload(PRELOAD)


def run_ranks(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    deadline_s: float = 120,
    timeout_s: float = 60,
    breaks: bool = False,
) -> list[Any]:
    """Calls `body(*args)` on every rank and returns the results in rank order.

    `breaks`: the body breaks the process group on purpose, so the ranks end without meeting again.

    Raises:
        AssertionError: with the tracebacks of all ranks that failed, or the ranks that were late.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(there, rank, world_size, folder, timeout_s, body, args, breaks),
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, processes, folder, deadline_s)
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], folder: str, deadline_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = datetime.datetime.now() + datetime.timedelta(seconds=deadline_s)
    while len(results) + len(failures) < len(pipes):
        open_pipes = [p for r, p in enumerate(pipes) if r not in results and r not in failures]
        left_s = (end - datetime.datetime.now()).total_seconds()
        # After a first failure the others get a little time: they may only have lost their peer.
        ready = wait(open_pipes, timeout=min(left_s, 10) if failures else left_s)
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                processes[rank].join(5)
                ok, value = False, f"died with exit code {processes[rank].exitcode}\n{_fault_file(folder, rank).read_text()}"
            (results if ok else failures)[rank] = value
    if len(results) < len(pipes):
        late = [r for r in range(len(pipes)) if r not in results and r not in failures]
        texts = [f"rank {r}:\n{text}" for r, text in sorted(failures.items())]
        raise AssertionError("\n".join(texts + ([f"ranks {late} did not finish in {deadline_s} s"] if late else [])))
    return [results[r] for r in range(len(pipes))]


def _fault_file(folder: str, rank: int) -> Path:
    """Where a rank that dies of a signal leaves its traceback."""
    return Path(folder) / f"fault_{rank}"


def _rank_main(
    pipe: Connection,
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    body: Callable[..., Any],
    args: Any,
    breaks: bool,
) -> None:
    fault_file = open(_fault_file(folder, rank), "w")  # noqa: SIM115 (it must outlive all else)
    faulthandler.enable(fault_file)
    try:
        torch.set_num_threads(1)
        # As torchrun would: DeepSpeed and Accelerate look at these even where the process group is there already.
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": "0" if DEVICE == "cuda" else str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),  # without it DeepSpeed counts devices by a process of its own, sixty times a wrap
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if DEVICE == "cuda" and world_size == 1 else "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        result = body(*args)
        if not breaks:
            dist.barrier()
            dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))  # plain pickle: no memory shared with a rank that ends
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    if breaks:
        os._exit(0)
