"""`dcft` in processes of its own, one a rank, as torchrun starts them, but forked where its libraries are imported already.

Each gets the environment, folder and command line of the test; that the command itself starts is seen by the tests that call
it (test_run.py: bad input; test_life.py, test_slurm.py: torchrun).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .ranks import context

COMMAND = [sys.executable, "-m", "dcft_dist.cli"]


class Process:
    """One `dcft` command; as `subprocess.Popen` with text of both outputs."""

    def __init__(self, words: list[str], env: dict[str, str], before: Callable[[], None] | None = None) -> None:
        """`before`: what the process calls before the command begins."""
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        self._process = context.Process(target=_dcft, args=(words, env, os.getcwd(), self._files, before))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(COMMAND, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _dcft(words: list[str], env: dict[str, str], folder: str, files: list[Path], before: Callable[[], None] | None) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # the run's own processes start as in a Python of its own
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", "1")))
    sys.argv[1:] = words
    from dcft_dist.cli import entry

    if before is not None:
        before()
    entry()


def start(*words: str, ranks: int = 1) -> list[Process]:
    """One process a rank; a single one without the environment of a launcher."""
    if ranks == 1:
        return [Process([*words], dict(os.environ))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [Process([*words], {**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]


def finish(processes: list[Process], timeout_s: float = 180) -> list[tuple[int, str]]:
    """Exit code and standard error of every rank."""
    end = time.monotonic() + timeout_s
    try:
        return [(p.wait(max(0.0, end - time.monotonic())), p.communicate()[1]) for p in processes]
    finally:
        for p in processes:
            p.kill()


def dcft(*words: Any, ranks: int = 1, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """What the command says and its exit code: the first that is not 0; the ranks' errors one after the other."""
    processes = start(*map(str, words), ranks=ranks)
    codes = [code for code, _ in finish(processes, timeout_s)]
    said = [p.communicate() for p in processes]
    code = next((c for c in codes if c), 0)
    return subprocess.CompletedProcess([*COMMAND, *words], code, said[0][0], "".join(err for _, err in said))


def output_of(*words: Any, ranks: int = 1) -> str:
    """What the command says, which is to succeed."""
    done = dcft(*words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout
