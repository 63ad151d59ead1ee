"""The lock of a run's folder: only one job writes at a time.

The lock is `flock` on the file `lock`. Some cluster file systems have no `flock`, or one that other nodes do not see (Lustre
without the mount option `flock`). So whoever holds the lock also writes its name into the file and touches it every few
seconds. A job on another node waits until the file has not been touched for a while.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import RunError
from .attempts import note_error, now
from .stop import Stopped

log = logging.getLogger(__name__)

BEAT_S = 4.0  # seconds between two touches of the file
SILENT_S = 20.0  # seconds without a touch after which its holder has ended; shorter than the wait for another job

_held: list[IO[str]] = []  # lock files of this process


def _leave_to_parent() -> None:
    """In a forked process, such as one that reads data: closes its copy, which would hold the lock beyond our end."""
    for handle in _held:
        with suppress(OSError):
            handle.close()


os.register_at_fork(after_in_child=_leave_to_parent)

_claims: dict[str, str] = {}  # path of a lock -> what this process has written into it

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)  # EBADF: NFS, opened for reading


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
    beating = _beating(lock, folder) if lock is not None else None
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        note_error(folder, error)
        raise
    finally:
        if lock is not None and beating is not None:
            beating.set()
            with suppress(OSError):
                if _content(lock) == _mine(lock):
                    lock.truncate(0)  # nobody has to wait
                fcntl.flock(lock, fcntl.LOCK_UN)  # worker processes have the file too, and may end later
            _held.remove(lock)
            lock.close()


def _open(file: Path, mode: str) -> IO[str]:
    """Opens the lock file, unless it is a symbolic link: that might lead to a file of somebody else."""
    try:
        return open(file, mode, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{file} is a symbolic link, which the lock of a run may not be: delete it") from error
        raise


def _lock(folder: Path, began: float, timeout_s: float) -> IO[str] | None:
    """Tries to take the lock for a quarter of `timeout_s`.

    Args:
        began: when the first try started, by `time.monotonic`.

    Returns:
        The open lock file. None: try again, after a collective with the other ranks, which would otherwise time out.

    Raises:
        RunError: the whole wait is over (see `locked`).
    """
    pause = time.monotonic() + timeout_s / 4
    while True:
        handle = _open(folder / "lock", "a+")  # anew: a network file system then asks for the file's present state
        if not (holder := _taken(handle)) and not (holder := _claimed(handle)):
            _held.append(handle)
            return handle
        handle.close()
        if time.monotonic() > began + (timeout_s + 60 if is_this_job(holder) else min(timeout_s / 2, 30)):
            raise RunError(f"{folder} is being written by {holder}")
        if time.monotonic() > pause:
            break
        time.sleep(0.2)
    log.warning("waiting for %s, which is being written by %s", folder, holder)
    return None


def _taken(handle: IO[str]) -> str:
    """Takes the lock and returns ""; if another job has it, returns the description of that job."""
    has_flock = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _content(handle) or "another job"
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        has_flock = False
    holder = _content(handle)
    here = re.match(rf"process (\d+) on {re.escape(socket.gethostname())},", holder)
    if here:  # on one node flock can be trusted; without it, ask for the process
        return "" if has_flock or not _is_alive(int(here[1])) else holder
    return holder if holder and _silence(handle) < SILENT_S else ""


def _claimed(handle: IO[str]) -> str:
    """Writes this process into the file, and returns the description of another one that has done so at the same time."""
    mine = f"process {os.getpid()} on {socket.gethostname()}, {_job()}, since {now()} UTC"
    _claims[handle.name] = mine
    handle.truncate(0)
    handle.write(mine)
    handle.flush()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no flock: two jobs may have found the file free
        time.sleep(1.0)
    content = _content(handle)
    return "" if content == mine else content


def _mine(handle: IO[str]) -> str:
    return _claims.get(handle.name, "")


def _beating(handle: IO[str], folder: Path) -> threading.Event:
    """Touches the file from now until the returned event is set. If another job has taken the lock, this process ends.

    That happens to a job that was suspended for a while where nodes do not see each other's `flock`.
    """
    end, place = threading.Event(), _place_of(folder)

    def beat() -> None:
        while not end.wait(BEAT_S):
            with suppress(OSError, ValueError):  # the file system is away for a moment; or the file is closed
                if _place_of(folder) != place:
                    log.error("%s was removed, or moved away, while the run goes on: this process ends", folder)
                    os._exit(1)
                os.utime(handle.fileno())
                holder = Path(handle.name).read_text().strip()
                if holder and holder != _mine(handle) and not end.is_set():
                    note_error(folder, RunError(f"{folder} is being written by {holder}, which took the lock meanwhile"))
                    log.error("%s is being written by %s, which took the lock meanwhile: this process ends", folder, holder)
                    os._exit(1)

    threading.Thread(target=beat, daemon=True, name="lock of the run").start()
    return end


def _place_of(folder: Path) -> tuple[int, int]:
    """What a folder is for its file system; zeros if it does not exist.

    Raises:
        OSError: the file system does not answer.
    """
    try:
        found = folder.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _content(handle: IO[str]) -> str:
    handle.seek(0)
    return handle.read().strip()


def _silence(handle: IO[str]) -> float:
    """Seconds since the file was last touched, by the clock of its file system, which may differ from that of this node."""
    clock = Path(handle.name).with_name(f".clock.{socket.gethostname()}.{os.getpid()}")
    try:
        clock.touch()
        present = clock.stat().st_mtime
        clock.unlink()
    except OSError:  # a folder that only others may write to
        present = time.time()
    return present - os.fstat(handle.fileno()).st_mtime


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # left by an earlier process with the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lock_holder(folder: Path) -> str:
    """Description of the job that has the lock: process, host, Slurm job, time. Empty if no job has it."""
    for mode in ("r+", "r"):  # NFS locks only what is open for writing
        try:
            with _open(folder / "lock", mode) as handle:
                return _taken(handle)
        except FileNotFoundError:
            return ""
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    return ""


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {job}" if job else "no Slurm job"


def is_this_job(holder: str) -> bool:
    """Whether a lock holder, as described by `lock_holder`, is an earlier start of this Slurm job."""
    return "SLURM_JOB_ID" in os.environ and f"{_job()}," in holder
