"""Reads tables strictly: as many cells as columns, no two columns of one name, the true line of every row.

Python's `csv` and `json` modules are lenient by default. A quote that is not closed swallows rows, a comma without quotes
cuts a text, and of two columns of one name the second wins, all in silence.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, line_of, listing

_NOTHING = {"nan", "na", "n/a", "<na>", "#n/a", "null"}


def is_blank(value: Any) -> bool:
    """Whether a cell has nothing in it: None, NaN, or only spaces."""
    return value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())


def is_empty(value: Any) -> bool:
    """Whether a cell that is no free text is empty: blank, or a word that programs write for "nothing".

    These are `nan`, `NA`, `N/A`, `<NA>`, `#N/A` and `null`, in upper or lower case. The text `None` is not empty: it is a
    usual name of a class.
    """
    return is_blank(value) or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a .csv, .tsv, .parquet, .jsonl or .json file (one JSON object in each line).

    Args:
        file: path of the table. Text files are UTF-8.

    Yields:
        (number, value by column) of each row. The number is that of the line in which the row begins, counted from 1; in
        .parquet files that of the row.

    Raises:
        DataError: the file is missing or damaged, a row has more or fewer cells than there are columns, or two columns have
            one name. The message names file and line.
    """
    readers = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".tsv": _csv}
    if file.suffix not in readers:
        raise DataError(f"{file} is not a table: use a .csv, .tsv, .parquet or .jsonl file")
    try:
        yield from readers[file.suffix](file)
    except ImportError as error:
        raise DataError(f"{file} needs the package pyarrow: pip install pyarrow") from error
    except DataError:
        raise
    except Exception as error:  # the type depends on what is odd in the file, and on the library that reads it
        raise DataError(f"{file} cannot be read: {line_of(error)}") from error


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default stops at texts of 131,072 characters
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        columns: list[str] = []
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{file}, line {begin}: {error}; a cell that begins with a quote must end with one, and a quote "
                    "inside it is written twice"
                ) from error
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            if not columns:
                columns = cells
                _check_columns(file, columns)
            elif len(cells) == len(columns):
                yield begin, dict(zip(columns, cells, strict=True))
            else:
                raise DataError(
                    f"{file}, line {begin}: {len(cells)} cells, but {len(columns)} columns ({listing(columns)}); put cells "
                    f"that contain {'a tab' if file.suffix == '.tsv' else 'a comma'}, a quote or a new line between quotes"
                )


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_columns(file, [name for name, _ in pairs])
        return dict(pairs)

    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number}: not a JSON object: {line_of(error)}") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number}: not a JSON object but a {type(record).__name__}")
            yield number, record


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    _check_columns(file, table.column_names)
    yield from enumerate(table.to_pylist(), 1)


def _check_columns(file: Path, columns: Sequence[str]) -> None:
    twice = [repr(name) for name, number in Counter(columns).items() if number > 1]
    if twice:
        raise DataError(f"{file}: two columns have the name {listing(twice)}: rename one of them")
