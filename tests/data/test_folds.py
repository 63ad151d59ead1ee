"""Folds of a cross-validation: every example validates once, groups stay whole, and the test data do not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dcft_dist.config.toml import load_config
from dcft_dist.data.splits import TaskData
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError, DataError

from .tables import table


def task_of(folder: Path, *words: str) -> TaskData:
    rows = [{"input": f"text {i}", "label": "ab"[i % 2], "patient": f"p{i // 3 if i < 60 else 20}"} for i in range(70)]
    base = [
        "--data.path",
        str(table(folder, rows)),
        "--task.name",
        "own",
        "--data.modality",
        "text",
        "--data.group",
        "patient",
    ]
    return user_task(load_config("icd.toml", [*base, *words]))


def test_every_example_validates_once(tmp_path: Path) -> None:
    plain = task_of(tmp_path)
    folds = [task_of(tmp_path, "--data.folds", "4", "--data.fold", str(fold)) for fold in range(4)]
    validated = Counter(text for task in folds for text in task.validation.inputs)
    assert set(validated.values()) == {1} and sorted(validated) == sorted([*plain.train.inputs, *plain.validation.inputs])
    for task in folds:
        assert task.test.inputs == plain.test.inputs
        assert not set(task.train.groups) & set(task.validation.groups)
        assert sorted([*task.train.inputs, *task.validation.inputs]) == sorted(validated)
    sizes = [len(task.validation) for task in folds]
    assert max(sizes) - min(sizes) <= 10, sizes  # the largest group has ten
    other = task_of(tmp_path, "--data.folds", "4", "--task.split_seed", "7")
    assert other.validation.inputs != folds[0].validation.inputs


def test_folds_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.folds is 90, but training and validation data have only \d+ groups"):
        task_of(tmp_path, "--data.folds", "90")
    for words, said in {
        ("--data.folds", "1"): "folds must be at least 2",
        ("--data.folds", "3", "--data.fold", "3"): "fold = 3: the folds are counted from 0, and there are 3",
    }.items():
        with pytest.raises(ConfigError, match=said):
            task_of(tmp_path, *words)
    with pytest.raises(ConfigError, match=r"data.folds are for task.name = 'own'"):
        load_config("icd.toml", ["--data.folds", "3"])
