"""Labelled examples in three splits, as every task gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.task import Task

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Inputs (a list of texts, or a uint8 array [size, height, width] of grey images), labels, and groups.

    Labels are class indices, or as the task's objective has them.

    A group holds examples that are alike: codes of one category, reviews of one drug, patches of one place.
    """

    inputs: Any
    labels: list[Any]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """A task: class names, three splits (training and validation share no group), a checksum, and what the task is not."""

    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    checksum: str
    caveat: str

    @classmethod
    def of(cls, class_names: list[str], splits: Mapping[str, Split], caveat: str) -> TaskData:
        """With the checksum of all inputs and labels."""
        facts = [(name, _plain(splits[name].inputs), _plain(splits[name].labels)) for name in sorted(splits)]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        return cls(class_names, splits["train"], splits["validation"], splits["test"], digest, caveat)


def places_of(splits: Sequence[Split]) -> list[tuple[str, Any]]:
    """(what to call it in an error, input) of every example of the three splits, or of one."""
    names = SPLITS if len(splits) == len(SPLITS) else ("",)
    found = zip(names, splits, strict=True)
    return [(f"{name} example {i}".strip(), x) for name, split in found for i, x in enumerate(split.inputs)]


def name_of(place: Any, otherwise: str) -> str:
    """What an input is called: its file, or the first of its files; a text by itself."""
    first = place[0] if isinstance(place, tuple) else place
    return str(first) if isinstance(first, str | Path) else otherwise


def draw_of(task: Task, split: str) -> str:
    """Seed of the draw of a split's examples."""
    again = split == "train" and task.sample_seed is not None
    return f"sample:{task.sample_seed}" if again else f"{task.split_seed}:{split}"


def _plain(inputs: Any) -> Any:
    """What the checksum is made of: texts, bytes of arrays, names and sizes of files."""
    if isinstance(inputs, np.ndarray):
        return hashlib.sha256(inputs.tobytes()).hexdigest()
    if isinstance(inputs, list | tuple):
        return [_plain(value) for value in inputs]
    return (inputs.name, inputs.stat().st_size) if isinstance(inputs, Path) else inputs
