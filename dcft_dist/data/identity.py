"""What two rows have in common whatever they are called: files by what they are, names by what they mean."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .hashes import hash_of
from .readers import Row

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def meaning(text: str) -> float | str:
    """What a name means however it is written: the value of a number (7, 7.0, 007), otherwise the text in lower case."""
    text = text.strip()
    return float(text) if _NUMBER.fullmatch(text) else text.casefold()


def spelled_twice(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two different names that mean the same (see `meaning`); None if there are none."""
    first: dict[float | str, str] = {}
    for name in names:
        if first.setdefault(meaning(name), name) != name:
            return first[meaning(name)], name
    return None


def beginnings(names: Sequence[str], num_classes: int) -> tuple[str, int] | None:
    """What may be patients in names of files: beginnings that repeat, if they are not those of the classes.

    Args:
        names: of the files, without their folders.
        num_classes: number of classes; a file may be named after its class.

    Returns:
        A pattern for `data.group_pattern`, and the number of different beginnings; None if none repeat.
    """
    for mark in ("_", "-"):
        found = {name.partition(mark)[0] for name in names}
        if all(mark in name for name in names) and 2 * num_classes < len(found) < 0.9 * len(names):
            return f"^([^{mark}]+){mark}", len(found)
    return None


def check_groups_are_spelled_alike(rows: Iterable[Row]) -> None:
    """Refuses groups that are one number in several spellings: patients 7, 7.0 and 007.

    Raises:
        DataError: there are some; the message names two rows.
    """
    first: dict[float, Row] = {}
    for row in rows:
        number = meaning(row.group)
        if isinstance(number, float) and (other := first.setdefault(number, row)).group != row.group:
            raise DataError(
                f"groups {other.group!r} ({other.where}) and {row.group!r} ({row.where}) are one number: write it one way, "
                "or, if they are two groups, with letters"
            )


def check_no_file_is_in_two_splits(parts: Mapping[str, Sequence[Row]]) -> None:
    """Compares the input files of different splits: first which file it is (links and spellings lead to one), then contents.

    Only files of one size are read; of these first the ends, then the whole. Folders are compared by what they are alone.

    Raises:
        DataError: a file is in two splits; the message names both rows.
    """
    owners: dict[tuple[int, int], tuple[str, Row]] = {}
    by_size: dict[int, list[tuple[str, Row, Path]]] = defaultdict(list)
    for split, rows in parts.items():
        for row in rows:
            for file in row.input if isinstance(row.input, tuple) else (row.input,):
                if not isinstance(file, Path):
                    continue
                found = file.stat()
                other_split, other = owners.setdefault((found.st_dev, found.st_ino), (split, row))
                if other_split != split:
                    raise _leak("are the same file", other_split, other, split, row)
                if other is row and file.is_file():
                    by_size[found.st_size].append((split, row, file))
    for alike in by_size.values():
        for whole in (False, True):
            alike = _alike_in_two_splits(alike, whole)
        if alike:
            (first_split, first, _), *others = alike
            split, row, _ = next(other for other in others if other[0] != first_split)
            raise _leak("have the same contents", first_split, first, split, row)


def _alike_in_two_splits(files: list[tuple[str, Row, Path]], whole: bool) -> list[tuple[str, Row, Path]]:
    """The first of the groups of files with equal hashes that has members in two splits; empty if there is none."""
    if len({split for split, _, _ in files}) < 2:
        return []
    by_hash: dict[str, list[tuple[str, Row, Path]]] = defaultdict(list)
    for one in files:
        by_hash[hash_of(one[2], whole)].append(one)
    groups = [group for group in by_hash.values() if len({split for split, _, _ in group}) > 1]
    return [one for group in groups for one in group] if not whole else groups[0] if groups else []


def _leak(how: str, first_split: str, first: Row, split: str, row: Row) -> DataError:
    return DataError(
        f"{first.where} in {first_split} and {row.where} in {split} {how}: results would look too good, so "
        "remove one, or put both into one split"
    )
