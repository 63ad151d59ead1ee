"""Reads and writes files. A written file is always complete: a crash leaves the old version, never half of the new one."""

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
    """Replaces a file in one step: writes a temporary file beside it, syncs it to disk, and renames it.

    Args:
        path: the file; its folder is created if it does not exist.
        content: a text, stored as UTF-8, or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique among processes, also those of other nodes.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Replaces a file by `data` as indented JSON, in one step."""
    write_atomic(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object on each line.

    Args:
        path: the file; need not exist.

    Returns:
        The objects. Lines that a killed process or a full disk left incomplete are skipped.
    """
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def table_of(columns: Mapping[str, Sequence[Any]]) -> str:
    """Formats columns as CSV.

    Args:
        columns: header -> values; all columns have the same length.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """Writes a safetensors file tensor by tensor. The file gets its final name when it is complete.

    The metadata key `sha256` is the checksum of `seed` and the bytes of all tensors. `write` stores an error of the disk,
    and `close` raises it. The rank that writes can therefore still take part in the collectives that bring the tensors.
    """

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str], seed: bytes = b""
    ) -> None:
        """
        Args:
            path: the file; its folder is created if it does not exist.
            tensors: name -> (data type as safetensors spells it, shape, number of bytes), in the order of the writes.
            metadata: further metadata of the file.
            seed: bytes that the checksum starts with.
        """
        self._path, self._tensors, self._metadata = path, tensors, metadata
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._digest = hashlib.sha256(seed)
        self._failed: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._temporary.open("wb")
        self.write(self._header("0" * 64), counted=False)

    def write(self, data: bytes, counted: bool = True) -> None:
        """Appends bytes.

        Args:
            data: the next bytes of the tensors.
            counted: True: include them in the checksum.
        """
        if counted:
            self._digest.update(data)
        try:
            if self._failed is None:
                self._handle.write(data)
        except OSError as error:  # a full disk
            self._failed = error

    def close(self) -> None:
        """Writes the checksum and gives the file its final name.

        Raises:
            OSError: this or an earlier write failed. The final file is then unchanged.
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
        """The header of the file. Its length is the same for every checksum, so it can be replaced in place."""
        entries: dict[str, Any] = {"__metadata__": {**self._metadata, "sha256": checksum}}
        offset = 0
        for name, (dtype, shape, size) in self._tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def is_altered(path: Path) -> bool:
    """Whether the tensors of a file differ from the checksum that `TensorFile` stored (without `seed`).

    Args:
        path: a safetensors file.

    Returns:
        True if they differ; False if they are equal, or the file has no checksum.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:  # another kind of file; its "length" may exceed the memory
            raise ValueError("no header")
        checksum = json.loads(file.read(length)).get("__metadata__", {}).get("sha256")
        return checksum is not None and hashlib.file_digest(file, "sha256").hexdigest() != checksum
