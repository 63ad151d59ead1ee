"""A disk, a quota, shared memory or the table of file handles is full; a folder is gone or read-only; a worker is killed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dcft_dist import files
from dcft_dist.errors import TemporaryError
from dcft_dist.files import append_line, read_json, read_lines
from dcft_dist.runs.attempts import attempts, note_error
from dcft_dist.runs.status import run_verdict, space_problem, status

from ..processes import Process, finish
from ..runs.test_life import wait_for_step
from ..train.test_run import encoder, start, tiny, train, wait_for_phase
from .harness import own_mounts, same_result, small_disk
from .test_kills import undisturbed

__all__ = ["encoder", "tiny", "undisturbed"]


def fill(folder: Path) -> None:
    """Uses up all space of a small disk."""
    with (folder / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while True:
            file.write(b"0" * 512)


def test_a_full_disk(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with one line; the verdict is `again` a few times and then `failed`; with space it goes on."""
    with small_disk(tmp_path / "disk", "24m") as disk:
        processes = start(tiny, disk)
        assert wait_for_phase(disk / "tiny", "train", processes)
        fill(disk)
        results = finish(processes)
        assert {code for code, _ in results} == {1} and all("Traceback" not in said for _, said in results)
        assert "No space left on device" in results[0][1]
        said = status(disk / "tiny")
        assert "no space: the disk of " in said
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        verdicts = []
        for restart in range(6):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            verdicts.append(run_verdict(disk / "tiny", "the fundamental set", 3))
        found = [verdict for verdict, _ in verdicts]
        assert "failed" in found[:4] and set(found[found.index("failed") :]) == {"failed"}, "not for ever"
        assert "no space: " in verdicts[-1][1]
        monkeypatch.delenv("SLURM_JOB_ID")
        (disk / "ballast").unlink()
        assert same_result(train(tiny, disk, "--max_attempts", "99"), undisturbed)


def test_a_disk_that_is_full_from_the_beginning(tiny: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk)
        results = finish(start(tiny, disk))
        assert {code for code, _ in results} == {1} and all("Traceback" not in said for _, said in results)


def test_logs_do_not_stop_a_run(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Metrics, progress and TensorBoard cannot be written; checkpoints and results can."""
    run = tmp_path / "tiny"
    for name in ("metrics.jsonl", "progress.json"):
        (run / name).mkdir(parents=True)
    (run / "tensorboard").write_text("a file where a folder should be")
    found = train(tiny, tmp_path)
    assert same_result(found, undisturbed)


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        append_line(disk / "lines.jsonl", {"a": 1})
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            for _ in range(100):
                append_line(disk / "lines.jsonl", {"long": "x" * 500})
        assert read_lines(disk / "lines.jsonl", damaged="damaged")[0] == {"a": 1}
        assert (disk / "lines.jsonl").read_bytes().endswith(b"}\n"), "no half of a line"
        assert "damaged" not in read_lines(disk / "lines.jsonl", damaged="damaged")


def test_a_quota_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota has an error of its own. It cannot be set for root, so the error is made here."""

    def full(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    assert space_problem(tmp_path).startswith("no space: ") and errno.EDQUOT in files.FULL


def test_a_read_only_folder(tiny: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "tiny").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        results = finish(start(tiny, disk))
        assert all(code in (1, 2) and "Traceback" not in said for code, said in results)
        assert "Read-only file system" in results[0][1]
        assert run_verdict(disk / "tiny", "the beginning", 3)[0] == "failed"


def test_a_folder_that_vanishes(tiny: Path, tmp_path: Path) -> None:
    processes = start(tiny, tmp_path, "--train.epochs", "200")
    assert wait_for_phase(tmp_path / "tiny", "train", processes)
    began = time.monotonic()
    (tmp_path / "tiny").rename(tmp_path / "gone")
    results = finish(processes)
    assert time.monotonic() - began < 20 and all(code == 1 for code, _ in results)
    assert all("Traceback" not in said and "terminate called" not in said for _, said in results), results
    assert "was removed, or moved away" in results[0][1] or "No such file" in results[0][1]


def test_few_file_handles(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Not enough to begin with is an error in words; the run goes on once there are more."""
    results = finish(
        [Process(["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single"], dict(os.environ), few)]
    )
    assert results[0][0] in (1, 2) and "Traceback" not in results[0][1] and "Too many open files" in results[0][1]
    assert train(tiny, tmp_path, "--max_attempts", "99")["test"] == undisturbed["test"]


def few() -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, used + 4))


# -- processes that read data ------------------------------------------------------------------------------------------

WORKERS = ("--train.workers", "2", "--engine", "single")


def children(process: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # one that has just ended
            if int(place.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(place.parent.name))
    return found


def test_a_killed_worker(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    words = [*WORKERS, "--train.epochs", "40"]
    process = Process(["train", str(tiny), "--runs_dir", str(tmp_path), *words], dict(os.environ))
    assert wait_for_phase(tmp_path / "tiny", "train", [process])
    while not (found := children(process.pid)) and process.poll() is None:
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)
    (code, said) = finish([process])[0]
    assert code == 1 and "Traceback" not in said, said
    assert "a process that reads training data has ended" in said and "set train.workers lower" in said
    assert run_verdict(tmp_path / "tiny", "step 0", 3)[0] == "again"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
def test_full_shared_memory(tiny: Path, tmp_path: Path) -> None:
    command = ["train", str(tiny), "--runs_dir", str(tmp_path), *WORKERS]
    process = Process(command, dict(os.environ), partial(own_mounts, Path("/dev/shm"), "size=4k"))
    (code, said) = finish([process])[0]
    if code:
        assert code == 1 and "Traceback" not in said.split("dcft: error")[-1] and "/dev/shm" in said, said


def has_lock(process: int) -> bool:
    return any(file.is_symlink() and os.readlink(file).endswith("/lock") for file in Path(f"/proc/{process}/fd").iterdir())


def test_a_worker_does_not_keep_the_lock(tiny: Path, tmp_path: Path) -> None:
    """Rank 0 is killed, and its worker is suspended, so that it outlives it. The next start is let in at once."""
    words = [*WORKERS, "--train.epochs", "40"]
    process = Process(["train", str(tiny), "--runs_dir", str(tmp_path), *words], dict(os.environ))
    assert wait_for_phase(tmp_path / "tiny", "train", [process])
    while len(found := children(process.pid)) < 2 and process.poll() is None:
        time.sleep(0.01)
    deadline = time.monotonic() + 10
    while any(map(has_lock, found)) and time.monotonic() < deadline:  # a fork has the file open at first
        time.sleep(0.01)
    for worker in found:
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.wait(10)
    try:
        (code, said) = finish(
            start(tiny, tmp_path, "--engine", "single", "--train.epochs", "40", "--until", "select", ranks=1)
        )[0]
        assert code == 0, said
    finally:
        for worker in found:
            os.kill(worker, signal.SIGKILL)


# -- Ctrl-C and SIGTERM ------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_a_checkpoint(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    processes = start(tiny, tmp_path)
    assert wait_for_phase(tmp_path / "tiny", "train", processes)
    for process in processes:
        process.send_signal(signal.SIGINT)
    results = finish(processes)
    assert [code for code, _ in results] == [0, 0] and "stopping after this step, with a checkpoint" in results[0][1]
    assert same_result(train(tiny, tmp_path), undisturbed)


def test_ctrl_c_twice_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    process = start(tiny, tmp_path, "--engine", "single", "--test_resamples", "50000", ranks=1)[0]
    assert wait_for_phase(tmp_path / "tiny", "test", [process])  # which takes half a minute, and has no steps
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    (code, said) = finish([process])[0]
    assert code == 130 and "dcft: stopped; start it again" in said and "Traceback" not in said
    assert attempts(tmp_path / "tiny") and not list((tmp_path / "tiny").glob("errors/*")), "no failure"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_of_processes(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As from a terminal, `timeout` or Slurm: the processes that read data get it too."""
    words = (*WORKERS, "--train.epochs", "8", "--log_every", "1")
    process = Process(["train", str(tiny), "--runs_dir", str(tmp_path), *words], dict(os.environ), before=os.setsid)
    wait_for_step(tmp_path / "tiny", 1)
    assert len(children(process.pid)) >= 2
    os.killpg(process.pid, number)
    code, said = finish([process])[0]
    assert code == (143 if number == signal.SIGTERM else 0) and "stopping after this step, with a checkpoint" in said
    assert read_json(tmp_path / "tiny/progress.json")["phase"] == "stopped"
    verdict = run_verdict(tmp_path / "tiny", "step 5", 3)
    assert verdict == ("again", "it was asked to stop, and goes on from step 5") and not list(
        (tmp_path / "tiny/errors").glob("*")
    )
    went_on = train(tiny, tmp_path, *words, ranks=1)
    assert same_result(went_on, train(tiny, tmp_path / "other", *words, ranks=1))


STEPS = """
import os, sys, time
from dcft_dist.runs import stop
if "DCFT_LISTENS" in os.environ:
    stop.listen_for_stop()
with stop.sigterm_stops():
    child = os.fork()
    if child == 0:
        print("began", flush=True)
        time.sleep(100)
    for _ in range(1000):
        time.sleep(0.01)
"""


def in_steps(**environment: str) -> subprocess.Popen[str]:
    """A process, in the middle of its steps, that has a fork. It listens, as `dcft train` does, with DCFT_LISTENS."""
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "began\n"
    return process


def test_sigterm_again_ends_at_once() -> None:
    """Not where it comes within a second: that is one event, sent to the group and once more by a launcher.

    Nor does a log without a reader end the run.
    """
    process = in_steps(DCFT_LISTENS="1")
    assert process.stderr is not None
    process.stderr.close()
    for pause in (0.1, 1.2, 0):
        process.terminate()
        time.sleep(pause)
        assert process.poll() is None or not pause
    assert process.wait(5) == 143
    os.killpg(process.pid, signal.SIGKILL)


WITHOUT_A_READER = """
import sys
from dcft_dist import cli
from dcft_dist.runs import stop
def train(*_):
    stop._signals.extend(map(int, signals))
    print("stopped at step 5", flush=True)
signals, sys.argv[1:] = sys.argv[1:], ["train", "any.toml"]
cli._COMMANDS["train"] = train
cli.entry()
"""


@pytest.mark.parametrize(("signals", "code"), [([], 1), ([str(int(signal.SIGTERM))], 143)])
def test_a_run_whose_output_nobody_reads_is_not_said_to_be_finished(signals: list[str], code: int) -> None:
    """As where the same signal has ended `tee`."""
    process = subprocess.Popen([sys.executable, "-c", WITHOUT_A_READER, *signals], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == code


def test_sigterm_ends_a_study_at_once() -> None:
    """Nobody would wait there for the end of a step."""
    process = in_steps()
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
    os.killpg(process.pid, signal.SIGKILL)


def test_sigterm_ends_a_fork() -> None:
    """A pool ends its processes by SIGTERM, and waits for them."""
    process = in_steps(DCFT_LISTENS="1")
    (child,) = children(process.pid)
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_sigterm_ends_what_a_script_asked_to_stop(tmp_path: Path) -> None:
    """A batch script creates the file first, and waits; then its SIGTERM means the end."""
    process = in_steps(DCFT_LISTENS="1", DCFT_STOP_FILE=str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    process.terminate()
    assert process.wait(5) == 143
    os.killpg(process.pid, signal.SIGKILL)


# -- clocks ------------------------------------------------------------------------------------------------------------


def jumping_clock() -> None:
    real, began = time.time, time.time()
    time.time = lambda: real() + (-31e6 if real() > began + 2 else 31e6)


def test_clocks_that_jump(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """A year forwards, then two back. No result, limit or lock depends on the time of day."""
    command = ["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single"]
    (code, said) = finish([Process(command, dict(os.environ), jumping_clock)])[0]
    assert code == 0, said
    single = train(tiny, tmp_path / "b", "--engine", "single", ranks=1)
    assert same_result(read_json(tmp_path / "tiny/summary.json"), single)


def test_files_from_the_future(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    processes = start(tiny, tmp_path)
    assert wait_for_phase(tmp_path / "tiny", "train", processes)
    for process in processes:
        process.kill()
    finish(processes)
    note_error(tmp_path / "tiny", TemporaryError("the node failed"))
    for file in (tmp_path / "tiny").rglob("*"):
        os.utime(file, (4e9, 4e9))
    assert same_result(train(tiny, tmp_path), undisturbed)
    shutil.rmtree(tmp_path / "tiny")
