"""A run that is asked to stop, started twice, or crashes again and again; and what its directory tells."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dcft_dist.cli import main
from dcft_dist.errors import DcftError, RunError, WorldError
from dcft_dist.files import read_lines, write_json
from dcft_dist.runs.attempts import attempts, error_files, errors, note_error, refuse_repetition
from dcft_dist.runs.folder import SUMMARY_KEYS
from dcft_dist.runs.lock import _lock, lock_holder, locked
from dcft_dist.runs.status import run_verdict, status

from ..processes import Process
from ..train.test_run import encoder, finish, start, tiny, train, wait_for_phase, write_tiny

__all__ = ["encoder", "tiny"]
ROOT = Path(__file__).parents[2]
QUICK = ("--removal.fractions", "[]", "--checkpoint.every", "1")


def attempt(folder: Path, at: str, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    entry = {"time": "2026-01-01 00:00:00", "at": at, "ranks": 2, "nodes": None, "job": None, "restart": 0, **more}
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            progress = json.loads((run / "progress.json").read_text())
            if progress["phase"] == "train" and progress["step"] >= step:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.005)
    raise TimeoutError(f"step {step}")


@pytest.mark.parametrize("way", ["signal", "file"])
def test_a_request_to_one_rank_stops_all_at_one_step(
    way: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCFT_STOP_FILE", str(tmp_path / "stop"))
    processes = start(tiny, tmp_path, "--removal.fractions", "[]", "--checkpoint.every", "100")
    run = tmp_path / "tiny"
    wait_for_step(run, 2)
    if way == "signal":
        processes[1].send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "stop").touch()
    assert [code for code, _ in finish(processes)] == [0, 0]
    progress = json.loads((run / "progress.json").read_text())
    assert progress["phase"] == "stopped" and 2 < progress["step"] < 10
    assert (run / f"checkpoints/step_{progress['step']:08d}").is_dir()
    assert run_verdict(run, "step 3", 3)[0] == "again"
    said = status(run)
    assert f"tiny: stopped, step {progress['step']} of 10" in said and f"last checkpoint: step {progress['step']}" in said
    (tmp_path / "stop").unlink(missing_ok=True)
    train(tiny, tmp_path, "--removal.fractions", "[]", "--checkpoint.every", "100")
    assert run_verdict(run, "step 10", 3) == ("finished", "it is done")


def test_a_second_job_is_kept_out(tiny: Path, tmp_path: Path) -> None:
    words = [*QUICK, "--train.epochs", "9"]  # longer than the other job waits
    first = start(tiny, tmp_path, *words)
    assert wait_for_phase(tmp_path / "tiny", "train", first)
    results = finish(start(tiny, tmp_path, *words, "--timeout_s", "4"))
    for code, printed in results:
        assert code == 2 and "Traceback" not in printed, printed
    assert "tiny is being written by process" in results[0][1]
    assert [code for code, _ in finish(first)] == [0, 0]
    assert errors(tmp_path / "tiny") == []  # the intruder left no mark
    assert len(attempts(tmp_path / "tiny")) == 1


def test_a_former_start_of_the_same_job_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was cut off holds the lock until its own collectives give up; any other job is not waited for as long."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with locked(tmp_path, 600):
        began = time.monotonic()
        assert run_verdict(tmp_path, "step 5", 3)[0] == "again"
        assert _lock(tmp_path, began, 0.1) is None  # to be tried again
        with pytest.raises(RunError, match=r"is being written by process .* Slurm job 7, since"):
            _lock(tmp_path, began - 700, 600)
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        with pytest.raises(RunError, match="is being written by process"):
            _lock(tmp_path, began - 40, 600)
        assert run_verdict(tmp_path, "step 5", 3)[0] == "failed"
    with locked(tmp_path, 1):
        assert "Slurm job 77," in lock_holder(tmp_path)


def test_a_crash_loop_ends(tiny: Path, tmp_path: Path) -> None:
    """Failed starts that get no further count; those that did in between, and those that were preempted, do not."""
    run = tmp_path / "tiny"
    for at in ("the beginning", "the beginning", "step 3", "the beginning", "the beginning", "the beginning"):
        attempt(run, at)
        if len(attempts(run)) != 5:
            note_error(run, WorldError("rank 1: gone"))
    with (run / "attempts.jsonl").open("a") as file:
        file.write('{"time": "torn')
    assert run_verdict(run, "the beginning", 3)[0] == "again"
    (run / "attempts.jsonl").write_text((run / "attempts.jsonl").read_text().removesuffix('{"time": "torn'))
    attempt(run, "the beginning")
    found, why = run_verdict(run, "the beginning", 3)
    assert found == "failed" and "3 starts at the beginning made no progress; rank 0 on" in why
    results = finish(start(tiny, tmp_path))
    assert {code for code, _ in results} == {2}
    assert "was started 3 times at the beginning without progress (rank 0 on" in results[0][1]


def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(2):  # nothing was written: such starts count as well
        assert run_verdict(run, "the beginning", 3)[0] == "again"
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(len(attempts(run))))
    assert run_verdict(run, "the beginning", 3)[0] == "failed"
    attempt(run, "step 3", job="7", restart=2)
    found, why = run_verdict(run, "step 5", 3)
    assert found == "again" and "it was killed, or ran out of memory: see the log; it goes on from step 5" in why
    monkeypatch.setenv("DCFT_STOP_FILE", str(tmp_path))
    assert run_verdict(run, "step 5", 3) == ("again", "it was asked to stop, and goes on from step 5")
    assert not error_files(run, 4), "what ranks say while they are being ended is no failure"
    monkeypatch.delenv("DCFT_STOP_FILE")
    note_error(run, WorldError("rank 0: sum failed"))
    assert run_verdict(run, "step 5", 3)[0] == "again"
    monkeypatch.setenv("RANK", "1")
    note_error(run, DcftError("no such column"))
    found, why = run_verdict(run, "step 5", 3)
    assert found == "failed" and why.startswith("rank 1 on") and why.endswith("no such column (and 1 more ranks)")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(DcftError, match=r"not started again: rank 1 .* no such column"):
        refuse_repetition(run)
    (run / "progress.json").write_text('{"phase": "reached score"}')
    assert run_verdict(run, "step 5", 3, "select")[0] == "failed"
    assert run_verdict(run, "step 5", 3, "score")[0] == "finished"
    (run / "summary.json").write_text("{}")
    assert run_verdict(run, "step 5", 3)[0] == "failed", "an emptied summary is no result"
    write_json(run / "summary.json", dict.fromkeys(SUMMARY_KEYS))
    assert run_verdict(run, "step 5", 3)[0] == "finished"


ONE_RANK = ("--removal.fractions", "[]", "--engine", "single", "--train.epochs", "2")


def stop_at_call(number: int) -> None:
    """From now on a stop is requested at that call of `stop_requested`, and at no other."""
    from dcft_dist.train import fine_tune, steps

    calls = itertools.count(1)

    def requested() -> bool:
        return next(calls) == number

    fine_tune.stop_requested = steps.stop_requested = requested


@pytest.fixture(scope="module")
def undisturbed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody asks to stop."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_tiny(folder, encoder), folder, *ONE_RANK, ranks=1)
    return folder / "tiny"


@pytest.mark.parametrize("step", [0, 5, 10])
def test_asked_to_stop_where_there_is_more_to_do(step: int, undisturbed: Path, tiny: Path, tmp_path: Path) -> None:
    """Before any step, at the end of an epoch, which is then not validated before it is saved, and at the very end."""
    words = ["train", str(tiny), "--runs_dir", str(tmp_path), *ONE_RANK]
    process = Process(words, dict(os.environ), partial(stop_at_call, step + 2))
    printed, problem = process.communicate(timeout=300)
    assert process.poll() == 0, problem
    assert f"stopped {f'at step {step}' if step else 'between two phases'}" in printed
    run = tmp_path / "tiny"
    assert run_verdict(run, "", 3)[0] == "again" and not (run / f"checkpoints/best_{step:08d}").exists()
    found, expected = (train(tiny, tmp_path, *ONE_RANK, ranks=1), json.loads((undisturbed / "summary.json").read_text()))
    for key in ("weights_checksum", "validation", "test", "best_epoch"):
        assert found[key] == expected[key]
    assert read_lines(run / "metrics.jsonl") == read_lines(undisturbed / "metrics.jsonl")


def test_torchrun_starts_again_on_one_node(tiny: Path, tmp_path: Path) -> None:
    """A rank that is killed: the others end, all start again, and the run goes on from its last checkpoint."""
    environment = os.environ | {"DCFT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RANKS": "2"}
    command = [str(ROOT / "launch/torchrun_local.sh"), "tiny.toml", *QUICK]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = tmp_path / "runs/tiny"
    try:
        wait_for_step(run, 3)
        holder = (run / "lock").read_text()
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        assert process.wait(120) == 0
    finally:
        process.kill()
    starts = attempts(run)
    assert len(starts) == 2 and int(starts[1]["at"].removeprefix("step ")) >= 2
    assert (run / "summary.json").exists()


def test_ctrl_c_reaches_the_ranks_of_torchrun_as_a_request(tiny: Path, tmp_path: Path) -> None:
    """The script alone gets it, and torchrun, which would end its ranks, does not."""
    environment = os.environ | {"DCFT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RANKS": "2"}
    command = [str(ROOT / "launch/torchrun_local.sh"), "tiny.toml", *QUICK, "--train.epochs", "400"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )
    wait_for_step(tmp_path / "runs/tiny", 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopping after this step, with a checkpoint" in said
    assert "start it again to go on" in said and "Traceback" not in said
    assert json.loads((tmp_path / "runs/tiny/progress.json").read_text())["phase"] == "stopped"


@pytest.mark.parametrize("obeys", [True, False])
def test_sigterm_to_a_launch_script(obeys: bool, tmp_path: Path) -> None:
    """The first is a request, the second goes on to what the script has started; neither looks like success."""
    wait = '[ ! -e "$DCFT_STOP_FILE" ]' if obeys else "true"
    program = f"echo began; while {wait}; do sleep 0.05; done"
    process = subprocess.Popen(
        ["bash", "-c", f". \"{ROOT}/launch/interruptible.sh\"; interruptible bash -c '{program}'"],
        env=os.environ | {"DCFT_STOP_FILE": str(tmp_path / "stop")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "began\n"
    process.terminate()
    if not obeys:
        while not (tmp_path / "stop").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 143 and "stopping after this step, with a checkpoint; SIGTERM again" in said
    assert not (tmp_path / "stop").exists()


def test_checkpoints_that_are_kept(tiny: Path, tmp_path: Path) -> None:
    more = ("--checkpoint.keep_last", "3", "--checkpoint.keep_best", "2", "--train.epochs", "2")
    train(tiny, tmp_path, *QUICK, *more, "--engine", "single", ranks=1)
    names = sorted(folder.name for folder in (tmp_path / "tiny/checkpoints").iterdir())
    assert [name for name in names if name.startswith("step")] == [f"step_{i:08d}" for i in (8, 9, 10)]
    assert 1 <= len([name for name in names if name.startswith("best")]) <= 2


def test_another_set_than_the_checkpoint_was_trained_with(tiny: Path, tmp_path: Path) -> None:
    """The set's checksum is looked at before a run goes on."""
    one = (*QUICK, "--engine", "single")
    train(tiny, tmp_path, *one, "--selection.fraction", "0.2", "--name", "other", "--until", "select", ranks=1)
    processes = start(tiny, tmp_path, *one, ranks=1)
    wait_for_step(tmp_path / "tiny", 2)
    processes[0].kill()
    finish(processes)
    (tmp_path / "tiny/fundamental.safetensors").write_bytes((tmp_path / "other/fundamental.safetensors").read_bytes())
    code, printed = finish(start(tiny, tmp_path, *one, ranks=1))[0]
    assert code == 2 and "fundamental.safetensors is not the file that this run made" in printed
    (tmp_path / "tiny/facts.json").unlink()
    code, printed = finish(start(tiny, tmp_path, *one, ranks=1))[0]
    assert code == 2 and "fundamental.safetensors is not the set that" in printed


def test_status_of_a_finished_run(tmp_path: Path) -> None:
    """The first results are in it. A damaged summary leaves them out."""
    (tmp_path / "config.toml").touch()
    results = {"validation": {"dice": 0.8125, "loss": 0.25, "ece": 0.125, "hd95": 3.0}, "test": {"dice": 0.7, "loss": 0.3}}
    write_json(tmp_path / "summary.json", dict.fromkeys(SUMMARY_KEYS) | results)
    assert status(tmp_path).splitlines()[:3] == [
        "finished, without an exported model",
        "validation: dice 0.8125, loss 0.25, ece 0.125",
        "test: dice 0.7, loss 0.3",
    ]
    write_json(tmp_path / "summary.json", dict.fromkeys(SUMMARY_KEYS) | {"validation": 3, "test": {"dice": "x"}})
    assert status(tmp_path) == "finished, without an exported model"


def test_start_from_another_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, source = (*QUICK, "--engine", "single"), ("--start_from", str(tmp_path / "tiny"))
    train(tiny, tmp_path, *one, "--until", "score", ranks=1)
    assert not (tmp_path / "tiny/fundamental.safetensors").exists()
    train(tiny, tmp_path, *one, *source, "--name", "b", "--selection.fraction", "0.2", "--until", "select", ranks=1)
    seconds = json.loads((tmp_path / "b/progress.json").read_text())["seconds"]
    assert (tmp_path / "b/fundamental.safetensors").exists() and seconds["score"] < 1.0
    assert (tmp_path / "b/head.safetensors").read_bytes() == (tmp_path / "tiny/head.safetensors").read_bytes()
    code, printed = finish(start(tiny, tmp_path, *one, *source, "--name", "c", "--seed", "1", ranks=1))[0]
    assert code == 2 and "is not a run of the same task, model and seed (seed was 0 and is 1)" in printed
    assert main(["status", str(tmp_path / "b")]) == 0
    assert "b: reached" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "nowhere")]) == 2
