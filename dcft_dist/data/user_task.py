"""Turns the user's data into a task: decodes labels, keeps groups together, and checks files, groups and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import DataError, did_you_mean, listing
from .draw import Classes, draw_fold, draw_splits
from .identity import beginnings, check_groups_are_spelled_alike, check_no_file_is_in_two_splits, spelled_twice
from .readers import Row, read_rows
from .splits import EXTERNAL, SPLITS, Split, TaskData
from .tables import is_empty

Parts = dict[str, list[Row]]  # rows by split
_NEGATIVE, _POSITIVE = ("0", "0.0", "False"), ("1", "1.0", "True")


def user_task(config: Config) -> TaskData:
    """Reads, splits and checks the user's data.

    Raises:
        DataError: files are missing, a label is wrong, a class has no training examples, or a group is in two splits. The
            message names them.
    """
    data = config.data
    rows_by_split = read_rows(data, config.import_roots)
    if data.group or data.group_pattern:
        check_groups_are_spelled_alike(row for rows in rows_by_split.values() for row in rows)
    parts = _split({split: _with_masks(rows, config) for split, rows in rows_by_split.items()}, config)
    _check_files(parts)
    _check_groups(parts)
    check_no_file_is_in_two_splits(parts)
    external = {name: _external(config, name, parts) for name in data.external_tests}
    names = _names(config, parts["train"])
    splits = {name: _decoded(rows, _decoder(config, names)) for name, rows in parts.items()}
    if config.task.kind == "single_label":
        _check_classes(names, splits["train"])
    if config.task.kind == "multi_label":
        _check_findings(names, splits["train"])
    grouped = data.group is not None or data.group_pattern is not None
    caveat = "" if grouped else f"No groups were given: examples of one patient may be in two splits.{_suspicion(parts)}"
    return TaskData.of(names, splits, caveat, {n: _decoded(rows, _decoder(config, names)) for n, rows in external.items()})


def _suspicion(parts: Parts) -> str:
    """Names of files that look as if they began with the patient, where no groups are given."""
    rows = [row for part in parts.values() for row in part]
    names = [row.input.name for row in rows if isinstance(row.input, Path)]
    found = beginnings(names, len({str(row.label) for row in rows})) if len(names) == len(rows) else None
    if found is None:
        return ""
    return (
        f" {len(names)} names of files have only {found[1]} beginnings: if these are the patients, the results look better "
        f"than they are. Then train again with groups, for a folder of images by data.group_pattern = {found[0]!r}."
    )


def _external(config: Config, name: str, parts: Parts) -> list[Row]:
    """Rows of further test data, none of which may have been seen in training or validation."""
    sources = {"path": config.data.external_tests[name], "train": None, "validation": None, "test": None, "split": None}
    read = read_rows(config.data.model_copy(update=sources), config.import_roots)
    rows = _with_masks([row for part in read.values() for row in part], config)
    others = {split: parts[split] for split in ("train", "validation")} | {f"{EXTERNAL}{name}": rows}
    if not rows:
        raise DataError(f"data.external_tests.{name}: {sources['path']} has no examples")
    if config.data.group or config.data.group_pattern:
        check_groups_are_spelled_alike(row for part in others.values() for row in part)
    _check_files({name: rows})
    _check_groups(others)
    check_no_file_is_in_two_splits(others)
    return rows


def other_split(config: Config, names: Sequence[str], labelled: bool) -> Split:
    """Reads new data as one split, such as for predictions; splits named in the data are ignored.

    Args:
        config: configuration of the run, with `[data]` of the new data.
        names: classes or findings of the run.
        labelled: whether the data have labels; without, placeholders are used.

    Raises:
        DataError: files are missing or cannot be read, or a label is wrong; the message names them.
    """
    data = config.data.model_copy(update={"split": None})  # the new data need no such column
    rows = [row for part in read_rows(data, config.import_roots, labelled).values() for row in part]
    rows = _with_masks(rows, config)
    _check_files({"": rows})
    unknown = float("nan")
    placeholders = {
        "single_label": 0,
        "multi_label": [unknown] * len(names),
        "regression": unknown,
        "causal_lm": "-",
        "segmentation": None,
    }
    return _decoded(rows, _decoder(config, names) if labelled else lambda row: placeholders[config.task.kind])


def _with_masks(rows: Sequence[Row], config: Config) -> list[Row]:
    """For segmentation, turns the labels into paths of masks."""
    if config.task.kind != "segmentation":
        return list(rows)
    return [replace(row, label=row.folder / row.label) if isinstance(row.label, str) else row for row in rows]


def _names(config: Config, rows: Sequence[Row]) -> list[str]:
    """Returns the names of the classes, the findings, or the predicted number."""
    if config.task.kind == "segmentation":
        return list(config.data.classes)
    if config.task.kind == "single_label":
        return list(config.data.classes) or _classes_in(rows)
    return [config.data.label] if isinstance(config.data.label, str) else list(config.data.label)


def _classes_in(rows: Sequence[Row]) -> list[str]:
    first = {_text(row.label): row for row in reversed(rows) if not is_empty(row.label)}
    names = sorted(first, key=_natural)
    if alike := spelled_twice(names):
        one, other = (f"{name!r} ({first[name].where})" for name in alike)
        raise DataError(
            f"classes {one} and {other} differ only in how they are written: write them in one way, or name all classes in "
            "data.classes"
        )
    return names


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


def _split(rows_by_split: Parts, config: Config) -> Parts:
    """Returns the three splits; draws missing ones, from the training data or from all rows without a split."""
    rows = rows_by_split.pop("", [])
    if rows and rows_by_split:
        raise DataError(f"{rows[0].where}: has no split, but other examples do: give every example a split, or none")
    parts = {"train": rows, **rows_by_split}
    if "train" not in parts or not parts["train"]:
        raise DataError(f"the training split is empty (splits: {', '.join(parts)}): add training examples")
    shares = {"validation": config.data.validation_share, "test": config.data.test_share}
    missing = {name: share for name, share in shares.items() if name not in parts}
    if (drawn := sum(missing.values())) >= 1:
        raise DataError(f"nothing is left for training: {' and '.join(f'data.{n}_share' for n in missing)} are {drawn:g}")
    classes = _CLASSES.get(config.task.kind, lambda row: ())
    parts |= draw_splits(parts["train"], missing, classes, config.task.split_seed)
    if config.data.folds:
        fitted = parts["train"] + parts["validation"]
        parts |= draw_fold(fitted, config.data.folds, config.data.fold, classes, config.task.split_seed)
    empty = [name for name in SPLITS if not parts.get(name)]
    if empty:
        raise DataError(
            f"no examples for {listing(empty)}: too few groups to draw from, or shares too small; raise "
            "data.validation_share and data.test_share, or assign the splits yourself with data.split"
        )
    return {name: parts[name] for name in SPLITS}


# What makes examples alike for a split; without an entry only groups count.
_CLASSES: dict[str, Classes] = {
    "single_label": lambda row: (_text(row.label),),
    "multi_label": lambda row: [str(i) for i, value in enumerate(row.label) if _text(value) in _POSITIVE],
}


def _check_groups(parts: Parts) -> None:
    first_of_group: dict[str, tuple[str, Row]] = {}
    for name, rows in parts.items():
        for row in rows:
            first_name, first_row = first_of_group.setdefault(row.group, (name, row))
            if first_name != name:
                raise DataError(
                    f"group {row.group!r} is in two splits: {first_row.where} is in {first_name}, {row.where} in {name}; "
                    "results would look too good, so put each group into one split"
                )


def _check_files(parts: Parts) -> None:
    all_rows = [row for rows in parts.values() for row in rows]
    inputs = [(row.input if isinstance(row.input, tuple) else (row.input,), row) for row in all_rows]
    values = [(x, row.where) for input_values, row in inputs for x in (*input_values, row.label)]
    files = [(x, where) for x, where in values if isinstance(x, Path)]
    missing = [f"{file} ({where})" for file, where in files if not file.exists()]
    if missing:
        raise DataError(f"{len(missing)} of {len(files)} files are missing: {listing(missing, 3)}")


# -- labels --------------------------------------------------------------------------------------------------------------


class _Classes:
    """Decodes the label of a row into its class index."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: i for i, name in enumerate(names)}

    def __call__(self, row: Row) -> int:
        text = _text(row.label)
        if text not in self._index:
            if is_empty(row.label):
                raise DataError(f"{row.where}: the label is empty")
            raise DataError(
                f"{row.where}: label {row.label!r} is not one of the {len(self._index)} classes"
                f"{did_you_mean(text, self._index)}: {listing(self._index)}"
            )
        return self._index[text]


def _finding(row: Row) -> list[float]:
    values = []
    for value in row.label:
        text = _text(value)
        if is_empty(value) or text in ("-1", "-1.0"):  # CheXpert's "uncertain" is -1
            values.append(float("nan"))
        elif text in (*_NEGATIVE, *_POSITIVE):
            values.append(float(text in _POSITIVE))
        else:
            raise DataError(f"{row.where}: {value!r} is not a finding: use 1, 0, or an empty cell for unknown")
    return values


def _number(row: Row) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{row.where}: label {row.label!r} is not a finite number")
    return value


def _answer(row: Row) -> str:
    if not _text(row.label) or row.label is None:
        raise DataError(f"{row.where}: the answer is empty")
    return _text(row.label)


def _text(label: Any) -> str:
    return str(label).strip()


def _natural(text: str) -> tuple[int, float, str]:
    """Sort key: numbers by value, before words; no two texts have the same."""
    return (0, float(text), text) if text.replace(".", "", 1).isdecimal() else (1, 0.0, text)


def _check_classes(names: Sequence[str], train: Split) -> None:
    if len(names) < 2:
        raise DataError(f"only one class, {listing(names)}: single_label needs at least two")
    counts = Counter(train.labels)
    empty = [name for i, name in enumerate(names) if not counts[i]]
    if empty:
        raise DataError(f"no training examples of {listing(empty)}: remove these classes, or split the data differently")


def _check_findings(names: Sequence[str], train: Split) -> None:
    for name, values in zip(names, zip(*train.labels, strict=True), strict=True):
        if not {0.0, 1.0} <= set(values):
            raise DataError(
                f"finding {name!r} has no positive or no negative training examples: remove it from data.label, or split "
                "the data differently"
            )
