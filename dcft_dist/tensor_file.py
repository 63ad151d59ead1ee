"""Writes safetensors files tensor by tensor, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import IO, Any

from .files import temporary_name

_BLANK = "0" * 31 + "x"  # stands for the checksum of the header while that is computed


class TensorFile:
    """Writes a safetensors file tensor by tensor. The file gets its final name when it is complete.

    The metadata key `sha256` is the checksum of `seed` and the bytes of all tensors; `header` is that of the header. `write`
    stores an error of the disk, and `close` raises it. The rank that writes can therefore still take part in the collectives
    that bring the tensors.
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
        self._temporary = temporary_name(path)
        self._digest = hashlib.sha256(seed)
        self._failed: OSError | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._temporary.open("xb")
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
        try:
            self._handle.seek(0)
            self._handle.write(self._header(self._digest.hexdigest()))
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            self._temporary.replace(self._path)
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise

    def _header(self, checksum: str) -> bytes:
        """The header of the file. Its length is the same for every checksum, so it can be replaced in place."""
        entries: dict[str, Any] = {"__metadata__": {**self._metadata, "sha256": checksum, "header": _BLANK}}
        offset = 0
        for name, (dtype, shape, size) in self._tensors.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text.replace(_BLANK.encode(), _checksum(text).encode())


def is_altered(path: Path) -> bool:
    """Whether a file differs from the checksums that `TensorFile` stored (without `seed`).

    Args:
        path: a safetensors file.

    Returns:
        True if it differs; False if it does not, or has no checksums.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a safetensors file.
    """
    with path.open("rb") as file:
        text, metadata = _header_in(file)
        seal, checksum = metadata.get("header"), metadata.get("sha256")
        if seal is not None and _checksum(text.replace(str(seal).encode(), _BLANK.encode())) != seal:
            return True
        return checksum is not None and hashlib.file_digest(file, "sha256").hexdigest() != checksum


def stored_checksum(path: Path) -> str:
    """The checksum of the tensors that a file states; empty if it states none, or cannot be read. It is not computed."""
    try:
        with path.open("rb") as file:
            return str(_header_in(file)[1].get("sha256", ""))
    except (OSError, ValueError):
        return ""


def _header_in(file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The header of an open file as bytes, and the metadata in it.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > os.fstat(file.fileno()).st_size:  # another kind of file; its "length" may exceed the memory
        raise ValueError("no header")
    text = file.read(length)
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("no header") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("no header")
    return text, metadata


def _checksum(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[: len(_BLANK)]
