"""Hashes of files: of all of a file, or of its two ends, by which most files differ."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import DataError

END = 64 * 1024  # bytes at each end of a file


def hash_of(file: Path, whole: bool) -> str:
    """BLAKE2b of a file, or of its first and last 64 KiB, as 32 hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            if whole:
                return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            begin = stream.read(END)
            stream.seek(max(len(begin), os.fstat(stream.fileno()).st_size - END))
            return hashlib.blake2b(begin + stream.read(END), digest_size=16).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
