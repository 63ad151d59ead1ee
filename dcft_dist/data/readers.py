"""Reads the user's data as rows, from tables, image folders, MedMNIST files, saved datasets, or a function."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.task import Data
from ..errors import DataError, did_you_mean, line_of
from ..imports import find_object
from .splits import SPLITS, is_hidden
from .tables import is_blank, is_empty, records

_SYNONYMS = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".dcm")
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")


@dataclass(frozen=True)
class Row:
    """One example as read.

    Attributes:
        input: text, path, array, `LazyValue`, or a tuple of several columns.
        label: label as in the data, not decoded yet.
        group: examples of one group stay in one split.
        where: name of the example in error messages, such as `data.csv, line 3`.
        folder: folder of the table; paths in it are relative to this folder.
    """

    input: Any
    label: Any
    group: str
    where: str
    folder: Path = Path()


@dataclass(frozen=True)
class LazyValue:
    """A cell of a saved dataset, read when it is needed.

    Attributes:
        table: the dataset.
        index: row of the cell.
        column: column of the cell.
        stamp: names and sizes of the dataset's files. It is part of the checksum, which changes when the files change.
        files: the dataset's files.
    """

    table: Any
    index: int
    column: str
    stamp: str
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return f"row {self.index}{self.stamp}"

    def read(self) -> Any:
        """Reads the cell."""
        return self.table[self.index][self.column]


def read_rows(data: Data, roots: Sequence[str], labelled: bool = True) -> dict[str, list[Row]]:
    """Reads all examples.

    Args:
        data: the section `[data]`. Its `format` chooses the reader: `table`, `image_folder`, `medmnist`, `dataset` or
            `python`.
        roots: folders that are searched for `data.build` first.
        labelled: whether to read labels; without, the data need no label columns.

    Returns:
        Rows by split; rows without a split are under "".

    Raises:
        DataError: a file, folder or column is missing or cannot be read; the message names it.
    """
    if not labelled:
        data = data.model_copy(update={"label": []})
    readers: dict[str, Callable[[Data, Sequence[str]], dict[str, list[Row]]]] = {
        "table": _tables,
        "image_folder": _image_folder,
        "medmnist": _medmnist,
        "dataset": _dataset,
        "python": _python,
    }
    rows_by_split = {split: rows for split, rows in readers[data.format](data, roots).items() if rows}
    if not rows_by_split:
        raise DataError(f"data.format = '{data.format}': no examples in {data.path or data.train or data.build}")
    return rows_by_split


def _tables(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    if data.path and Path(data.path).is_dir() and not data.label and data.modality != "text" and isinstance(data.input, str):
        # Not .dcm for volumes: a file of a series is a slice.
        endings = VOLUMES if data.modality == "volume" and len(data.patch) == 3 else IMAGES
        return {"": [Row(file, "", str(file), str(file)) for file in _images_in(Path(data.path), endings)]}
    files = {"": data.path} if data.path else {split: getattr(data, split) for split in SPLITS}
    rows_by_split: dict[str, list[Row]] = {}
    for split, name in files.items():
        if name is not None:
            file = Path(name)
            named_records = ((f"{file}, line {number}", record) for number, record in records(file))
            for named_split, rows in _rows_of(named_records, data, file.parent).items():
                rows_by_split.setdefault(split or named_split, []).extend(rows)
    return rows_by_split


def _rows_of(records: Iterable[tuple[str, Mapping[str, Any]]], data: Data, folder: Path | None) -> dict[str, list[Row]]:
    """Turns records into rows by split.

    Args:
        records: (name for error messages, value by column) of each example.
        data: names of the columns.
        folder: paths of images and volumes are relative to it.
    """
    labels = [data.label] if isinstance(data.label, str) else data.label
    inputs = [data.input] if isinstance(data.input, str) else data.input
    required = [*inputs, *labels, *(name for name in (data.group, data.split) if name)]
    rows_by_split: dict[str, list[Row]] = {}
    for where, record in records:
        for column in required:
            if column not in record:
                known = [str(name) for name in record]
                raise DataError(
                    f"{where}: no column {column!r}{did_you_mean(column, known)}; columns are {', '.join(known)}"
                )
        values: list[Any] = [record[name] for name in inputs]
        if data.modality in ("image", "volume"):
            values = [(folder or Path()) / value if isinstance(value, str) else value for value in values]
        for column, value in zip(inputs, values, strict=True):
            if data.modality == "volume" and not isinstance(value, Path):
                raise DataError(f"{where}: {column!r} is a {type(value).__name__}, not the path of a volume")
        whole_input = values[0] if isinstance(data.input, str) else tuple(values)
        label = record[data.label] if isinstance(data.label, str) else [record[name] for name in data.label]
        group = str(record[data.group]).strip() if data.group else str(values[0]) if isinstance(values[0], Path) else where
        blank = [name for name in (*inputs, *(labels if isinstance(data.label, str) else ())) if is_blank(record[name])]
        if data.group and is_empty(record[data.group]):
            blank.append(data.group)
        if blank:
            raise DataError(f"{where}: the column {blank[0]!r} is empty")
        if data.modality == "text" and not isinstance(whole_input, str):
            raise DataError(f"{where}: the input is a {type(whole_input).__name__}, not a text")
        split = _split_name(str(record[data.split]), where) if data.split else ""
        rows_by_split.setdefault(split, []).append(Row(whole_input, label, group, where, folder or Path()))
    return rows_by_split


def _split_name(text: str, where: str) -> str:
    name = _SYNONYMS.get(text.strip().lower(), text.strip().lower())
    if name not in SPLITS:
        raise DataError(f"{where}: the split is {text!r}, not train, validation or test")
    return name


def _image_folder(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    root = Path(str(data.path))
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    if not data.label:
        return {"": [_image_row(file, "", data) for file in _images_in(root)]}
    names = {folder.name: _SYNONYMS.get(folder.name.lower(), folder.name.lower()) for folder in _folders_in(root)}
    parts = {name: split for name, split in names.items() if split in SPLITS}
    if parts and len(parts) < len(names):
        raise DataError(
            f"{root}: split folders and other folders are mixed: {', '.join(sorted(names))}; put all class folders into the "
            "split folders"
        )
    folders = {split: root / name for name, split in parts.items()} or {"": root}
    return {split: list(_classes_of(folder, data)) for split, folder in folders.items()}


def _classes_of(root: Path, data: Data) -> Iterator[Row]:
    for folder in _folders_in(root):
        yield from (_image_row(file, folder.name, data) for file in _images_in(folder))


def _folders_in(root: Path) -> list[Path]:
    return sorted(child for child in root.iterdir() if child.is_dir() and not is_hidden(child.name))


def _images_in(folder: Path, endings: tuple[str, ...] = IMAGES) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.name.lower().endswith(endings) and not any(map(is_hidden, file.relative_to(folder).parts))
    )
    if not files:
        raise DataError(f"{folder} contains no images ({', '.join(sorted(endings))})")
    return files


def _image_row(file: Path, label: str, data: Data) -> Row:
    group = str(file)
    if data.group_pattern:
        match = re.search(data.group_pattern, file.name)
        if not data.label and (match is None or not match.groups()):
            return Row(file, label, group, str(file))  # a prediction needs no patient
        if match is None or not match.groups():
            raise DataError(f"{file}: data.group_pattern {data.group_pattern!r} finds no group in the file name")
        group = match.group(1)
    return Row(file, label, group, str(file))


def _medmnist(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    file = Path(str(data.path))
    rows_by_split: dict[str, list[Row]] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for short, split in (("train", "train"), ("val", "validation"), ("test", "test")):
                images = arrays[f"{short}_images"]
                labels = arrays[f"{short}_labels"] if data.label else np.zeros((len(images), 0))
                if len(images) != len(labels):
                    raise DataError(f"{file}: {len(images)} {short}_images, but {len(labels)} {short}_labels")
                if isinstance(data.label, list) and len(data.label) != labels.reshape(len(labels), -1).shape[1]:
                    raise DataError(
                        f"{file}: {short}_labels have {labels.shape[1:]} columns, but data.label names {len(data.label)}"
                    )
                values = (labels if isinstance(data.label, list) else labels.reshape(len(labels), -1)[:, 0]).tolist()
                wheres = [f"{file}, {short} image {i}" for i in range(len(images))]
                rows_by_split[split] = [Row(x, y, where, where) for x, y, where in zip(images, values, wheres, strict=True)]
    except DataError:
        raise
    except Exception as error:  # the type depends on what is odd in the file
        raise DataError(f"{file} is not a MedMNIST file: {line_of(error)}") from error
    return rows_by_split


def _dataset(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.format = 'dataset' needs the package datasets: pip install datasets") from error
    try:
        loaded = datasets.load_from_disk(str(data.path))
    except Exception as error:  # of datasets, pyarrow, json
        raise DataError(f"{data.path} is not a saved dataset: {line_of(error)}") from error
    tables = loaded if isinstance(loaded, Mapping) else {"": loaded}
    rows_by_split: dict[str, list[Row]] = {}
    for name, table in tables.items():
        where = f"{data.path}{f', {name}' if name else ''}"
        split = _split_name(name, where) if name else ""
        eager = [c for c in table.column_names if c != data.input] if data.modality == "image" else table.column_names
        lazy = str(data.input) if data.modality == "image" and data.input in table.column_names else None
        files = tuple(Path(file["filename"]) for file in table.cache_files)
        stamp = " of " + ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in files)
        named_records = (
            (f"{where}, row {i}", {**record, **({lazy: LazyValue(table, i, lazy, stamp, files)} if lazy else {})})
            for i, record in enumerate(table.select_columns(eager))
        )
        for named_split, rows in _rows_of(named_records, data, None).items():
            rows_by_split.setdefault(split or named_split, []).extend(rows)
    return rows_by_split


def _python(data: Data, roots: Sequence[str]) -> dict[str, list[Row]]:
    build = find_object(str(data.build), roots, "data.build")
    try:
        built = build()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.build: {data.build} fails: {type(error).__name__}: {error}") from error
    records_by_split = built if isinstance(built, Mapping) else {"": built}
    rows_by_split: dict[str, list[Row]] = {}
    for name, built_records in records_by_split.items():
        split = _split_name(name, str(data.build)) if name else ""
        named_records = ((f"{data.build}, {name or 'row'} {i}", record) for i, record in enumerate(built_records))
        for named_split, rows in _rows_of(named_records, data, None).items():
            rows_by_split.setdefault(split or named_split, []).extend(rows)
    return rows_by_split
