"""Loads the data of every task.

This file contains the reviews of drugs. Texts on codes are in `icd`, the MRI patches in `mri_region`, the user's data in
`user_task`.
"""

from __future__ import annotations

import csv
import html
import io
import random
import zipfile
from pathlib import Path

from ..config.schema import Config
from ..config.task import Task
from ..errors import DataError
from ..packages import drug_review_file
from .icd import icd10cm_chapter, icd10pcs_system
from .splits import Split, TaskData, draw_of
from .user_task import user_task


def load_task(config: Config) -> TaskData:
    """Loads and splits the data of a task.

    Raises:
        DataError: the data package is not installed, or its content is not what the task needs. For the user's data see
            `user_task`.
    """
    task = config.task
    if task.name == "own":
        return user_task(config)
    if task.name == "mri_region":
        from .mri_region import mri_region  # late: needs nibabel

        return mri_region(task)
    if task.name == "shoulder_exercise":
        from .shoulder_exercise import shoulder_exercise

        return shoulder_exercise(task)
    loaders = {"icd10cm_chapter": icd10cm_chapter, "icd10pcs_system": icd10pcs_system, "drug_review": _drug_review}
    return loaders[task.name](task)


def _drug_review(task: Task) -> TaskData:
    """Six hundred reviews and the package's own test split. A fifth of the training drugs is for validation."""
    names = ["negative", "neutral", "positive"]
    rows = {name: _reviews(drug_review_file(), f"drugsCom{name.title()}.tsv") for name in ("train", "test")}
    drugs = sorted({row["drugName"] for row in rows["train"]})
    random.Random(f"{task.split_seed}:drugs").shuffle(drugs)
    held_out = set(drugs[: round(0.2 * len(drugs))])
    parts = {
        "train": [row for row in rows["train"] if row["drugName"] not in held_out],
        "validation": [row for row in rows["train"] if row["drugName"] in held_out],
        "test": rows["test"],
    }
    sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    splits = {}
    for split, reviews in parts.items():
        random.Random(draw_of(task, split)).shuffle(reviews)
        chosen = [row for name in names for row in [r for r in reviews if r["rating"] == name][: sizes[split]]]
        texts = [html.unescape(row["review"]).strip('"') for row in chosen]
        splits[split] = Split(texts, [names.index(r["rating"]) for r in chosen], [r["drugName"] for r in chosen])
    return TaskData.of(
        names, splits, "Drugs of the test reviews occur in the training reviews too; 600 training reviews in all."
    )


def _reviews(archive: Path, member: str) -> list[dict[str, str]]:
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as raw:
            return list(csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}") from error
