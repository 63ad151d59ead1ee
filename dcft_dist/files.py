"""Reads and writes files. A written file is always complete: a crash leaves the old version, never half of the new one.

Every JSON object that is written, in a file or in a line, carries a seal: a checksum under the key `seal`. A reader that
finds another checksum says that the file is damaged. Objects without a seal, from older versions, are read as they are.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import DamagedError, DataError, DcftError, line_of

SEAL = "seal"

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk or a quota that is full


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: writes a temporary file beside it, syncs it to disk, and renames it.

    A symbolic link is replaced; what it points to does not change.

    Args:
        path: the file; its folder is created if it does not exist.
        content: a text, stored as UTF-8, or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk: leave it no fuller
        raise


def temporary_name(path: Path) -> Path:
    """A hidden name beside a file, unique among processes, also those of other nodes."""
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def open_own(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> IO[bytes]:
    """Opens a file of ours for reading and writing, unbuffered.

    Args:
        path: the file.
        flags: as for `os.open`.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link: it might lead to a file of somebody else.
    """
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b", buffering=0)


# -- JSON --------------------------------------------------------------------------------------------------------------


def write_json(path: Path, data: Mapping[str, Any], seal: bool = True) -> None:
    """Replaces a file by `data` as JSON, in one step; without a seal if other programs read it."""
    write_atomic(path, json.dumps(_sealed(data) if seal else data, indent=2) + "\n")


def read_json(path: Path, *keys: str) -> Any:
    """The content of a JSON file, without its seal.

    Args:
        path: the file.
        *keys: keys that it must have; none: it may be any JSON.

    Raises:
        DamagedError: it is no JSON, its seal is wrong, or a key is missing.
        OSError: it cannot be read.
    """
    try:
        data = _opened(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({line_of(error)})") from error
    if missing := [key for key in keys if not isinstance(data, dict) or key not in data]:
        raise DamagedError(f"{path} is damaged (it has no {missing[0]})")
    return data


def read_json_or(path: Path, otherwise: Any, *keys: str) -> Any:
    """The content of a JSON file; `otherwise` if the file is missing or damaged. For what is only shown."""
    try:
        return read_json(path, *keys)
    except (OSError, DamagedError):
        return otherwise


@contextmanager
def expected_form(place: Path) -> Iterator[None]:
    """Inside the block, files of a run or study are read that may have been made by anybody.

    Raises:
        DataError: they have an unexpected form.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        if isinstance(error, DcftError):
            raise
        raise DataError(f"{place}: a file has an unexpected form ({type(error).__name__}: {line_of(error)})") from error


def append_line(path: Path, data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Appends `data` as one sealed line of JSON. If that fails, the file is as before.

    Args:
        path: the file; its folder exists.
        data: an object or a list.

    Raises:
        OSError: the disk is full, the file cannot be written, or it is a symbolic link.
    """
    with open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a process that was killed
        line = ("\n" if torn else "").encode() + json_line(data).encode()
        if file.write(line) != len(line):
            os.ftruncate(file.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def json_line(data: Mapping[str, Any] | Sequence[Any]) -> str:
    """One sealed line of JSON, with its end."""
    return json.dumps(_sealed(data)) + "\n"


def read_lines(path: Path, damaged: Any = None) -> list[Any]:
    """Reads a file with JSON on each line.

    Args:
        path: the file; need not exist.
        damaged: what stands for a line that is damaged; None: such lines are left out. A last line without its end is always
            left out: a killed process or a full disk left it incomplete.

    Returns:
        The lines, without their seals.
    """
    text = path.read_bytes() if path.exists() else b""
    rows = []
    for line in text.split(b"\n"):
        try:
            rows.append(_opened(json.loads(line)))
        except (ValueError, RecursionError):
            if line.strip() and damaged is not None:
                rows.append(damaged)
    torn = damaged is not None and bool(text) and not text.endswith(b"\n") and rows[-1:] == [damaged]
    return rows[:-1] if torn else rows


def objects_in(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The lines of a file that are objects with certain keys."""
    return [row for row in read_lines(path) if isinstance(row, dict) and row.keys() >= set(keys)]


def _sealed(data: Mapping[str, Any] | Sequence[Any]) -> Any:
    """The same object or list with its checksum: under the key `seal`, or as a last element."""
    plain = json.loads(json.dumps(data))
    if isinstance(plain, dict):
        plain.pop(SEAL, None)  # of what was read without this module
    return {**plain, SEAL: _checksum(plain)} if isinstance(plain, dict) else [*plain, f"{SEAL} {_checksum(plain)}"]


def _opened(data: Any) -> Any:
    """Removes the seal.

    Raises:
        ValueError: it does not fit.
    """
    plain, seal = data, None
    if isinstance(data, dict) and SEAL in data:
        plain, seal = {key: value for key, value in data.items() if key != SEAL}, data[SEAL]
    elif isinstance(data, list) and data and isinstance(data[-1], str) and data[-1].startswith(f"{SEAL} "):
        plain, seal = data[:-1], data[-1].removeprefix(f"{SEAL} ")
    if seal is not None and seal != _checksum(plain):
        raise ValueError("its checksum is another: it was altered after it was written")
    return plain


def _checksum(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


# -- tables, checksums ---------------------------------------------------------------------------------------------------


def table_of(columns: Mapping[str, Sequence[Any]]) -> str:
    """Formats columns as CSV. Text that a spreadsheet would take for a formula gets an apostrophe before it.

    Args:
        columns: header -> values; all columns have the same length.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_no_formula, columns))
    writer.writerows(map(_no_formula, row) for row in zip(*columns.values(), strict=True))
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """Spreadsheets run text that begins with one of these signs, which may come from a stranger's table. Numbers stay."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in the folders in it, sorted."""
    return (file for file in sorted(folder.rglob("*")) if file.is_file())
