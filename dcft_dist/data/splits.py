"""Labelled examples in three splits: the common form of every task's data."""

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
    """The examples of one split.

    Attributes:
        inputs: what the task's processor takes. A list of texts, paths, tuples of paths (channels) or arrays; or a uint8
            array [size, height, width] of grey images.
        labels: class index of each example, or what the task's objective takes.
        groups: group of each example. A group contains examples that are alike, such as codes of one category, reviews of
            one drug, patches of one place, or images of one patient.
    """

    inputs: Any
    labels: list[Any]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """The data of a task.

    Attributes:
        class_names: classes, findings or the predicted number, in the order of the labels.
        train: training split; it shares no group with `validation`.
        validation: validation split.
        test: test split.
        checksum: SHA-256 of all inputs and labels.
        caveat: what results on this task do not show; may be empty.
    """

    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    checksum: str
    caveat: str

    @classmethod
    def of(cls, class_names: list[str], splits: Mapping[str, Split], caveat: str) -> TaskData:
        """Builds the task and computes its checksum.

        Args:
            class_names: see `TaskData`.
            splits: train, validation and test by name.
            caveat: see `TaskData`.
        """
        content = [(name, _hashable(splits[name].inputs), _hashable(splits[name].labels)) for name in sorted(splits)]
        digest = hashlib.sha256(repr(content).encode()).hexdigest()
        return cls(class_names, splits["train"], splits["validation"], splits["test"], digest, caveat)


def places_of(splits: Sequence[Split]) -> list[tuple[str, Any]]:
    """Lists every example with a name for error messages.

    Args:
        splits: the three splits, or one split.

    Returns:
        (name, input) of each example; the name is such as `train example 3`.
    """
    names = SPLITS if len(splits) == len(SPLITS) else ("",)
    named_splits = zip(names, splits, strict=True)
    return [(f"{name} example {i}".strip(), x) for name, split in named_splits for i, x in enumerate(split.inputs)]


def name_of(place: Any, otherwise: str) -> str:
    """Returns the name of an input for error messages.

    Args:
        place: input of an example.
        otherwise: name of an input that is neither a text nor a path.

    Returns:
        Its path, the first of its paths, or the text itself.
    """
    first = place[0] if isinstance(place, tuple) else place
    return str(first) if isinstance(first, str | Path) else otherwise


def draw_of(task: Task, split: str) -> str:
    """Returns the seed from which a split's examples are drawn.

    Args:
        task: the seeds. `sample_seed`, if present, replaces `split_seed` for the training split.
        split: train, validation or test.
    """
    resampled = split == "train" and task.sample_seed is not None
    return f"sample:{task.sample_seed}" if resampled else f"{task.split_seed}:{split}"


def _hashable(inputs: Any) -> Any:
    """Returns what the checksum depends on: texts, bytes of arrays, names and sizes of files."""
    if isinstance(inputs, np.ndarray):
        return hashlib.sha256(inputs.tobytes()).hexdigest()
    if isinstance(inputs, list | tuple):
        return [_hashable(value) for value in inputs]
    return (inputs.name, inputs.stat().st_size) if isinstance(inputs, Path) else inputs
