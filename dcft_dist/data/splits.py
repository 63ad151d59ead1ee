"""Labelled examples in three splits: the common form of every task's data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.task import Task

SPLITS = ("train", "validation", "test")
EXTERNAL = "external "  # before the name of further test data

# Rises when files are turned into other numbers than before. 2: without `data.window`, voxels of 0 are normalised too.
READING = 2


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
        external: further test data by name, such as those of another hospital; each is tested once, like `test`.
    """

    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    checksum: str
    caveat: str
    external: Mapping[str, Split] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name, and further test data as `external NAME`."""
        external = {f"{EXTERNAL}{name}": split for name, split in self.external.items()}
        return {"train": self.train, "validation": self.validation, "test": self.test, **external}

    @classmethod
    def of(
        cls, class_names: list[str], splits: Mapping[str, Split], caveat: str, external: Mapping[str, Split] | None = None
    ) -> TaskData:
        """Builds the task and computes its checksum.

        Args:
            class_names: see `TaskData`.
            splits: train, validation and test by name.
            caveat: see `TaskData`.
            external: see `TaskData`.
        """
        task = cls(class_names, splits["train"], splits["validation"], splits["test"], "", caveat, external or {})
        content = [(name, content_of(split.inputs), content_of(split.labels)) for name, split in sorted(task.splits.items())]
        return replace(task, checksum=hashlib.sha256(repr(content).encode()).hexdigest())


def places_of(splits: Sequence[Split]) -> list[tuple[str, Any]]:
    """Lists every example with a name for error messages.

    Args:
        splits: the three splits and then any external ones, or one split.

    Returns:
        (name, input) of each example; the name is such as `train example 3`.
    """
    names = [*SPLITS, *[EXTERNAL.strip()] * len(splits)] if len(splits) >= len(SPLITS) else [""]
    named_splits = zip(names, splits, strict=False)
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


def file_of(value: Any) -> str:
    """Returns the path of an input for error messages, or nothing: a text may be a note on a patient, and not for logs."""
    return "" if isinstance(value, str) else name_of(value, "")


def draw_of(task: Task, split: str) -> str:
    """Returns the seed from which a split's examples are drawn.

    Args:
        task: the seeds. `sample_seed`, if present, replaces `split_seed` for the training split.
        split: train, validation or test.
    """
    resampled = split == "train" and task.sample_seed is not None
    return f"sample:{task.sample_seed}" if resampled else f"{task.split_seed}:{split}"


def is_hidden(name: str) -> bool:
    """Whether an operating system or an editor made it: `.ipynb_checkpoints`, `._scan.png`, `__MACOSX`, `Thumbs.db`."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and of the folders in it, sorted, without hidden ones."""
    files = (file for file in folder.rglob("*") if not any(map(is_hidden, file.relative_to(folder).parts)))
    return sorted(file for file in files if file.is_file())


def content_of(value: Any) -> Any:
    """What a checksum of inputs or labels depends on, in a form that has the same `repr` in every process.

    Texts and numbers as they are, bytes of arrays, tensors and pictures, names and sizes of files. Of an object that shows
    its memory address, only the class.
    """
    if isinstance(value, np.ndarray) and value.dtype != object:
        return hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, list | tuple):
        return [content_of(part) for part in value]
    if isinstance(value, dict):
        return [(key, content_of(part)) for key, part in value.items()]
    if isinstance(value, Path):
        return (value.name, value.stat().st_size) if value.is_file() else [content_of(file) for file in files_in(value)]
    if callable(to_bytes := getattr(value, "tobytes", None)) and not isinstance(value, np.generic):  # a picture of PIL
        return (type(value).__name__, getattr(value, "size", ()), hashlib.sha256(to_bytes()).hexdigest())
    if callable(to_array := getattr(value, "__array__", None)):  # a tensor, whose `repr` leaves out most of it
        return content_of(np.asarray(to_array()))
    return type(value).__name__ if not isinstance(value, str) and " at 0x" in repr(value) else value
