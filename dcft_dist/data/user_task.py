"""The user's data as a task: labels decoded, groups kept together, and everything checked before the run begins."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import DataError, did_you_mean, listing
from .readers import Row, read_rows
from .splits import SPLITS, Split, TaskData

Parts = dict[str, list[Row]]


def user_task(config: Config) -> TaskData:
    """
    Raises:
        DataError: files are missing, labels are wrong, a class is empty, a group is in two splits: each is named.
    """
    data = config.data
    found = read_rows(data, config.import_roots)
    parts = _split({split: _with_masks(rows, config) for split, rows in found.items()}, config)
    _check_files(parts)
    _check_groups(parts)
    names = _names(config, parts["train"])
    splits = {name: _decoded(rows, _decoder(config, names)) for name, rows in parts.items()}
    if config.task.kind == "single_label":
        _check_classes(names, splits["train"])
    if config.task.kind == "multi_label":
        _check_findings(names, splits["train"])
    grouped = data.group is not None or data.group_pattern is not None
    caveat = "" if grouped else "No groups were given: examples of one patient may be in two splits."
    return TaskData.of(names, splits, caveat)


def other_split(config: Config, names: Sequence[str], labelled: bool) -> Split:
    """All examples of other data than the run's, whatever split they say, as one split.

    Args:
        names: classes or findings of the run.
        labelled: whether they have labels; without, labels are those of nothing.

    Raises:
        DataError: see `user_task`.
    """
    data = config.data.model_copy(update={"split": None})  # so it need not be said
    rows = [row for part in read_rows(data, config.import_roots, labelled).values() for row in part]
    rows = _with_masks(rows, config)
    _check_files({"": rows})
    unknown = float("nan")
    nothing = {
        "single_label": 0,
        "multi_label": [unknown] * len(names),
        "regression": unknown,
        "causal_lm": "-",
        "segmentation": None,
    }
    return _decoded(rows, _decoder(config, names) if labelled else lambda row: nothing[config.task.kind])


def _with_masks(rows: Sequence[Row], config: Config) -> list[Row]:
    """Labels of a segmentation are files."""
    if config.task.kind != "segmentation":
        return list(rows)
    return [replace(row, label=row.folder / row.label) if isinstance(row.label, str) else row for row in rows]


def _names(config: Config, rows: Sequence[Row]) -> list[str]:
    """Of classes, findings, or the number to be predicted."""
    if config.task.kind == "segmentation":
        return list(config.data.classes)
    if config.task.kind == "single_label":
        return list(config.data.classes) or sorted({_text(row.label) for row in rows}, key=_natural)
    return [config.data.label] if isinstance(config.data.label, str) else list(config.data.label)


def _decoder(config: Config, names: Sequence[str]) -> Callable[[Row], Any]:
    if config.task.kind == "single_label":
        return _Classes(names)
    if config.task.kind == "segmentation":
        return lambda row: row.label
    if config.task.kind == "causal_lm":
        return _answer
    return _finding if config.task.kind == "multi_label" else _number


def _decoded(rows: Sequence[Row], decode: Callable[[Row], Any]) -> Split:
    return Split([row.input for row in rows], [decode(row) for row in rows], [row.group for row in rows])


# -- splits --------------------------------------------------------------------------------------------------------------


def _split(found: Parts, config: Config) -> Parts:
    """The three splits; what is not said is drawn from the training data (or from all of it) by group."""
    rows = found.pop("", [])
    if rows and found:
        raise DataError(f"{rows[0].where}: some examples have a split, others none")
    parts = {"train": rows, **found}
    if "train" not in parts or not parts["train"]:
        raise DataError(f"there are {', '.join(parts)} data, but none to train on")
    shares = {"validation": config.data.validation_share, "test": config.data.test_share}
    wanted = {name: share for name, share in shares.items() if name not in parts}
    groups = sorted({row.group for row in parts["train"]})
    random.Random(f"{config.task.split_seed}:groups").shuffle(groups)
    sizes, total = Counter(row.group for row in parts["train"]), len(parts["train"])
    for name, share in wanted.items():
        chosen, number = set[str](), 0
        while groups and number < share * total:
            group = groups.pop()
            chosen.add(group)
            number += sizes[group]
        parts[name] = [row for row in parts["train"] if row.group in chosen]
        parts["train"] = [row for row in parts["train"] if row.group not in chosen]
    empty = [name for name in SPLITS if not parts.get(name)]
    if empty:
        raise DataError(f"no examples for {listing(empty)}: with so few groups, give splits of your own (data.split)")
    return {name: parts[name] for name in SPLITS}


def _check_groups(parts: Parts) -> None:
    where: dict[str, tuple[str, Row]] = {}
    for name, rows in parts.items():
        for row in rows:
            before, first = where.setdefault(row.group, (name, row))
            if before != name:
                raise DataError(
                    f"group {row.group!r} is in two splits: {first.where} is for {before}, {row.where} for {name}; "
                    "results on it would be too good"
                )


def _check_files(parts: Parts) -> None:
    rows_of_all = [row for rows in parts.values() for row in rows]
    inputs = [(row.input if isinstance(row.input, tuple) else (row.input,), row) for row in rows_of_all]
    found = [(x, row.where) for places, row in inputs for x in (*places, row.label)]
    files = [(x, where) for x, where in found if isinstance(x, Path)]
    missing = [f"{file} ({where})" for file, where in files if not file.exists()]
    if missing:
        raise DataError(f"{len(missing)} of {len(files)} files are missing: {listing(missing, 3)}")


# -- labels --------------------------------------------------------------------------------------------------------------


class _Classes:
    """Class index of a row."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: i for i, name in enumerate(names)}

    def __call__(self, row: Row) -> int:
        text = _text(row.label)
        if text not in self._index:
            raise DataError(
                f"{row.where}: label {row.label!r} is none of the {len(self._index)} classes"
                f"{did_you_mean(text, self._index)}: {listing(self._index)}"
            )
        return self._index[text]


def _finding(row: Row) -> list[float]:
    values = []
    for value in row.label:
        text = _text(value)
        if text in ("", "None", "nan", "-1", "-1.0"):  # CheXpert's "uncertain" is -1
            values.append(float("nan"))
        elif text in ("0", "1", "0.0", "1.0", "True", "False"):
            values.append(float(text in ("1", "1.0", "True")))
        else:
            raise DataError(f"{row.where}: a finding is 1, 0, or empty for unknown, not {value!r}")
    return values


def _number(row: Row) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{row.where}: label {row.label!r} is no number")
    return value


def _answer(row: Row) -> str:
    if not _text(row.label) or row.label is None:
        raise DataError(f"{row.where}: the answer is empty")
    return _text(row.label)


def _text(label: Any) -> str:
    return str(label).strip()


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers by their value, before words."""
    return (0, float(text), "") if text.replace(".", "", 1).isdecimal() else (1, 0.0, text)


def _check_classes(names: Sequence[str], train: Split) -> None:
    if len(names) < 2:
        raise DataError(f"there is only one class: {listing(names)}")
    counts = Counter(train.labels)
    empty = [name for i, name in enumerate(names) if not counts[i]]
    if empty:
        raise DataError(f"no training example of {listing(empty)}: leave these classes out, or split otherwise")


def _check_findings(names: Sequence[str], train: Split) -> None:
    for name, values in zip(names, zip(*train.labels, strict=True), strict=True):
        if not {0.0, 1.0} <= set(values):
            raise DataError(
                f"no training example with, or none without, the finding {name!r}: leave it out, or split otherwise"
            )
