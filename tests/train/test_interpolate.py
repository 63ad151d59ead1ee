"""`dcft interpolate`: places between start and end of a finished run, chosen on validation data, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.files import read_json, read_lines
from dcft_dist.runs.folder import RunFolder
from dcft_dist.train.places import FAMILIES, candidates, places

from ..processes import output_of
from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]

# A high rate without the way back to epoch 0, so that the weights go somewhere.
OPTIONS = ["--engine", "fsdp2", "--removal.fractions", "[]", "--optimizer.lr", "0.003", "--train.fall_back", "false"]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items() if v.is_floating_point()
    }


def test_every_family_has_as_many_candidates() -> None:
    assert len(places()) == len(set(places())) == 65
    assert {family: len(set(candidates(family))) for family in FAMILIES} == dict.fromkeys(FAMILIES, 25)
    assert ("diagonal", 1.0, 1.0) in candidates("selected") and ("selected", 0.0, 1.0) in candidates("selected")


PULL = ["--optimizer.pull_to_start", "50", "--optimizer.pull_by_importance", "0.5"]


@pytest.mark.parametrize(("method", "more"), [("dcft", []), ("full", PULL)])
def test_a_run_is_interpolated(
    tiny: Path, tmp_path: Path, method: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By two ranks and, after an interruption, by one: the same places and numbers; the chosen model is exported."""
    train(tiny, tmp_path, *OPTIONS, "--method", method, *more)
    run = tmp_path / "tiny"
    before = read_json(run / "summary.json")
    output_of("interpolate", run, ranks=2)
    new = RunFolder(run / "interpolation")
    found: dict[str, Any] = read_json(new.summary)["interpolation"]
    rows = {(r["family"], r["on_set"], r["on_rest"]): r["metrics"] for r in read_lines(run / "interpolation/plane.jsonl")}
    assert set(rows) == set(places())
    assert rows["diagonal", 1.0, 1.0]["loss"] == pytest.approx(before["validation"]["loss"], rel=1e-5)
    assert rows["selected", 0.0, 1.0]["loss"] != rows["random", 0.0, 1.0]["loss"]
    metric = found["metric"]
    for family, row in found["families"].items():
        assert row["validation"][metric] == max(rows[place][metric] for place in candidates(family))
        assert set(row["test"]) == set(before["test"])
        assert (new.path / f"predictions_{family}.csv").is_file()
    assert read_json(run / "summary.json") == before, "the run itself stays as it is"

    start, end, chosen = (exported(f) for f in (run / "model", run / "model", run / "interpolation/model"))
    assert start.keys() >= chosen.keys() and all(chosen[name].shape == end[name].shape for name in chosen)
    head = [name for name in chosen if name.startswith("head") or name in ("weight", "bias")]
    assert all(torch.equal(chosen[name], end[name]) for name in head), "the head stays as trained"

    assert main(["verify", str(new.path)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(new.path)]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["metrics"]["loss"] == pytest.approx(found["families"]["selected"]["test"]["loss"], rel=1e-4)
    card = (new.model / "README.md").read_text()
    assert (
        "The two shares were chosen on validation data from 25 pairs." in card and "| one share for all (WiSE-FT) |" in card
    )
    assert "Interpolation by set" in (new.path / "report.html").read_text()

    plane = run / "interpolation/plane.jsonl"
    kept = plane.read_text().splitlines(keepends=True)[:40]
    plane.write_text("".join(kept))
    capsys.readouterr()
    assert main(["interpolate", str(run)]) == 0
    assert "| selected set |" in capsys.readouterr().out and len(read_lines(plane)) == 40, "a second time it changes nothing"
    new.summary.unlink()
    assert main(["interpolate", str(run)]) == 0
    table = capsys.readouterr().out
    assert "| selected set |" in table and "| as fine-tuned | 1 | 1 |" in table
    assert plane.read_text().splitlines(keepends=True)[:40] == kept, "what is known is not evaluated again"
    again = {(r["family"], r["on_set"], r["on_rest"]): r["metrics"] for r in read_lines(plane)}
    assert set(again) == set(places())
    for place, metrics in rows.items():
        assert again[place]["loss"] == pytest.approx(metrics["loss"], rel=1e-4), place


def test_what_cannot_be_interpolated(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single", "--removal.fractions", "[]"]
    said = {}
    for name, more in {"none": None, "probe": ["--method", "linear_probe"], "still": ["--train.epochs", "0"]}.items():
        assert more is None or main([*words, "--name", name, *more]) == 0
        assert main(["interpolate", str(tmp_path / name)]) == 2
        dist.destroy_process_group()
        said[name] = capsys.readouterr().err
    assert "contains no finished run" in said["none"]
    assert "a run with method = 'linear_probe' cannot be interpolated" in said["probe"]
    assert "its best epoch is 0" in said["still"]
