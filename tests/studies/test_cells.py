"""What a study asks for, in the configurations of its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcft_dist.errors import ConfigError
from dcft_dist.studies.study import final_cells, load_study, make_config, tuning_cells

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
