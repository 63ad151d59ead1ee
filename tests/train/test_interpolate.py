"""`dcft interpolate`: places between start and end of a finished run, chosen on validation data, on any number of ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.data.batches import order
from dcft_dist.files import objects_in, read_json, read_lines
from dcft_dist.reports.interpolation import interpolation_table, plane_picture
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
    runs = {"none": None, "probe": ["--method", "linear_probe"], "still": ["--train.epochs", "0"]}
    for name, more in {**runs, "kept": ["--checkpoint.keep_last", "0"]}.items():
        assert more is None or main([*words, "--name", name, *more]) == 0
        assert main(["interpolate", str(tmp_path / name)]) == 2
        dist.destroy_process_group()
        said[name] = capsys.readouterr().err
    assert "does not exist" in said["none"]
    assert "a run with method = 'linear_probe' cannot be interpolated" in said["probe"]
    assert "its best epoch is 0" in said["still"]
    assert "or the run had checkpoint.keep_last = 0" in said["kept"]


NORMALISED = """
import torch
from torch import nn

def rows():
    def part(n, o):
        return [{"case": f"{(i*37%90)/90} {(i*11%7)/7}", "label": str(int((i*37%90)>45)), "patient": o+i} for i in range(n)]
    return {"train": part(65, 0), "validation": part(40, 1000), "test": part(40, 2000)}

def collate(cases):
    values = torch.tensor([[float(x) for x in case.split()] for case in cases])
    return {"ages": values[:, 0], "doses": values[:, 1]}

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.last = nn.Linear(16, outputs)

    def forward(self, ages, doses):
        return self.last(self.body(torch.stack([ages, doses], 1)))
"""
CONFIG = """
name = "bn"
method = "full"
engine = "single"
private = true
runs_dir = "{folder}"
import_roots = ["{folder}"]
model = {{build = "normalised.Net", args = {{outputs = "num_outputs"}}, head = ["last"]}}
task.name = "own"
data = {{format = "python", build = "normalised.rows", input = "case", group = "patient", modality = "own"}}
importance = {{num_samples = 32, score_batch = 16}}
train = {{epochs = 2, global_batch = 16, fall_back = false, evaluation_batch = 64}}
optimizer.lr = 1e-2
removal.fractions = []
test_resamples = 0
"""


def test_batch_normalisation_of_private_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are taken again, in training batches: 65 examples would leave a batch of one. Nobody else can read it."""
    (tmp_path / "normalised.py").write_text(NORMALISED)
    text = CONFIG.format(folder=tmp_path).replace('modality = "own"', 'modality = "own", collate = "normalised.collate"')
    (tmp_path / "bn.toml").write_text(text)
    monkeypatch.setattr(
        "dcft_dist.train.interpolate._rank", lambda run, metrics, place: -place[1] - place[2]
    )  # back to the start
    umask = os.umask(0o022)
    try:
        assert main(["train", str(tmp_path / "bn.toml")]) == 0
        run, new = tmp_path / "bn", RunFolder(tmp_path / "bn/interpolation")
        os.umask(0o022)
        assert main(["interpolate", str(run)]) == 0
        files = [file for file in new.path.rglob("*") if file.is_file()]
        assert len(files) > 8 and not any(file.stat().st_mode & 0o077 for file in files)
    finally:
        os.umask(umask)
    rows = {(r["family"], r["on_set"], r["on_rest"]): r["metrics"] for r in read_lines(new.plane)}
    assert len({metrics["loss"] for metrics in rows.values()}) > 50
    chosen = load_file(next(new.model.rglob("model.safetensors")))
    shares = read_json(new.summary)["interpolation"]["families"]["selected"]
    assert (shares["on_set"], shares["on_rest"]) == (0.0, 0.0)
    module = sys.modules["normalised"]
    cases = [module.rows()["train"][i]["case"] for i in order(0, 0, 65)[:64]]  # the steps of an epoch leave one out
    inputs = torch.stack(list(module.collate(cases).values()), 1)
    before = inputs @ chosen["body.0.weight"].T + chosen["body.0.bias"]
    torch.testing.assert_close(chosen["body.1.running_mean"], before.mean(0), rtol=1e-4, atol=1e-5)

    # A plane that is damaged, and a folder that was moved while it was not finished.
    kept = new.plane.read_text().splitlines(keepends=True)
    odd = ["5\n", "{}\n", '{"family": [1], "on_set": 0, "on_rest": 0, "metrics": {}}\n', "not JSON\n"]
    new.plane.write_text("".join([*kept[:20], *odd, *kept[20:40]]))
    new.summary.unlink()
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    assert main(["interpolate", str(moved)]) == 0
    again = objects_in(moved / "interpolation/plane.jsonl", "family", "on_set")
    assert {(r["family"], r["on_set"], r["on_rest"]) for r in again if r["family"] != [1]} == set(places())
    (moved / "interpolation/plane.jsonl").write_text("")
    assert main(["interpolate", str(moved)]) == 0 and main(["verify", str(moved / "interpolation")]) == 1
    assert "plane.jsonl is missing, or is not the file that the run wrote" in capsys.readouterr().out


def test_a_table_without_a_metric() -> None:
    """Data of another hospital may have one class alone."""
    there = {"on_set": 0.0, "on_rest": 1.0, "validation": {"auroc": 0.9, "loss": 1.0}, "test": {"auroc": 0.8, "loss": 1.1}}
    there["external"] = {"site_b": {"test": {"loss": 2.0}}}
    found = {"metric": "auroc", "families": dict.fromkeys(FAMILIES, there), "end": there}
    assert "| 0.9 | 0.8 | 1.1 |  |" in interpolation_table(found)
    assert plane_picture([], found).axes
