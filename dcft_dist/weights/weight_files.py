"""Weights in files, read a slice at a time: safetensors, `.pth`, and the folders that transformers writes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, line_of, listing
from ..files import read_json

_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


_WHOLE = ("model.safetensors", "pytorch_model.bin")


_INSIDE = ("state_dict", "model_state_dict", "model", "teacher", "module")  # where training scripts put the weights


class WeightFiles:
    """The tensors of a file or folder by name; a context manager. Nothing is read before it is asked for."""

    def __init__(self, place: Path) -> None:
        """
        Raises:
            CheckpointError: there is no such file or folder, it holds no weights, or it cannot be read.
        """
        self.place = place
        self._open, self._tensors = ExitStack(), dict[str, Any]()
        try:
            for file in _files(place):
                found = self._safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
                self._tensors.update(found)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from error

    def _safetensors(self, file: Path) -> dict[str, Any]:
        opened = self._open.enter_context(safe_open(file, framework="pt"))
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._open.close()

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __getitem__(self, name: str | RowBlock) -> Any:
        """A slice as safetensors has it: `get_shape()`, and `[begin:end]` over the first dimension."""
        return _Rows(self._tensors[name.name], name) if isinstance(name, RowBlock) else self._tensors[name]

    def shape(self, name: str | RowBlock) -> tuple[int, ...]:
        return tuple(self[name].get_shape())


@dataclass(frozen=True)
class RowBlock:
    """One of several equal parts of the rows of a stored tensor."""

    name: str
    index: int
    number: int

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.number} of {self.name}"


class _Rows:
    """Some rows of a slice, as a slice."""

    def __init__(self, whole: Any, part: RowBlock) -> None:
        rows, *rest = whole.get_shape()
        if rows % part.number:
            raise CheckpointError(f"{part.name} has {rows} rows, which are no {part.number} equal parts")
        self._whole, self._rows, self._rest = whole, rows // part.number, rest
        self._first = part.index * self._rows

    def get_shape(self) -> list[int]:
        return [self._rows, *self._rest]

    def __getitem__(self, key: Any) -> Tensor:
        start, stop, _ = (slice(None) if key is Ellipsis else key).indices(self._rows)
        found: Tensor = self._whole[self._first + start : self._first + stop]
        return found


class TensorSlice:
    """A tensor as safetensors' slices are."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, key: Any) -> Tensor:
        return self._tensor[key]


def missing_weights_advice(place: str) -> str:
    """What to say of weights that are not there; with advice where it may be the name of a model in the hub."""
    text = f"{place} is not there: give the file or folder of weights that you have downloaded"
    owner, _, name = place.partition("/")
    local = owner == "weights" or Path(owner).exists() or Path(name).suffix in (".safetensors", ".bin", ".pth", ".pt")
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        return text
    return (
        f"{text}; where there is internet: hf download {place} --local-dir weights/{Path(place).name} (a gated model asks "
        "for your login, once its terms are accepted on its page)"
    )


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise CheckpointError(missing_weights_advice(str(place)))
    for name in _INDEXED:
        if (place / name).is_file():
            files = [place / part for part in sorted(set(read_json(place / name)["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(f"{place} is not whole: {listing(missing)} of its index are missing")
            return files
    for name in _WHOLE:
        if (place / name).is_file():
            return [place / name]
    raise CheckpointError(f"{place} holds no weights: none of {', '.join((*_INDEXED, *_WHOLE))}")


def _pickled(file: Path) -> dict[str, Any]:
    """Tensors of a file of `torch.save`; other objects than tensors are never made."""
    try:
        # Training scripts keep their arguments beside the weights: names and values, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # each kind of damage has its own
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)  # written by torch before 1.6: cannot be mapped
        except Exception:
            raise CheckpointError(f"{file} cannot be read without running code in it: {line_of(error)}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not named tensors")
    for key in _INSIDE:
        if isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {str(name): TensorSlice(value) for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no named tensors, but {listing(map(str, found))}")
    return tensors
