"""What a run was about, for a colleague who reads its report: task, model, data, settings, and each class by itself."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.toml import load_config
from ..errors import DcftError
from ..files import read_json_or

KINDS = {
    "single_label": "one of {n} classes",
    "multi_label": "{n} findings, each present or absent",
    "regression": "a number",
    "causal_lm": "answers to instructions",
    "segmentation": "one of {n} classes for each voxel",
}

_SPLITS = {"train": "train", "validation": "validate", "test": "test"}  # split: what its examples do

FEW = 5  # test examples of a class, below which its numbers say little


def config_of(run: Path) -> Config | None:
    """The configuration of a run; None if it cannot be read, since a report can do without."""
    try:
        return load_config(run / "config.toml")
    except (DcftError, OSError):
        return None


def rates_in_vain(run: Path, config: Config) -> list[float]:
    """Learning rates of the runs beside this one, on the same data, in which no epoch was better than the first.

    Args:
        run: the run directory.
        config: of the run.
    """
    rates = []
    for file in sorted(run.parent.glob("*/summary.json")):
        if file.parent == run or read_json_or(file, {}, "best_epoch").get("best_epoch") != 0:
            continue
        other = config_of(file.parent)
        if other and all(getattr(other, key) == getattr(config, key) for key in ("method", "data", "task", "model")):
            rates.append(other.optimizer.lr)
    return rates


def task_of(summary: dict[str, Any], config: Config | None) -> str:
    """Task, classes, model and sizes of the splits in one paragraph.

    Args:
        summary: of the run, the content of its `summary.json`.
        config: of the run.
    """
    texts = []
    if config is not None:
        names = summary["labels"]["names"]
        texts.append(f"Task: {KINDS[config.task.kind].format(n=len(names))}")
        if config.task.kind != "causal_lm":
            texts[-1] += f" ({', '.join(names)})"
        texts.append(f"Model: {base_of(config)}")
    sizes = [f"{number:,} to {verb}" for verb, number in _sizes(summary)]
    texts.append(f"Examples: {', '.join(sizes)}")
    if config is not None and (config.data.group_pattern or config.data.group):
        pattern = config.data.group_pattern
        source = f"what {pattern} finds in names of files" if pattern else f"the column {config.data.group}"
        groups = ", ".join(f"{summary['splits'][name][1]:,}" for name in _SPLITS if name in summary["splits"])
        texts.append(f"Groups, of which none is in two splits: {groups}; a group is {source}")
    return ". ".join(texts) + "."


def base_of(config: Config) -> str:
    """Name of the pre-trained model: its weights, its class, or its short name."""
    return str(config.model.weights or config.model.build or config.model.name)


def _sizes(summary: dict[str, Any]) -> list[tuple[str, int]]:
    return [(verb, summary["splits"][name][0]) for name, verb in _SPLITS.items() if name in summary["splits"]]


def settings_of(config: Config | None) -> list[tuple[str, str]]:
    """The settings that one asks for first, as rows of a table."""
    if config is None:
        return []
    train = config.train
    unit = "millimetres" if config.data.spacing else "voxels: data.spacing is not given"
    return [
        ("model", base_of(config)),
        ("learning rate", f"{config.optimizer.lr:g}"),
        ("training", f"{train.epochs} epochs, {train.global_batch} examples a step, data.augment = {config.data.augment}"),
        *([("unit of distances", unit)] if config.task.kind == "segmentation" else []),
    ]


def classes_of(run: Path, summary: dict[str, Any], config: Config | None) -> list[tuple[str, int, str, str]]:
    """Each class by itself: (name, test examples, share that is right, most frequent mistake). Empty without a test.

    Args:
        run: the run directory.
        summary: of the run.
        config: of the run.
    """
    file, names = run / "predictions.csv", summary["labels"]["names"]
    if config is None or config.task.kind != "single_label" or not file.is_file():
        return []
    with file.open(newline="") as lines:
        pairs = [(row["label"], row["predicted"]) for row in csv.DictReader(lines)]
    found = []
    for name in names:
        said = Counter(predicted for label, predicted in pairs if label == name)
        number, right = said.total(), said.pop(name, 0)
        most = max(said.values(), default=0)
        others = [other for other in names if said[other] == most]
        taken_for = f"{' or '.join(others)}, {most}{' each' if len(others) > 1 else ''}" if most else ""
        found.append((name, number, f"{right / number:.3f}" if number else "-", taken_for))
    return found if any(number for _, number, *_ in found) else []
