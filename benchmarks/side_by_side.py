"""Helpers for the benchmarks: starting ranks, median times, peak memory, and printing results."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

REPEATS = 5


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser with `--json` that prints the script's docstring as help."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON line for each case instead of a table")
    return arguments


def machine() -> str:
    """Date, GPU if any, processor, number of cores, versions of torch and Python."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    hardware = f"{gpu}{names[0] if names else cpu} ({len(names)} cores)"
    return f"{datetime.date.today()}, {hardware}, torch {torch.__version__}, Python {platform.python_version()}"


def show(rows: list[dict[str, Any]], as_json: bool, repeats: int = REPEATS) -> None:
    """Prints the results.

    Args:
        rows: one for each case, from column name to value.
        as_json: print JSON lines, each with the machine, instead of a Markdown table with the machine below it.
        repeats: how many measurements the numbers are medians of, for the line below the table.
    """
    if as_json:
        for row in rows:
            print(json.dumps({**row, "machine": machine()}))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_text(row.get(key, '')) for key in columns)} |")
    print(f"\n{machine()}{f'; medians of {repeats}' if repeats > 1 else ''}.\n", flush=True)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall time in seconds of a call that all ranks make together, after one call to warm up."""
    call()
    return statistics.median(once(call) for _ in range(repeats))


def once(call: Callable[[], Any]) -> float:
    """Wall time in seconds of one call, from when all ranks are ready until the last rank has finished."""
    _meet()
    begin = time.perf_counter()
    call()
    _meet()
    return time.perf_counter() - begin


def _meet() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and by how many bytes the resident memory of this process rose during it, at most (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back to the system, so that the call cannot reuse it unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = call()
    return result, _status("VmHWM") - before


def gpu_peak_bytes(call: Callable[[], Any]) -> tuple[Any, int]:
    """The call's result, and by how many bytes the memory allocated on the GPU rose during it, at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `body(*args)` on several gloo ranks with one thread each.

    Returns:
        What each rank returned, in the order of the ranks. The values must be ones that `torch.load` reads as weights only.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_rank, (ranks, port, folder, body, args), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: str, body: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(minutes=10))
    result = body(*args)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(result, Path(folder) / f"{rank}.pt")
