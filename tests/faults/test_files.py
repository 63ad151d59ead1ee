"""Every file of a run, cut, altered, emptied or swapped: named, or made again, or harmless. Never another result."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcft_dist.cli import main
from dcft_dist.files import read_json, write_json
from dcft_dist.runs.folder import RunFolder
from dcft_dist.runs.writer import RunWriter
from dcft_dist.train.fine_tune import Trainer

from ..processes import dcft, finish
from ..train.test_run import encoder, start, tiny, train, wait_for_phase, write_tiny
from .harness import DAMAGES, damage, progress, same_result

__all__ = ["encoder", "tiny"]

KEEP = ("--engine", "single", "--checkpoint.keep_last", "2", "--checkpoint.keep_best", "2")

# Files of a run that was stopped in its second epoch. In CI each has one of the damages, in turn.
FILES = (
    "config.toml", "progress.json", "attempts.jsonl", "metrics.jsonl", "facts.json", "removal.json", "head.safetensors",
    "fundamental.safetensors", "newest/state.json", "newest/manifest.json", "newest/weights", "older/manifest.json",
    "older/weights", "best/state.json", "best/manifest.json", "best/weights",
)  # fmt: skip


@pytest.fixture(scope="session")
def runs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was stopped at a step after its first epoch, one with another seed, and the summary without a stop."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_tiny(folder, encoder)
    summary = train(config, folder / "whole", *KEEP, ranks=1)
    for name, more in (("stopped", ()), ("other", ("--seed", "1"))):
        processes = start(config, folder / name, *KEEP, *more, ranks=1)
        while not (folder / name / "tiny/checkpoints/step_00000006").exists() and processes[0].poll() is None:
            wait_for_phase(folder / name / "tiny", "train", processes)
        processes[0].send_signal(signal.SIGUSR1)
        assert finish(processes)[0][0] == 0
        assert progress(folder / name / "tiny")["phase"] == "stopped", "it was too fast to be stopped"
    return {"config": config, "folder": folder, "summary": summary}


def place_of(run: Path, name: str) -> Path:
    """The file that a name of `FILES` means in a run."""
    kind, _, file = name.partition("/")
    if not file:
        return run / name
    folder = RunFolder(run)
    steps = folder.steps("best" if kind == "best" else "step")
    place = folder.checkpoint(steps[-2 if kind == "older" else -1], "best" if kind == "best" else "step")
    return next(place.glob("*.safetensors")) if file == "weights" else place / file


def copied(runs: dict[str, Any], target: Path) -> Path:
    shutil.copytree(runs["folder"] / "stopped/tiny", target / "tiny")
    return target / "tiny"


def resumed(runs: dict[str, Any], target: Path, *words: str) -> tuple[int, str]:
    done = dcft("train", runs["config"], "--runs_dir", target, *KEEP, *words)
    return done.returncode, done.stderr


def check_file(name: str, how: str, runs: dict[str, Any], target: Path) -> None:
    run = copied(runs, target)
    damage(place_of(run, name), how, place_of(runs["folder"] / "other/tiny", name))
    if name not in ("attempts.jsonl", "progress.json", "metrics.jsonl") or how == "flipped":
        assert main(["verify", str(run)]) == 1 or how == "swapped", "dcft verify sees it"
    assert main(["status", str(run)]) == 0
    code, said = resumed(runs, target)
    assert "Traceback" not in said
    if code == 0:
        found = read_json(run / "summary.json")
        stands_in = name.startswith("best/") and any("was the best, but " in text for text in found["changes"])
        assert stands_in or same_result(found, runs["summary"]), (name, how)
        return
    line = said.strip().splitlines()[-1]
    of_another = name in ("config.toml", "facts.json") and ("holds a run with another" in line or "was begun with" in line)
    assert code == 2 and line.startswith("dcft: error: ")
    assert of_another or Path(name).parts[0].removesuffix(".safetensors") in line, said


@pytest.mark.parametrize(("name", "how"), [(name, DAMAGES[i % 4]) for i, name in enumerate(FILES)])
def test_a_damaged_file(name: str, how: str, runs: dict[str, Any], tmp_path: Path) -> None:
    check_file(name, how, runs, tmp_path)


@pytest.mark.parametrize("name", ["head.safetensors", "fundamental.safetensors"])
def test_a_file_of_another_run(name: str, runs: dict[str, Any], tmp_path: Path) -> None:
    """It is whole, and has the right names and shapes."""
    run = copied(runs, tmp_path)
    shutil.copyfile(runs["folder"] / "other/tiny" / name, run / name)
    code, said = resumed(runs, tmp_path)
    assert code == 2 and f"{name} is not the file that this run made" in said


def test_a_damaged_newest_checkpoint_is_passed_over(runs: dict[str, Any], tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    damage(place_of(run, "newest/weights"), "flipped")
    code, said = resumed(runs, tmp_path)
    assert code == 0 and "was altered after it was written: the run goes on from an older checkpoint" in said
    assert same_result(read_json(run / "summary.json"), runs["summary"])


def test_only_complete_checkpoints_count_among_the_last(runs: dict[str, Any], tmp_path: Path) -> None:
    """Two are to be kept; one that is cut off is not one of them."""
    writer = RunWriter(copied(runs, tmp_path))
    newest, older = (place_of(writer.path, f"{kind}/state.json").parent for kind in ("newest", "older"))
    last = RunFolder(writer.path).steps()[-1]
    for step in (last + 1, last + 2):  # the first of them is cut off
        shutil.copytree(newest, writer.checkpoint(step))
        manifest = read_json(newest / "manifest.json")
        write_json(writer.checkpoint(step) / "manifest.json", manifest | {"name": writer.checkpoint(step).name})
    damage(next(writer.checkpoint(last + 1).glob("*.safetensors")), "cut")
    trainer: Any = SimpleNamespace(writer=writer)
    Trainer._remove_old(trainer, "step", last + 2, 2)
    assert writer.steps() == [last, last + 2] and older not in writer.checkpoints.iterdir()


def test_no_checkpoint_is_left(runs: dict[str, Any], tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    for name in ("newest/weights", "older/weights"):
        damage(place_of(run, name), "cut")
    code, said = resumed(runs, tmp_path)
    assert code == 2 and "no checkpoint is whole: " in said and "or delete" in said
    shutil.rmtree(run / "checkpoints")  # the advice
    code, said = resumed(runs, tmp_path)
    assert code == 0 and same_result(read_json(run / "summary.json"), runs["summary"])


def test_a_manifest_that_lists_nothing(runs: dict[str, Any], tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    for name in ("newest/manifest.json", "older/manifest.json"):
        place_of(run, name).write_text("{}")
    code, said = resumed(runs, tmp_path)
    assert code == 2 and "it does not list the files" in said


def test_a_file_of_weights_that_was_added(runs: dict[str, Any], tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    weights = place_of(run, "newest/weights")
    shutil.copyfile(place_of(run, "older/weights"), weights.with_name("shard-00009-model-00001-of-00001.safetensors"))
    code, said = resumed(runs, tmp_path)
    assert code == 0 and "was added after the checkpoint was written" in said
    assert same_result(read_json(run / "summary.json"), runs["summary"])


@pytest.mark.parametrize("words", [["--optimizer.lr", "1e-5"], ["--seed", "1"]])
def test_checkpoints_of_another_run(words: list[str], runs: dict[str, Any], tmp_path: Path) -> None:
    """Copied into a folder that was begun with other settings, and has the right `config.toml`."""
    run = copied(runs, tmp_path)
    (run / "config.toml").unlink()
    (run / "facts.json").unlink()
    code, said = resumed(runs, tmp_path, *words)
    key = words[0].removeprefix("--")
    assert code == 2 and f"belongs to another run: it was saved with {key} = " in said, said


def test_a_checkpoint_under_another_name(runs: dict[str, Any], tmp_path: Path) -> None:
    run = copied(runs, tmp_path)
    newest, older = (place_of(run, f"{kind}/state.json").parent for kind in ("newest", "older"))
    shutil.rmtree(newest)
    older.rename(newest)
    code, said = resumed(runs, tmp_path)
    assert code == 2 and f"is the checkpoint {older.name} under another name" in said


def test_checkpoints_of_the_version_before(runs: dict[str, Any], tmp_path: Path) -> None:
    """They have a list of checksums alone: read with a warning, and replaced by the next save."""
    run = copied(runs, tmp_path)
    for file in (run / "checkpoints").glob("*/manifest.json"):
        entries = json.loads(file.read_text())["files"]
        file.write_text(json.dumps({name: entry["sha256"] for name, entry in entries.items()}))
    code, said = resumed(runs, tmp_path)
    assert code == 0 and "is from an older version: it does not say which run it belongs to" in said
    assert same_result(read_json(run / "summary.json"), runs["summary"])
    assert json.loads(next((run / "checkpoints").glob("step_00000010/manifest.json")).read_text())["format"] == 3


def test_a_damaged_best_checkpoint(runs: dict[str, Any], tmp_path: Path) -> None:
    """The best other validated epoch stands in for it, and the summary says so; without any, the run says what is lost."""
    shutil.copytree(runs["folder"] / "whole/tiny", tmp_path / "tiny")
    run, summary = tmp_path / "tiny", runs["summary"]
    (run / "summary.json").unlink()
    best = next(
        f for f in (run / "checkpoints").glob("best_*") if read_json(f / "state.json")["epoch"] == summary["best_epoch"]
    )
    damage(next(best.glob("*.safetensors")), "flipped")
    code, said = resumed(runs, tmp_path)
    assert code == 0, said
    found = read_json(run / "summary.json")
    assert found["best_epoch"] != summary["best_epoch"]
    assert f"epoch {summary['best_epoch']} was the best, but " in found["changes"][-1]
    (run / "summary.json").unlink()
    for file in (run / "checkpoints").glob("*/*.safetensors"):
        if "step_00000010" not in str(file):
            damage(file, "cut")
    state = run / "checkpoints/step_00000010/state.json"
    content = read_json(state)
    content.pop("validation")
    write_json(state, content)
    manifest = read_json(state.with_name("manifest.json"))
    from dcft_dist.files import sha256_of

    manifest["files"]["state.json"] = {"size": state.stat().st_size, "sha256": sha256_of(state)}
    write_json(state.with_name("manifest.json"), manifest)
    code, said = resumed(runs, tmp_path)
    assert code == 2 and "no other validated checkpoint is left: restore it, or delete" in said, said


def test_a_best_checkpoint_of_another_run(runs: dict[str, Any], tmp_path: Path) -> None:
    """It is whole, and its weights would be tested under this run's name."""
    shutil.copytree(runs["folder"] / "whole/tiny", tmp_path / "tiny")
    run, theirs = tmp_path / "tiny", runs["folder"] / "other/tiny/checkpoints"
    (run / "summary.json").unlink()
    for best in (run / "checkpoints").glob("best_*"):
        shutil.rmtree(best)
        shutil.copytree(next(theirs.glob("best_*")), best)
        manifest = read_json(best / "manifest.json")
        write_json(best / "manifest.json", manifest | {"name": best.name})
    code, said = resumed(runs, tmp_path)
    assert code == 2 and "belongs to another run: it was saved with seed = 1" in said, said


def test_a_start_that_ends_while_it_replaces_a_checkpoint(runs: dict[str, Any], tmp_path: Path) -> None:
    """The former one lies aside, and is brought back."""
    run = copied(runs, tmp_path)
    for step in RunFolder(run).steps()[:-1]:
        shutil.rmtree(RunFolder(run).checkpoint(step))
    newest = RunFolder(run).checkpoint(RunFolder(run).steps()[-1])
    newest.rename(newest.with_name(f".{newest.name}.aside"))
    code, said = resumed(runs, tmp_path)
    assert code == 0 and "going on from step" in said
    assert same_result(read_json(run / "summary.json"), runs["summary"])
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_folder_that_was_moved(runs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(runs["folder"] / "stopped/tiny", tmp_path / "elsewhere/renamed")
    done = dcft("train", runs["config"], "--runs_dir", tmp_path / "elsewhere", "--name", "renamed", *KEEP)
    assert done.returncode == 0, done.stderr
    assert same_result(read_json(tmp_path / "elsewhere/renamed/summary.json"), runs["summary"])


def test_a_name_that_a_run_has_taken_that_never_computed_anything(tiny: Path, tmp_path: Path) -> None:
    bad = dcft("train", tiny, "--runs_dir", tmp_path, "--engine", "single", "--task.train_per_class", "1")
    assert bad.returncode == 2 and (tmp_path / "tiny/config.toml").exists(), bad.stderr
    summary = train(tiny, tmp_path, "--engine", "single", ranks=1)
    assert summary["best_epoch"] is not None


def test_a_damaged_summary_is_made_again(runs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(runs["folder"] / "whole/tiny", tmp_path / "tiny")
    for content in (b"{}", b"", b'{"name": 3'):
        (tmp_path / "tiny/summary.json").write_bytes(content)
        assert main(["report", str(tmp_path / "tiny")]) == 2 and main(["table", str(tmp_path / "tiny")]) == 2
        assert dcft("evaluate", tmp_path / "tiny").returncode == 2
    (tmp_path / "tiny/model/README.md").write_text("what a person wrote")
    code, said = resumed(runs, tmp_path)
    assert code == 0 and "summary.json is damaged: it is made again from the checkpoints" in said
    assert same_result(read_json(tmp_path / "tiny/summary.json"), runs["summary"])
    (tmp_path / "tiny/model/README.md").write_text("what a person wrote")
    assert resumed(runs, tmp_path)[0] == 0 and "a person" in (tmp_path / "tiny/model/README.md").read_text()
    assert main(["verify", str(tmp_path / "tiny")]) == 0


@pytest.mark.parametrize(
    "name",
    ["config.toml", "predictions.csv", "metrics.jsonl", "model/model.safetensors", "model/config.json", "head.safetensors"],
)
def test_a_finished_run_with_another_file(name: str, runs: dict[str, Any], tmp_path: Path) -> None:
    """Each byte of it is the run's own, or `verify`, `evaluate` and `predict` say which file is not."""
    shutil.copytree(runs["folder"] / "whole/tiny", tmp_path / "tiny")
    assert main(["verify", str(tmp_path / "tiny")]) == 0
    damage(tmp_path / "tiny" / name, "flipped")
    assert main(["verify", str(tmp_path / "tiny")]) == 1
    if name == "config.toml" or name.startswith("model/"):
        done = dcft("evaluate", tmp_path / "tiny")
        assert done.returncode == 2 and Path(name).name in done.stderr and "Traceback" not in done.stderr
