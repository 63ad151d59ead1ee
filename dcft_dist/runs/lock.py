"""The lock of a run's folder: only one job writes at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import RunError
from .attempts import note_error, now
from .stop import Stopped

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, timeout_s: float) -> Iterator[None]:
    """Holds the lock of a run's directory during the block, and records the error that ends the block. Collective.

    Args:
        folder: the run's directory; created if it does not exist.
        timeout_s: seconds after which a collective fails.

    Raises:
        RunError: another job has the lock. The wait for another job is `timeout_s` / 2, at most 30 s. An earlier start of
            the same job may still run on a node that was cut off. The wait for it is `timeout_s` + 60 s: by then its own
            collectives have failed.
    """
    from ..distributed import collectives  # late: `dcft status` and `dcft --help` need no torch

    lock, began, waiting = None, time.monotonic(), True
    while waiting:
        with collectives.agreed("lock the run directory"):
            if collectives.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(folder, began, timeout_s)
        waiting = not any(acquired for (acquired,) in collectives.all_gather_ints([int(lock is not None)], what="lock"))
    if lock is not None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, {_job()}, since {now()} UTC")
        lock.flush()
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        note_error(folder, error)
        raise
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: Path, began: float, timeout_s: float) -> IO[str] | None:
    """Tries to take the lock for a quarter of `timeout_s`.

    Args:
        began: when the first try started, by `time.monotonic`.

    Returns:
        The open lock file. None: try again, after a collective with the other ranks, which would otherwise time out.

    Raises:
        RunError: the whole wait is over (see `locked`).
    """
    handle, pause = (folder / "lock").open("a+"), time.monotonic() + timeout_s / 4
    while (holder := _taken(handle)) and time.monotonic() < pause:
        if time.monotonic() > began + (timeout_s + 60 if is_this_job(holder) else min(timeout_s / 2, 30)):
            handle.close()
            raise RunError(f"{folder} is being written by {holder}")
        time.sleep(0.2)
    if not holder:
        return handle
    handle.close()
    log.warning("waiting for %s, which is being written by %s", folder, holder)
    return None


def _taken(handle: IO[str]) -> str:
    """Takes the lock and returns ""; if another job has it, returns the description of that job."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        handle.seek(0)
        return handle.read().strip() or "another job"


def lock_holder(folder: Path) -> str:
    """Description of the job that has the lock: process, host, Slurm job, time. Empty if no job has it."""
    if not (folder / "lock").exists():
        return ""
    with (folder / "lock").open("a+") as handle:
        return _taken(handle)


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {job}" if job else "no Slurm job"


def is_this_job(holder: str) -> bool:
    """Whether a lock holder, as described by `lock_holder`, is an earlier start of this Slurm job."""
    return "SLURM_JOB_ID" in os.environ and f"{_job()}," in holder
