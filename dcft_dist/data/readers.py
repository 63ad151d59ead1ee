"""The user's data as rows, whatever it is kept in: tables, image folders, MedMNIST, saved datasets, a function."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.task import Data
from ..errors import DataError, did_you_mean
from ..imports import find_object
from .splits import SPLITS

_SYNONYMS = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}


_IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".dcm"}


@dataclass(frozen=True)
class Row:
    """An example as it was found: `label` is not decoded yet; `where` names it in errors."""

    input: Any
    label: Any
    group: str
    where: str
    folder: Path = Path()  # of the table, which paths in it are relative to


@dataclass(frozen=True)
class LazyValue:
    """An input that is read when it is needed: a cell of a saved dataset."""

    table: Any
    index: int
    column: str
    stamp: str  # of the files it is in: a checksum tells changed ones

    def __repr__(self) -> str:
        return f"row {self.index}{self.stamp}"

    def read(self) -> Any:
        return self.table[self.index][self.column]


def read_rows(data: Data, roots: Sequence[str], labelled: bool = True) -> dict[str, list[Row]]:
    """Split -> rows; under "" those that no split was said for. Not `labelled`: labels need not be there.

    Raises:
        DataError: a file, folder or column is missing or cannot be read; the message names it.
    """
    if not labelled:  # no columns are asked for then
        data = data.model_copy(update={"label": []})
    readers: dict[str, Callable[[Data, Sequence[str]], dict[str, list[Row]]]] = {
        "table": _tables,
        "image_folder": _image_folder,
        "medmnist": _medmnist,
        "dataset": _dataset,
        "python": _python,
    }
    found = {split: rows for split, rows in readers[data.format](data, roots).items() if rows}
    if not found:
        raise DataError(f"data.format = '{data.format}': no examples in {data.path or data.train or data.build}")
    return found


def _tables(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    files = {"": data.path} if data.path else {split: getattr(data, split) for split in SPLITS}
    found: dict[str, list[Row]] = {}
    for split, name in files.items():
        if name is not None:
            file = Path(name)
            records = [(f"{file}, line {number}", record) for number, record in _records(file)]
            for part, rows in _rows_of(records, data, file.parent).items():
                found.setdefault(split or part, []).extend(rows)
    return found


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, columns) of each row."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
        elif file.suffix in (".jsonl", ".json"):
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
                if line.strip():
                    yield number, _json_line(f"{file}, line {number}", line)
        elif file.suffix in (".csv", ".tsv"):
            with file.open(newline="", encoding="utf-8-sig") as lines:
                yield from enumerate(csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ","), 2)
        else:
            raise DataError(f"{file}: a table is a file .csv, .tsv, .parquet or .jsonl")
    except ImportError as error:
        raise DataError(f"{file} needs the package pyarrow: pip install pyarrow") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _json_line(where: str, line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: no JSON object: {error}") from error


def _rows_of(records: Iterable[tuple[str, Mapping[str, Any]]], data: Data, folder: Path | None) -> dict[str, list[Row]]:
    """Split -> rows of named columns; paths of images are relative to the folder."""
    labels = [data.label] if isinstance(data.label, str) else data.label
    inputs = [data.input] if isinstance(data.input, str) else data.input
    wanted = [*inputs, *labels, *(name for name in (data.group, data.split) if name)]
    found: dict[str, list[Row]] = {}
    for where, record in records:
        for column in wanted:
            if column not in record:
                known = [str(name) for name in record]
                raise DataError(f"{where}: no column {column!r}{did_you_mean(column, known)}; it has {', '.join(known)}")
        values: list[Any] = [record[name] for name in inputs]
        if data.modality in ("image", "volume"):
            values = [(folder or Path()) / value if isinstance(value, str) else value for value in values]
        for column, one in zip(inputs, values, strict=True):
            if data.modality == "volume" and not isinstance(one, Path):
                raise DataError(f"{where}: {column!r} is a {type(one).__name__}, not the path of a volume")
        value = values[0] if isinstance(data.input, str) else tuple(values)
        label = record[data.label] if isinstance(data.label, str) else [record[name] for name in data.label]
        group = str(record[data.group]).strip() if data.group else str(values[0]) if isinstance(values[0], Path) else where
        for name, cell in (
            (data.group, group),
            (data.label, record.get(str(data.label))),
            *((name, record[name]) for name in inputs),
        ):
            if isinstance(name, str) and is_empty(cell):
                raise DataError(f"{where}: the column {name!r} is empty")
        if data.modality == "text" and not isinstance(value, str):
            raise DataError(f"{where}: the input is a {type(value).__name__}, not a text")
        split = _split_name(str(record[data.split]), where) if data.split else ""
        found.setdefault(split, []).append(Row(value, label, group, where, folder or Path()))
    return found


def is_empty(value: Any) -> bool:
    """Whether a cell has nothing in it, as tables say so."""
    if isinstance(value, str):
        return value.strip() in ("", "None", "nan", "NaN")
    return value is None or (isinstance(value, float) and value != value)


def _split_name(text: str, where: str) -> str:
    name = _SYNONYMS.get(text.strip().lower(), text.strip().lower())
    if name not in SPLITS:
        raise DataError(f"{where}: the split is {text!r}, not train, validation or test")
    return name


def _image_folder(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    root = Path(str(data.path))
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    if not data.label:
        return {"": [_image_row(file, "", data) for file in _images_in(root)]}
    names = {child.name: _SYNONYMS.get(child.name.lower(), child.name.lower()) for child in root.iterdir() if child.is_dir()}
    parts = {name: split for name, split in names.items() if split in SPLITS}
    if parts and len(parts) < len(names):
        raise DataError(f"{root}: folders of splits and of classes beside each other: {', '.join(sorted(names))}")
    folders = {split: root / name for name, split in parts.items()} or {"": root}
    return {split: list(_classes_of(folder, data)) for split, folder in folders.items()}


def _classes_of(root: Path, data: Data) -> Iterator[Row]:
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        yield from (_image_row(file, folder.name, data) for file in _images_in(folder))


def _images_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGES)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(_IMAGES))})")
    return files


def _image_row(file: Path, label: str, data: Data) -> Row:
    group = str(file)
    if data.group_pattern:
        match = re.search(data.group_pattern, file.name)
        if match is None or not match.groups():
            raise DataError(f"{file}: data.group_pattern {data.group_pattern!r} finds no group in the name")
        group = match.group(1)
    return Row(file, label, group, str(file))


def _medmnist(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    file = Path(str(data.path))
    found: dict[str, list[Row]] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for short, split in (("train", "train"), ("val", "validation"), ("test", "test")):
                images = arrays[f"{short}_images"]
                labels = arrays[f"{short}_labels"] if data.label else np.zeros((len(images), 0))
                if len(images) != len(labels):
                    raise DataError(f"{file}: {len(images)} {short}_images, but {len(labels)} {short}_labels")
                if isinstance(data.label, list) and len(data.label) != labels.reshape(len(labels), -1).shape[1]:
                    raise DataError(f"{file}: {short}_labels have {labels.shape[1:]} columns, data.label {len(data.label)}")
                values = (labels if isinstance(data.label, list) else labels.reshape(len(labels), -1)[:, 0]).tolist()
                places = [f"{file}, {short} image {i}" for i in range(len(images))]
                found[split] = [Row(x, y, place, place) for x, y, place in zip(images, values, places, strict=True)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no file of MedMNIST: {error}") from error
    return found


def _dataset(data: Data, _: Sequence[str]) -> dict[str, list[Row]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.format = 'dataset' needs the package datasets: pip install datasets") from error
    try:
        loaded = datasets.load_from_disk(str(data.path))
    except (OSError, ValueError) as error:
        raise DataError(f"{data.path} is no saved dataset: {error}") from error
    parts = loaded if isinstance(loaded, Mapping) else {"": loaded}
    found: dict[str, list[Row]] = {}
    for name, table in parts.items():
        where = f"{data.path}{f', {name}' if name else ''}"
        split = _split_name(name, where) if name else ""
        keep = [c for c in table.column_names if c != data.input] if data.modality == "image" else table.column_names
        lazy = str(data.input) if data.modality == "image" and data.input in table.column_names else None
        files = [Path(file["filename"]) for file in table.cache_files]
        stamp = " of " + ", ".join(f"{file.name} ({file.stat().st_size} bytes)" for file in files)
        records = (
            (f"{where}, row {i}", {**record, **({lazy: LazyValue(table, i, lazy, stamp)} if lazy else {})})
            for i, record in enumerate(table.select_columns(keep))
        )
        for part, rows in _rows_of(records, data, None).items():
            found.setdefault(split or part, []).extend(rows)
    return found


def _python(data: Data, roots: Sequence[str]) -> dict[str, list[Row]]:
    make = find_object(str(data.build), roots, "data.build")
    try:
        made = make()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.build: {data.build} fails: {type(error).__name__}: {error}") from error
    parts = made if isinstance(made, Mapping) else {"": made}
    found: dict[str, list[Row]] = {}
    for name, records in parts.items():
        split = _split_name(name, str(data.build)) if name else ""
        placed = ((f"{data.build}, {name or 'row'} {i}", record) for i, record in enumerate(records))
        for part, rows in _rows_of(placed, data, None).items():
            found.setdefault(split or part, []).extend(rows)
    return found
