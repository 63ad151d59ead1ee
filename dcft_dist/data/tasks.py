"""Loads the data of every task.

This file contains the two text tasks, on real data that installs as a package. The MRI patches are in `mri_region`, the
user's data in `user_task`.
"""

from __future__ import annotations

import csv
import html
import io
import random
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from ..config.schema import Config
from ..config.task import Task
from ..errors import DataError
from ..packages import drug_review_file, icd_file
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
    return {"icd10cm_chapter": _icd10cm_chapter, "drug_review": _drug_review}[task.name](task)


def _icd10cm_chapter(task: Task) -> TaskData:
    """Predicts the chapter of a code from its description, in the ICD-10-CM tabular list (US public domain).

    Whole categories are held out.
    """
    root = _tabular_list(icd_file())
    names: list[str] = []
    splits = {"train": Split([], [], []), "validation": Split([], [], []), "test": Split([], [], [])}
    sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
    for chapter in root.findall("chapter"):
        number, title = chapter.findtext("name", ""), chapter.findtext("desc", "")
        if number == "22":  # codes for special purposes, only five
            continue
        draw = random.Random(f"{task.split_seed}:{number}")
        for split, texts in _held_out(chapter, draw).items():
            if split == "train" and task.sample_seed is not None:
                texts = _reordered(texts, random.Random(f"sample:{task.sample_seed}:{number}"))
            chosen = texts[: sizes[split]]
            splits[split].inputs.extend(text for text, _ in chosen)
            splits[split].groups.extend(group for _, group in chosen)
            splits[split].labels.extend([len(names)] * len(chosen))
        names.append(title)
    if len(names) != 21 or not all(splits.values()):
        raise DataError(f"{icd_file()} has {len(names)} chapters besides 22, not 21")
    return TaskData.of(names, splits, "It classifies the descriptions of codes, not patient notes.")


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


@lru_cache(1)
def _tabular_list(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _held_out(chapter: ElementTree.Element, draw: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Returns (description, category) of every code by split.

    75 % of the categories are for training, 10 % for validation, 15 % for testing. Each category contributes one text before
    any contributes a second one. So a few large categories do not dominate.
    """
    by_category: dict[str, list[str]] = defaultdict(list)
    for code in chapter.iter("diag"):
        by_category[code.findtext("name", "")[:3]].append(code.findtext("desc", ""))
    categories = sorted(by_category)
    draw.shuffle(categories)
    for category in categories:
        draw.shuffle(by_category[category])
    first, second = round(0.75 * len(categories)), round(0.85 * len(categories))
    parts = {"train": categories[:first], "validation": categories[first:second], "test": categories[second:]}
    return {split: _in_turns(part, by_category) for split, part in parts.items()}


def _reordered(texts: list[tuple[str, str]], draw: random.Random) -> list[tuple[str, str]]:
    """Returns the same texts in another order, still one of each category before any second one."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for text, category in texts:
        by_category[category].append(text)
    categories = sorted(by_category)
    draw.shuffle(categories)
    for category in categories:
        draw.shuffle(by_category[category])
    return _in_turns(categories, by_category)


def _in_turns(categories: list[str], texts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Returns (text, category) of one text of each category, then of a second one, and so on."""
    rounds = max(len(texts[c]) for c in categories)
    return [(texts[c][i], c) for i in range(rounds) for c in categories if i < len(texts[c])]
