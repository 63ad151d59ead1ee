"""What a report says of the task, for a colleague who has not made the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcft_dist.config.toml import load_config
from dcft_dist.reports.about import classes_of, config_of, settings_of, task_of
from dcft_dist.reports.render import template

SUMMARY: dict[str, Any] = {
    "labels": {"names": ["benign", "malignant", "normal"]},
    "splits": {"train": [1300, 62], "validation": [30, 15], "test": [6, 3]},
}


def test_task_model_and_sizes_in_words(tmp_path: Path) -> None:
    config = load_config("mri.toml", ["--optimizer.lr", "2e-5"])
    assert task_of(SUMMARY, config) == (
        "Task: one of 3 classes (benign, malignant, normal). Model: dinov2_small. Examples: 1,300 to train, 30 to "
        "validate, 6 to test."
    )
    assert dict(settings_of(config))["learning rate"] == "2e-05"
    grouped = config.model_copy(update={"data": config.data.model_copy(update={"group_pattern": "^([^_]+)_"})})
    assert task_of(SUMMARY, grouped).endswith(
        "6 to test. Groups, of which none is in two splits: 62, 15, 3; a group is what ^([^_]+)_ finds in names of files."
    )
    by_column = config.model_copy(update={"data": config.data.model_copy(update={"group": "patient"})})
    assert task_of(SUMMARY, by_column).endswith("a group is the column patient.")
    masks = config.model_copy(update={"task": config.task.model_copy(update={"kind": "segmentation"})})
    assert dict(settings_of(masks))["unit of distances"].startswith("voxels")
    spaced = masks.model_copy(update={"data": masks.data.model_copy(update={"spacing": [1.0, 1.0, 3.0]})})
    assert dict(settings_of(spaced))["unit of distances"] == "millimetres"
    assert config_of(tmp_path) is None  # a report can do without
    assert task_of(SUMMARY, None).startswith("Examples: 1,300 to train") and settings_of(None) == []


def test_each_class_by_itself(tmp_path: Path) -> None:
    rows = ["group,label,predicted", "a,benign,benign", "a,benign,normal", "b,benign,normal", "b,benign,malignant"]
    (tmp_path / "predictions.csv").write_text("\n".join([*rows, "c,normal,normal", "c,normal,normal"]) + "\n")
    config = load_config("mri.toml")
    assert classes_of(tmp_path, SUMMARY, config) == [
        ("benign", 4, "0.250", "normal, 2"),
        ("malignant", 0, "-", ""),
        ("normal", 2, "1.000", ""),
    ]
    (tmp_path / "predictions.csv").write_text("\n".join([*rows[:3], "c,benign,malignant"]) + "\n")
    assert classes_of(tmp_path, SUMMARY, config)[0] == ("benign", 3, "0.333", "malignant or normal, 1 each")
    assert classes_of(tmp_path / "elsewhere", SUMMARY, config) == []


def test_what_limits_the_numbers_stands_beside_them() -> None:
    """The caveat is above the table of results, and a class without test examples is mentioned below its own."""
    summary = {"name": "mine", "caveat": "No groups were given.", "best_epoch": 1, "method": "dcft"}
    results = [("macro-averaged F1", "0.5", "0.5", "")]
    for number, mentioned in ((0, True), (4, False)):
        rows = [("rare", number, "-", ""), ("common", 9, "1.000", "")]
        page = template("report.html").render(
            summary=summary, results=results, classes=rows, few=5, often_missed=mentioned, reached=["It improved."]
        )
        assert ("task.class_weights" in page) == mentioned
        assert page.index("It improved.") < page.index("No groups were given.") < page.index("macro-averaged F1")
        assert ("Classes without test examples are not in the macro-averaged numbers" in page) == mentioned
