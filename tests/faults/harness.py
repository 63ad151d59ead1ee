"""Faults on purpose, in runs of real ranks: what is cut off, damaged or full, and what the next start makes of it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..processes import Process, finish
from ..train.test_run import start, wait_for_phase

# `tests/run.sh --faults` runs the full product; otherwise each pair of what may come together occurs once.
ALL = os.environ.get("DCFT_FAULTS") == "all"

PHASES = ("setup", "warm_up", "score", "select", "removal_check", "train", "validate", "checkpoint", "test")
DAMAGES = ("cut", "flipped", "emptied", "swapped")
SAME = ("weights_checksum", "test", "validation", "best_epoch", "num_selected")  # keys that a fault may not change

_NEWNS, _PRIVATE = 0x20000, 1 << 18 | 1 << 14  # a mount namespace for this process; mounts in it stay in it


def same_result(found: dict[str, Any], undisturbed: dict[str, Any]) -> bool:
    """Whether two runs ended with the same bits."""
    return all(found[key] == undisturbed[key] for key in SAME)


def strike(
    config: Path, runs: Path, phase: str, action: str, rank: int, *words: str
) -> tuple[float, list[tuple[int, str]]] | None:
    """Starts two ranks, and does something to one of them at a random moment of a phase.

    Args:
        action: `kill`, `terminate`, or `suspend`: until the other rank has given up.

    Returns:
        Seconds until the other rank has ended, and exit code and output of both; None if the run has ended before the phase.
    """
    run = runs / "tiny"
    (run / "progress.json").unlink(missing_ok=True)  # that of the start before
    processes = start(config, runs, "--max_attempts", "99", *words)
    if not wait_for_phase(run, phase, processes):
        finish(processes)
        return None
    time.sleep(random.random() * (0.2 if phase in ("setup", "warm_up", "score", "train") else 0.02))
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "suspend": signal.SIGSTOP}[action]
    began = time.monotonic()
    processes[rank].send_signal(number)
    try:
        processes[1 - rank].wait(120)
        seconds = time.monotonic() - began
    finally:
        processes[rank].send_signal(signal.SIGCONT)
    return seconds, finish(processes)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a few bytes, mounted at a new folder. Only root can do that."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def own_mounts(folder: Path, options: str) -> None:
    """In a process that is about to begin, as root: a file system at a folder that only it and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_NEWNS) == 0 and libc.mount(b"none", b"/", None, _PRIVATE, None) == 0, ctypes.get_errno()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def damage(file: Path, how: str, other: Path | None = None) -> None:
    """Truncates a file to half, flips a bit in its middle, empties it, or puts another file in its place."""
    content = bytearray(file.read_bytes())
    if how == "swapped":
        assert other is not None
        shutil.copyfile(other, file)
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "emptied": b""}[how])


def progress(run: Path) -> dict[str, Any]:
    """Content of `progress.json`."""
    found: dict[str, Any] = json.loads((run / "progress.json").read_text())
    return found


def is_calm(process: Process, seconds: float) -> bool:
    """Whether a process still runs after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    return process.poll() is None
