"""Cells of a study: what it asks for in their configurations, and cells that are run again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dcft_dist.errors import ConfigError
from dcft_dist.files import write_json
from dcft_dist.studies.study import final_cells, load_study, make_config, tuning_cells

from ..processes import COMMAND, dcft
from .test_study import SMALL, write


def test_a_study_may_set_tables_in_lists(tmp_path: Path) -> None:
    groups = '[common]\noptimizer.groups = [{pattern = "head", lr_scale = 0.5}]\n[settings.small]'
    study = load_study(write(tmp_path / "s.toml", SMALL.replace("[settings.small]", groups)))
    config = make_config(study, next(iter(tuning_cells(study))), tmp_path)
    assert [(group.pattern, group.lr_scale) for group in config.optimizer.groups] == [("head", 0.5)]


def test_each_seed_of_a_study_has_a_fold(tmp_path: Path) -> None:
    text = (
        SMALL.replace("resample = true", "folds = 2")
        .replace("smoke.toml", "medmnist.toml")
        .replace("task.train_per_class = 8", "")
    )
    study = load_study(write(tmp_path / "s.toml", text), ["--data.path", "x"])
    cells = list(final_cells(study, {("small", "full"): (("optimizer.lr", 1e-4),), ("small", "dcft"): ()}))
    found = {cell.seed: make_config(study, cell, tmp_path).data for cell in cells}
    assert {seed: (data.folds, data.fold) for seed, data in found.items()} == {0: (2, 0), 1: (2, 1)}
    with pytest.raises(ConfigError, match="seeds do not have each of the 3 folds equally often"):
        load_study(write(tmp_path / "t.toml", text.replace("folds = 2", "folds = 3")), ["--data.path", "x"])
    with pytest.raises(ConfigError, match=r"data.fold would have no effect: folds of the study sets them"):
        load_study(write(tmp_path / "t.toml", text.replace('method = "full"', 'method = "full"\ndata.fold = 1')))
    with pytest.raises(ConfigError, match="folds: Input should be greater than or equal to 2"):
        load_study(write(tmp_path / "t.toml", text.replace("folds = 2", "folds = 1")))


def test_running_cells_again(small_base: Path, tmp_path: Path) -> None:
    """Of a study of development seeds that is not finished, too; a cell that comes out otherwise is named."""
    text = SMALL.replace("[10, 11]", "[10]").replace("seeds = [0, 1]\n", "").partition("[arms.dcft]")[0]
    study = write(tmp_path / "s.toml", text.replace('"smoke.toml"', f'"{small_base}"'))
    folder = tmp_path / "small"
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([*COMMAND, "compare", study, "--folder", folder], env=plain, check=True, timeout=200)
    kept, lost = sorted((folder / "cells").iterdir())
    lost.unlink()
    result = json.loads(kept.read_text())
    assert result["summary"]["machine"]["threads"] == 1  # unless the environment says another number
    result["summary"]["machine"]["threads"] = 3
    del result["train_loss"]  # as in a result of a version that did not keep it
    write_json(kept, result)
    again = dcft("compare", study, "--folder", folder, "--again", "1")
    assert again.returncode == 0 and "every cell has the same results, to the last digit" in again.stdout
    assert "DIFFERENT" not in again.stdout + again.stderr
    assert f"{kept.stem} was run on" in again.stderr and "'threads': 3}, this is" in again.stderr
    assert sum(result["prepared_seconds"].values()) > 0
    last, was = len(result["epochs"]) - 1, result["epochs"][-1]["validation/loss"]
    result["epochs"][-1]["validation/loss"] += 1e-7
    write_json(kept, result)
    again = dcft("compare", study, "--folder", folder, "--again", "1")
    assert again.returncode == 0
    assert "1 of 1 cells differ by rounding: accuracy identical, losses within " in again.stdout
    assert "e-0" in again.stdout and f"{kept.stem}: the same but for rounding" in again.stderr
    result["epochs"][-1]["validation/loss"] = was + 1e-3
    write_json(kept, result)
    again = dcft("compare", study, "--folder", folder, "--again", "1")
    assert again.returncode == 1 and again.stdout.endswith(
        f"\n{kept.stem}: epoch {last}, validation/loss: {was + 1e-3} before, {was} now\n"
    )
