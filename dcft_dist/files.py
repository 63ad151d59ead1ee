"""Files that are either the old version or the new one, never half of it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a temporary file beside `path`, syncs it to disk, and renames it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")  # processes of other nodes too
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; what a killed process or a full disk left unfinished is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def table_of(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of equal length as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """Writes a safetensors file tensor by tensor, in the order given; it has its final name only once it is whole.

    `sha256` in its metadata is that of `seed` and all tensors' bytes. The first error is kept and raised by `close`, so
    that one rank may write while others bring the tensors.
    """

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str], seed: bytes = b""
    ) -> None:
        """`tensors`: name -> (dtype as safetensors spells it, shape, number of bytes)."""
        self._path, self._tensors, self._metadata = path, tensors, metadata
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._digest = hashlib.sha256(seed)
        self._failed: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._temporary.open("wb")
        self.write(self._header("0" * 64), counted=False)

    def write(self, data: bytes, counted: bool = True) -> None:
        """The next bytes of the tensors."""
        if counted:
            self._digest.update(data)
        try:
            if self._failed is None:
                self._handle.write(data)
        except OSError as error:  # a full disk
            self._failed = error

    def close(self) -> None:
        """
        Raises:
            OSError: something could not be written.
        """
        if self._failed is not None:
            self._temporary.unlink(missing_ok=True)
            raise self._failed
        self._handle.seek(0)
        self._handle.write(self._header(self._digest.hexdigest()))
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        self._temporary.replace(self._path)

    def _header(self, checksum: str) -> bytes:
        """Its length does not depend on the checksum's value, so it can be rewritten in place."""
        entries: dict[str, Any] = {"__metadata__": {**self._metadata, "sha256": checksum}}
        offset = 0
        for name, (dtype, shape, size) in self._tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def is_altered(path: Path) -> bool:
    """Whether a file that `TensorFile` wrote (without seed) has other bytes now; a file without checksum is not.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:  # of some other kind of file, and maybe more than the memory
            raise ValueError("no header")
        checksum = json.loads(file.read(length)).get("__metadata__", {}).get("sha256")
        return checksum is not None and hashlib.file_digest(file, "sha256").hexdigest() != checksum
