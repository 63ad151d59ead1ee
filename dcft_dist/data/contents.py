"""What the files of a run's data contain: compared at every start, and with what was read first.

A name and a size do not say what a file contains. So at each start every file gets a stamp: its size and a hash of its first
and last 64 KiB. The hash of the whole file is taken at its first read, and kept in the run's folder with the stamp. It is
not taken again while size and time of change stay the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..files import append_line, json_line, read_lines, write_atomic
from .batches import Examples
from .hashes import hash_of
from .readers import LazyValue
from .splits import Split, files_in

_TOGETHER = 64  # files that a thread takes at a time
_THREADS = 16  # they wait for the file system more than they compute


@dataclass(frozen=True)
class Record:
    """What is known of one file.

    Attributes:
        size: in bytes.
        mtime_ns: time of its last change.
        inode: its number in its file system. A copy on another node has another one, even if the time was copied too.
        ends: hash of its first and last 64 KiB.
        whole: hash of all of it; empty before its first read.
    """

    size: int
    mtime_ns: int
    inode: int
    ends: str
    whole: str = ""


def stamp_of(file: Path) -> Record:
    """Size, time of change and hash of the ends of a file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return Record(found.st_size, found.st_mtime_ns, found.st_ino, hash_of(file, whole=False))


class Contents:
    """The files of a run's data, what they contained when they were first read, and where that is kept.

    A file has a key that does not depend on where it lies: split, number of the example, position within the example.

    Attributes:
        files: key -> path.
    """

    def __init__(self, splits: Mapping[str, Split], folder: Path | None = None) -> None:
        """Lists the files; reads none.

        Args:
            splits: train, validation and test by name.
            folder: where records are kept; None: nowhere.
        """
        self._of_example: dict[tuple[str, int], list[str]] = {}
        self.files: dict[str, Path] = {}
        for name, split in splits.items():
            for i, (value, label) in enumerate(zip(split.inputs, split.labels, strict=True)):
                if found := {f"{name}/{i}/{place}": file for place, file in _files_in((value, label))}:
                    self._of_example[name, i] = list(found)
                    self.files |= found
        self._folder, self._seen = folder, set[str]()
        self._known, self._new = dict[str, Record](), dict[str, Record]()  # the second: not written yet
        # Files of a saved dataset hold all examples, and may be large: they are stamped, and hashed only when asked to.
        lazy = (x for split in splits.values() for x in split.inputs if isinstance(x, LazyValue))
        self._tables = {file for x in lazy for file in x.files}
        one_folder = len({file.parent for file in self._tables}) == 1  # the dataset's own; otherwise a folder for each split
        for file in sorted(self._tables):
            self.files["/".join(("dataset", *file.parts[-1 if one_folder else -2 :]))] = file

    def compact(self) -> None:
        """Puts what earlier starts have kept into one file. One process calls it, before any calls `load`."""
        if self._folder is None or not self._folder.is_dir():
            return
        self.load()
        old = list(self._folder.glob("*.jsonl"))
        write_atomic(self._folder / "all.jsonl", "".join(_line(key, record) for key, record in self._known.items()))
        for file in old:
            if file.name != "all.jsonl":
                file.unlink()

    def load(self) -> None:
        """Reads what is kept. A later line adds to an earlier one; incomplete lines of a killed process are skipped."""
        for file in sorted(self._folder.glob("*.jsonl")) if self._folder else ():
            rows: list[Any] = read_lines(file)
            for key, *values in (row for row in rows if len(row) == 1 + len(fields(Record))):
                old, new = self._known.get(key), Record(*values)
                if old is None or new.whole or not old.whole:
                    self._known[key] = new

    def stamp(self, position: int = 0, number: int = 1) -> dict[str, int]:
        """Stamps a part of the files, and compares them with what is kept.

        Args:
            position: which part.
            number: number of parts.

        Returns:
            Split -> sum over the part's files of a number below 2^40 that depends on key, size and ends. The sums of all
            parts together say what the split's files contain, whoever reads which.

        Raises:
            DataError: files cannot be read, or are not those that the run was begun with; the message names the first.
        """
        keys = list(self.files)[position::number]
        sums: dict[str, int] = {}
        for key, record in zip(keys, _threaded(stamp_of, [self.files[key] for key in keys]), strict=True):
            old = self._known.get(key)
            if old is not None and (old.size, old.ends) != (record.size, record.ends):
                raise self._changed(key)
            if old is None:
                self._known[key] = self._new[key] = record
            split = key.split("/")[0]
            digest = hashlib.blake2b(f"{key} {record.size} {record.ends}".encode(), digest_size=5).digest()
            sums[split] = sums.get(split, 0) + int.from_bytes(digest, "little")
        return sums

    def keep(self, name: str) -> None:
        """Writes what this process has found since the last call to the file `<name>.jsonl`, in one step."""
        if self._folder is not None and self._new:
            write_atomic(self._folder / f"{name}.jsonl", "".join(_line(key, r) for key, r in self._new.items()))
        self._new = {}

    def watch(self, examples: Examples, split: str) -> Examples:
        """The examples of a split, which then compare their files at the first read; unchanged if there are no files."""
        has_files = any(name == split for name, _ in self._of_example)
        return WatchedExamples(examples, self, split) if has_files else examples

    def read(self, split: str, index: int) -> None:
        """Takes the whole hash of an example's files, if this is their first read, or if their time of change is another.

        Raises:
            DataError: a file is not the one that was read first; the message names it.
        """
        for key in self._of_example.get((split, index), ()):
            if key not in self._seen:
                self._seen.add(key)
                if record := self._first_read(key):
                    self._append(key, record)

    def read_all(self, position: int = 0, number: int = 1, again: bool = False) -> int:
        """Takes the whole hash of a part of the files.

        Args:
            position: which part.
            number: number of parts.
            again: True: of every file of the part, and of saved datasets too, whatever is kept of it.

        Returns:
            Number of files that were hashed.

        Raises:
            DataError: a file is not the one that was read first; the message names it.
        """
        usual = (key for key in self.files if again or self.files[key] not in self._tables)
        keys = list(usual)[position::number]
        found = _threaded(lambda key: self._first_read(key, again), keys)
        hashed = {key: record for key, record in zip(keys, found, strict=True) if record}
        self._known |= hashed
        self._new |= hashed
        return len(hashed)

    def _first_read(self, key: str, again: bool = False) -> Record | None:
        """The record with the whole hash; None if it is known already."""
        file, old = self.files[key], self._known.get(key)
        try:
            found = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        same = old and (old.size, old.mtime_ns, old.inode) == (found.st_size, found.st_mtime_ns, found.st_ino)
        if old and old.whole and same and not again:
            return None
        whole = hash_of(file, whole=True)
        if old and old.whole and old.whole != whole:
            raise self._changed(key)
        ends = old.ends if old else hash_of(file, whole=False)
        return Record(found.st_size, found.st_mtime_ns, found.st_ino, ends, whole)

    def _append(self, key: str, record: Record) -> None:
        """Adds a line to a file of this process alone: worker processes read too, and know nothing of each other."""
        self._known[key] = record
        if self._folder is not None:
            with suppress(OSError):
                file = self._folder / f"read-{os.uname().nodename}-{os.getpid()}.jsonl"
                append_line(file, [key, *astuple(record)])

    def _changed(self, key: str) -> DataError:
        split, index, *_ = key.split("/")
        where = f"{split} example {index}" if split != "dataset" else "the saved dataset"
        return DataError(
            f"{self.files[key]} ({where}) has other contents than when this run first read it: put the file back, or give a "
            "new --name"
        )


@dataclass(frozen=True)
class WatchedExamples:
    """A split that compares its files with `Contents` when they are first read.

    Attributes:
        examples: the split.
        contents: what its files contained first.
        split: name of the split.
        labels: label of each example.
    """

    examples: Examples
    contents: Contents
    split: str
    labels: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.examples.labels)

    def __len__(self) -> int:
        return len(self.examples)

    def length(self, index: int) -> int:
        """Returns the length of an example; see `Examples.length`."""
        return self.examples.length(index)

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns the model's inputs; see `Examples.inputs`.

        Raises:
            DataError: a file is not the one that was read first.
        """
        for i in indices:
            self.contents.read(self.split, i)
        return self.examples.inputs(indices, draw)


def _files_in(value: Any, place: str = "") -> Iterator[tuple[str, Path]]:
    """(place, path) of every file of an example; of a folder (a DICOM series), the files in it."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _files_in(part, f"{place}{i}.")
    elif isinstance(value, Path) and value.is_dir():
        for file in files_in(value):
            yield f"{place}/{file.relative_to(value).as_posix()}", file
    elif isinstance(value, Path):
        yield place, value


def _threaded(function: Any, items: Sequence[Any]) -> list[Any]:
    """Calls a function that waits for files for each item, in order."""
    groups = [items[i : i + _TOGETHER] for i in range(0, len(items), _TOGETHER)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [result for part in threads.map(lambda group: [function(item) for item in group], groups) for result in part]


def _line(key: str, record: Record) -> str:
    return json_line([key, *astuple(record)])
