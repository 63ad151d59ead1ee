"""Checkpoints that are written beside the training: the same bits, and no guarantee less."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcft_dist.cli import main
from dcft_dist.errors import DivergedError, TemporaryError
from dcft_dist.files import read_lines
from dcft_dist.train.steps import Training
from dcft_dist.weights import saver
from dcft_dist.weights.checkpoint import is_complete

from ..processes import finish
from .test_run import encoder, start, tiny, train

__all__ = ["encoder", "tiny"]

OPTIONS = ["--removal.fractions", "[]", "--checkpoint.every", "2"]
BACKGROUND = ["--checkpoint.background", "true"]


def words(tiny: Path, runs: Path, *more: str) -> list[str]:
    return ["train", str(tiny), "--runs_dir", str(runs), "--engine", "single", *OPTIONS, *more]


def checksum(runs: Path) -> str:
    return str(json.loads((runs / "tiny/summary.json").read_text())["weights_checksum"])


def folder_name(checkpoints: Path) -> str:
    """How a run's folders on the disk of a node begin."""
    return f"dcft_{hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:16]}"


def test_training_goes_on_while_a_checkpoint_is_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved before the first step is written only when that step is made."""
    assert main(words(tiny, tmp_path / "plain")) == 0
    write, step, made, names = saver.write_mine, Training.step, threading.Event(), list[str]()

    def late(temporary: Path, tensors: Any) -> Path | None:
        assert made.wait(60), "the training waits for the checkpoint"
        names.append(temporary.name)
        return write(temporary, tensors)

    def noted(self: Training, number: int, total: int, groups: Any) -> Any:
        found = step(self, number, total, groups)
        if number == 0:
            folders = {path.name for path in (tmp_path / "beside/tiny/checkpoints").iterdir()}
            assert folders == {".best_00000000.tmp", ".step_00000000.tmp"}, "no name before everything is written"
            made.set()
        return found

    monkeypatch.setattr(Training, "step", noted)
    monkeypatch.setattr(saver, "write_mine", late)
    assert main(words(tiny, tmp_path / "beside", *BACKGROUND)) == 0
    assert checksum(tmp_path / "beside") == checksum(tmp_path / "plain")
    assert names[:3] == [".best_00000000.tmp", ".step_00000000.tmp", ".step_00000002.tmp"]
    kept = [sorted(p.name for p in (tmp_path / run / "tiny/checkpoints").iterdir()) for run in ("plain", "beside")]
    assert kept[0] == kept[1] and len(kept[0]) == 2, "the newest and the best"


@pytest.mark.parametrize("staged", [False, True])
def test_a_failure_is_told_at_the_next_save(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], staged: bool
) -> None:
    """The checkpoint before stays, and the run goes on from it. What is left on the node's disk goes then."""
    assert main(words(tiny, tmp_path / "plain")) == 0
    options = [*BACKGROUND, "--checkpoint.staging", str(tmp_path / "node")] if staged else BACKGROUND
    name = "_move" if staged else "write_mine"
    last = getattr(saver, name)

    def full(first: Path, second: Any) -> Any:
        if ".step_00000004.tmp" in f"{first} {second if staged else ''}":
            raise TemporaryError(f"{first}: cannot write the checkpoint: no space left")
        return last(first, second)

    monkeypatch.setattr(saver, name, full)
    assert main(words(tiny, tmp_path / "full", *options)) == 1
    dist.destroy_process_group()
    assert "step_00000004" in (said := capsys.readouterr().err) and "no space left" in said
    left = [path for path in (tmp_path / "full/tiny/checkpoints").iterdir() if path.name.startswith("step")]
    assert [path.name for path in left] == ["step_00000002"] and is_complete(left[0])
    monkeypatch.setattr(saver, name, last)
    assert not staged or list((tmp_path / "node").iterdir()) == [], "the disk of the node is left clean"
    if staged:  # by a start that was killed
        (tmp_path / "node" / f"{folder_name(tmp_path / 'full/tiny/checkpoints')}_3_x/step_00000001").mkdir(parents=True)
    assert main(words(tiny, tmp_path / "full", *options)) == 0
    assert checksum(tmp_path / "full") == checksum(tmp_path / "plain")
    assert read_lines(tmp_path / "full/tiny/attempts.jsonl")[1]["at"] == "step 2"
    assert not staged or list((tmp_path / "node").iterdir()) == []


def test_the_disk_of_the_node(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training waits for a file there, not for the shared one; only its user may read it; a variable must be set."""
    assert main(words(tiny, tmp_path / "plain")) == 0
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node"))
    move, seen = saver._move, list[tuple[str, int]]()

    def noted(file: Path, folder: Path) -> None:
        assert file.is_file() and not (folder / file.name).exists()
        seen.append((folder.name, file.parent.parent.stat().st_mode & 0o777))
        move(file, folder)

    monkeypatch.setattr(saver, "_move", noted)
    staged = ["--checkpoint.staging", "$NODE_DISK"]
    assert main(words(tiny, tmp_path / "staged", *BACKGROUND, *staged)) == 0
    assert checksum(tmp_path / "staged") == checksum(tmp_path / "plain")
    assert (".step_00000004.tmp", 0o700) in seen and list((tmp_path / "node").iterdir()) == []
    monkeypatch.setattr(saver, "_move", move)
    monkeypatch.setenv("EMPTY", "")
    for place in ("$NO_SUCH", "${NO_SUCH}/x", "$EMPTY/x", "relative"):
        assert main(words(tiny, tmp_path / "unset", *BACKGROUND, "--checkpoint.staging", place)) == 2
        dist.destroy_process_group()
    assert main(words(tiny, tmp_path / "front", *staged)) == 2


def test_a_good_checkpoint_is_written_though_the_run_fails(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that diverges while the last good checkpoint is under way."""
    write, step = saver.write_mine, Training.step

    def slow(folder: Path, tensors: Any) -> Any:
        if "step_00000004" in folder.name:
            time.sleep(2)
        return write(folder, tensors)

    def diverging(self: Training, number: int, total: int, groups: Any) -> Any:
        if number == 4:
            raise DivergedError("the training loss is nan")
        return step(self, number, total, groups)

    monkeypatch.setattr(saver, "write_mine", slow)
    monkeypatch.setattr(Training, "step", diverging)
    assert main(words(tiny, tmp_path, *BACKGROUND)) == 2
    dist.destroy_process_group()
    assert is_complete(tmp_path / "tiny/checkpoints/step_00000004")


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_killed_at_any_time(tiny: Path, tmp_path: Path, engine: str) -> None:
    """Two ranks that are killed in the middle, twice, end with the same bits as those that are left alone."""
    options = [*OPTIONS, "--engine", engine, "--checkpoint.every", "1"]
    train(tiny, tmp_path / "plain", *options)
    for at, staging in ((3, []), (7, ["--checkpoint.staging", str(tmp_path / "node")])):
        ranks = start(tiny, tmp_path / "killed", *options, *BACKGROUND, *staging)
        wanted = tmp_path / f"killed/tiny/checkpoints/.step_{at:08}.tmp"
        while all(p.poll() is None for p in ranks) and not wanted.is_dir():
            time.sleep(0.001)
        for p in ranks:
            p.kill()
        finish(ranks)
        assert not (tmp_path / "killed/tiny/summary.json").exists()
    train(tiny, tmp_path / "killed", *options, *BACKGROUND)
    assert checksum(tmp_path / "killed") == checksum(tmp_path / "plain")
    left = {path.name for path in (tmp_path / "killed/tiny/checkpoints").iterdir()}
    assert left == {path.name for path in (tmp_path / "plain/tiny/checkpoints").iterdir()}
