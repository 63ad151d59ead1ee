"""One writer at a time, also where `flock` is missing or is not seen by other nodes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dcft_dist.errors import RunError
from dcft_dist.runs import lock
from dcft_dist.runs.lock import lock_holder, locked

from ..ranks import context


def no_flock(*_: Any) -> None:
    """A file system without `flock`: Lustre that is mounted without the option."""
    raise OSError(errno.ENOSYS, "Function not implemented")


ELSEWHERE = "process 7 on another-node, no Slurm job, since now"


def held_elsewhere(folder: Path, seconds_ago: float, holder: str = ELSEWHERE) -> None:
    """The lock as a job on another node leaves it whose `flock` this node does not see."""
    (folder / "lock").write_text(holder)
    then = time.time() - seconds_ago
    os.utime(folder / "lock", (then, then))


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_holder_on_another_node_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flock: bool) -> None:
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    held_elsewhere(tmp_path, seconds_ago=1)
    assert "on another-node" in lock_holder(tmp_path)
    with pytest.raises(RunError, match="is being written by process 7 on another-node"), locked(tmp_path, 2):
        pass
    held_elsewhere(tmp_path, seconds_ago=lock.SILENT_S + 5)  # it has ended without a word
    assert lock_holder(tmp_path) == ""
    with locked(tmp_path, 2):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == "" and lock_holder(tmp_path) == ""
    assert [file.name for file in tmp_path.iterdir() if "clock" in file.name] == []


def test_without_flock_a_dead_process_of_this_node_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(fcntl, "flock", no_flock)
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    held_elsewhere(tmp_path, 100, f"process {child.pid} on {socket.gethostname()}, no Slurm job, since now")
    assert lock_holder(tmp_path) != ""
    child.kill()
    child.join()
    assert lock_holder(tmp_path) == ""


def test_who_holds_the_lock_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with locked(tmp_path, 2):
        os.utime(tmp_path / "lock", (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 5


def enter(folder: str, number: int) -> None:
    fcntl.flock = no_flock
    with locked(Path(folder), 60):
        begin = time.monotonic()
        time.sleep(0.3)
        (Path(folder) / f"{number}.txt").write_text(f"{begin} {time.monotonic()}")


def test_without_flock_processes_take_turns(tmp_path: Path) -> None:
    processes = [context.Process(target=enter, args=(str(tmp_path), number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    times = sorted(tuple(map(float, file.read_text().split())) for file in tmp_path.glob("*.txt"))
    assert len(times) == 3
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))


def test_worker_processes_do_not_keep_the_lock(tmp_path: Path) -> None:
    """They are forked while it is held, have the file too, and may end later."""
    with locked(tmp_path, 2):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
    assert worker.is_alive() and lock_holder(tmp_path) == ""
    with locked(tmp_path, 2):
        pass
    worker.kill()
    worker.join()


def suspended(folder: str) -> None:
    fcntl.flock = no_flock
    lock.BEAT_S = 0.1
    with locked(Path(folder), 60):
        (Path(folder) / "inside").touch()
        time.sleep(30)


def test_a_job_that_lost_the_lock_while_it_was_suspended_ends(tmp_path: Path) -> None:
    process = context.Process(target=suspended, args=(str(tmp_path),))
    process.start()
    end = time.monotonic() + 30
    while not (tmp_path / "inside").exists() and time.monotonic() < end:
        time.sleep(0.05)
    held_elsewhere(tmp_path, seconds_ago=0)
    process.join(20)
    assert process.exitcode == 1
    assert (tmp_path / "lock").read_text() == ELSEWHERE, "the name of the other job stays"


def test_another_error_of_the_file_system_is_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="Input/output error"):
        lock_holder_of_a_file(tmp_path)


def lock_holder_of_a_file(folder: Path) -> str:
    (folder / "lock").write_text("")
    return lock_holder(folder)
