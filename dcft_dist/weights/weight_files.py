"""Reads weight files slice by slice: safetensors, `.pth`, and the folders that transformers writes."""

from __future__ import annotations

import argparse
import codecs
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, line_of, listing
from .export import files_of_index

_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


_WHOLE = ("model.safetensors", "pytorch_model.bin")


# Keys under which training scripts store the weights.
_INSIDE = ("state_dict", "model_state_dict", "model", "network_weights", "teacher", "module")  # network_weights: nnU-Net
# Classes and functions that a file may name. Training scripts keep their arguments, and numpy's numbers and arrays, beside
# the weights. These hold values, and none of them runs code that the file brings.
_NUMPY: list[Any] = [np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]]  # what makes an array, and a number
_SAFE: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, codecs.encode]
_SAFE += [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")]
_SAFE += [
    (function, f"{module}.{function.__name__}")
    for function in _NUMPY
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
]


class WeightFiles:
    """The tensors of a file or folder by name, read on request. A context manager that closes the files."""

    def __init__(self, place: Path) -> None:
        """
        Args:
            place: a safetensors or `.pth` file, or a folder that transformers wrote.

        Raises:
            CheckpointError: `place` does not exist, holds no weights, or cannot be read.
        """
        self.place = place
        self._open, self._tensors = ExitStack(), dict[str, Any]()
        try:
            for file in _files(place):
                tensors = self._safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
                self._tensors.update(tensors)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from error

    def _safetensors(self, file: Path) -> dict[str, Any]:
        opened = self._open.enter_context(safe_open(file, framework="pt"))
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._open.close()

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __getitem__(self, name: str | RowBlock) -> Any:
        """A slice as in safetensors: it has `get_shape()`, and `[begin:end]` reads rows of the first dimension."""
        return _Rows(self._tensors[name.name], name) if isinstance(name, RowBlock) else self._tensors[name]

    def shape(self, name: str | RowBlock) -> tuple[int, ...]:
        """Shape of a stored tensor, or of some of its rows."""
        return tuple(self[name].get_shape())


@dataclass(frozen=True)
class RowBlock:
    """One of several equal parts of the rows of a stored tensor.

    Attributes:
        name: name of the tensor in the file.
        index: index of the part, from 0 on.
        number: number of parts.
    """

    name: str
    index: int
    number: int

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.number} of {self.name}"


class _Rows:
    """Some rows of a slice, with the interface of a slice."""

    def __init__(self, whole: Any, part: RowBlock) -> None:
        rows, *rest = whole.get_shape()
        if rows % part.number:
            raise CheckpointError(f"{part.name} has {rows} rows, which cannot be cut into {part.number} equal parts")
        self._whole, self._rows, self._rest = whole, rows // part.number, rest
        self._first = part.index * self._rows

    def get_shape(self) -> list[int]:
        return [self._rows, *self._rest]

    def __getitem__(self, key: Any) -> Tensor:
        start, stop, _ = (slice(None) if key is Ellipsis else key).indices(self._rows)
        selected: Tensor = self._whole[self._first + start : self._first + stop]
        return selected


class TensorSlice:
    """A tensor in memory, with the interface of a slice of safetensors."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Shape of the tensor."""
        return list(self._tensor.shape)

    def __getitem__(self, key: Any) -> Tensor:
        return self._tensor[key]


def missing_weights_advice(place: str) -> str:
    """Error message for weights that do not exist. If they may be a model of the Hugging Face hub, it explains the download.

    Args:
        place: the file or folder that does not exist.
    """
    text = f"{place} does not exist: give the file or folder of weights that you have downloaded"
    owner, _, name = place.partition("/")
    local = owner == "weights" or Path(owner).exists() or Path(name).suffix in (".safetensors", ".bin", ".pth", ".pt")
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        return text
    return (
        f"{text}; on a machine with internet access: hf download {place} --local-dir weights/{Path(place).name} "
        "(a gated model asks for your login, once its terms are accepted on its page)"
    )


def _files(place: Path) -> list[Path]:
    """The weight files at a place."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise CheckpointError(missing_weights_advice(str(place)))
    for name in _INDEXED:
        if (place / name).is_file():
            files = [place / part for part in sorted(set(files_of_index(place / name).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(f"{place} is incomplete: {listing(missing)} of its index are missing")
            return files
    for name in _WHOLE:
        if (place / name).is_file():
            return [place / name]
    raise CheckpointError(f"{place} holds no weights: none of {', '.join((*_INDEXED, *_WHOLE))}")


def _pickled(file: Path) -> dict[str, Any]:
    """Tensors of a file that `torch.save` wrote. Other objects in it are never created, so no code of the file runs."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the type depends on the damage
        try:
            with torch.serialization.safe_globals(_SAFE):  # torch before 1.6 wrote it: no memory mapping
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            raise CheckpointError(f"{file} cannot be read without running code in it: {line_of(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not named tensors")
    for key in _INSIDE:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(name): TensorSlice(value) for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no named tensors, but {listing(map(str, content))}")
    return tensors
