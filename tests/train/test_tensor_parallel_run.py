"""A decoder in the trainer, split by its plan: the results of one process, files that anybody can go on from."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from dcft_dist import FundamentalSet
from dcft_dist.files import read_json, read_lines

from ..own import tiny_decoder
from ..processes import output_of
from .test_recipes import SMALL, instructions_7b, reports_bert

CONFIGS = Path(__file__).parents[2] / "configs"

OPTIONS = ["--train.precision", "fp32", "--train.epochs", "2", "--checkpoint.keep_last", "2", "--log_every", "1"]
PLACE = ("family", "on_set", "on_rest")
TOGETHER = ["--sharding.tensor_parallel", "2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SMALL, *instructions_7b(tmp_path_factory.mktemp("data")), *OPTIONS]


def trained(recipe: list[str], folder: Path, ranks: int, *words: str) -> dict[str, Any]:
    output_of("train", "instructions_7b.toml", *recipe, "--runs_dir", str(folder), "--name", "it", *words, ranks=ranks)
    summary: dict[str, Any] = read_json(folder / "it/summary.json")
    return summary


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_lines(folder / "it/metrics.jsonl") if "train/loss" in row]


def test_equals_one_process(recipe: list[str], tmp_path: Path) -> None:
    """On two ranks that compute together, and on two pairs; clipped, with warm-up, scores, and a predicted table."""
    one = trained(recipe, tmp_path / "one", 1, "--engine", "single")
    chosen = FundamentalSet.load(tmp_path / "one/it/fundamental.safetensors")
    for ranks in (2, 4):
        folder = tmp_path / str(ranks)
        found = trained(recipe, folder, ranks, *TOGETHER)
        assert found["ranks"] == ranks and found["num_selected"] == one["num_selected"]
        masks = FundamentalSet.load(folder / "it/fundamental.safetensors")
        assert masks.jaccard(chosen) > 0.999
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        for split in ("validation", "test"):
            assert found[split] == pytest.approx(one[split], rel=1e-3), split
        tokens = [
            [row["speed/tokens_per_s"] / row["speed/samples_per_s"] for row in read_lines(f / "it/speed.jsonl")]
            for f in (folder, tmp_path / "one")
        ]
        assert tokens[0] == pytest.approx(tokens[1], rel=0.2), "ranks that compute together count once"
        rows = [len(list(csv.DictReader((f / "it/predictions.csv").open()))) for f in (folder, tmp_path / "one")]
        assert rows[0] == rows[1] > 0, "each test example once"
    planes = []
    for ranks, folder in ((1, tmp_path / "one"), (2, tmp_path / "2")):
        output_of("interpolate", folder / "it", ranks=ranks)
        planes.append(
            {tuple(row[key] for key in PLACE): row["metrics"] for row in read_lines(folder / "it/interpolation/plane.jsonl")}
        )
    assert planes[0].keys() == planes[1].keys() and len(planes[0]) == 65
    for place, metrics in planes[0].items():
        assert planes[1][place]["loss"] == pytest.approx(metrics["loss"], rel=1e-3), place


def test_a_run_goes_on_without(recipe: list[str], tmp_path: Path) -> None:
    """Begun by two ranks together, ended by two that are not."""
    options = ["--checkpoint.every", "1", "--checkpoint.keep_last", "99"]
    expected = trained(recipe, tmp_path, 2, *TOGETHER, *options)
    run = tmp_path / "it"
    (run / "summary.json").unlink()
    kept, *later = sorted((run / "checkpoints").glob("step_*"))[2:]
    for folder in later:
        shutil.rmtree(folder)
    found = trained(recipe, tmp_path, 2, *options)
    assert read_lines(run / "attempts.jsonl")[1]["at"] == f"step {int(kept.name[5:])}"
    for split in ("validation", "test"):
        assert found[split] == pytest.approx(expected[split], rel=1e-3), split


def test_a_head_of_its_own(tmp_path: Path) -> None:
    """It is warmed up on what the split decoder gives it."""
    words = reports_bert(tmp_path)
    words[words.index("--model.weights") + 1] = str(tiny_decoder(tmp_path / "decoder"))
    text = (CONFIGS / "reports_bert.toml").read_text().replace("args = {add_pooling_layer = false}", "")
    (tmp_path / "decoder.toml").write_text(text.replace('unused = ["pooler.*", "cls.*"]', 'unused = ["lm_head.*"]'))
    words += [*SMALL, *OPTIONS]
    found = {}
    for ranks, more in ((1, ["--engine", "single"]), (4, ["--engine", "fsdp2", *TOGETHER])):
        runs = ["--runs_dir", str(tmp_path / str(ranks)), "--name", "it"]
        output_of("train", tmp_path / "decoder.toml", *words, *runs, *more, ranks=ranks)
        found[ranks] = read_json(tmp_path / f"{ranks}/it/summary.json")
    assert found[4]["test"] == pytest.approx(found[1]["test"], rel=1e-3)
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
