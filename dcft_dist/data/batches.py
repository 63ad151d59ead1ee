"""Batches: which examples go to which rank at which step is a function of (seed, epoch, step, rank) alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, DcftError, alone
from .splits import Split

# `labels`, `index` [size]; `real` [size] (False: padding); and the inputs: `input_ids`, `attention_mask` [size, tokens], or
# `pixel_values` [size, 3, side, side].
Batch = dict[str, Tensor]


class Examples(Protocol):
    """A split as a model takes it."""

    @property
    def labels(self) -> list[Any]: ...

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Examples of like length are evaluated together."""

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`draw`: which random variant of the examples to train on (an epoch; 0: none); None: whole ones to evaluate."""


class Processor(ABC):
    """Makes inputs of a split."""

    @abstractmethod
    def __call__(self, split: Split) -> Examples:
        """The split as the model takes it."""

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads all inputs once, each rank its part, where they could be damaged.

        Raises:
            DataError: some cannot be read; the first are named.
        """
        return None

    def save(self, folder: Path) -> None:
        """Writes what transformers reads as a tokenizer or image processor, if there is such a thing."""
        return None

    def classes_seen(self, split: Split) -> set[int] | None:
        """Classes in the masks of a split, as far as `check` has read them on this rank; None where labels are no masks."""
        return None


@dataclass(frozen=True)
class OneByOne:
    """A split whose inputs are made one at a time, from files: images, volumes. `make`: of a source, and which variant."""

    sources: list[Any]
    labels: list[Any]
    name: str
    make: Callable[[Any, str | None], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`name` [size, ...]."""
        return {self.name: torch.stack([self.make(self.sources[i], f"{draw}:{i}" if draw else None) for i in indices])}


def make_batch(
    examples: Examples,
    indices: Sequence[int],
    device: torch.device,
    real: int | None = None,
    draw: int | None = None,
) -> Batch:
    """Only the first `real` samples count."""
    try:
        inputs = examples.inputs(indices, draw)
    except DcftError as error:
        alone(error)  # other ranks read other examples
        raise
    batch = {
        "labels": torch.tensor([examples.labels[i] for i in indices]),
        **inputs,
        "real": torch.arange(len(indices)) < (len(indices) if real is None else real),
        "index": torch.tensor(indices),
    }
    return {key: value.to(device) for key, value in batch.items()}


def order(seed: int, epoch: int, size: int, classes: Sequence[int] | None = None) -> list[int]:
    """The permutation of the training data in one epoch; with `classes`, as many draws, all classes equally likely."""
    draw = np.random.default_rng([seed, epoch])
    if classes is None:
        return [int(i) for i in draw.permutation(size)]
    counts = np.bincount(classes)
    weights = 1 / counts[np.asarray(classes)]
    return [int(i) for i in draw.choice(size, size, p=weights / weights.sum())]


def micro_batches(
    indices: Sequence[int],
    rank: int,
    ranks: int,
    micro_batch: int,
    examples: Examples,
    device: torch.device,
    draw: int | None = None,
) -> list[Batch]:
    """This rank's part of one global batch, cut into micro-batches of equal size."""
    share = len(indices) // ranks
    mine = indices[rank * share : (rank + 1) * share]
    return [make_batch(examples, mine[i : i + micro_batch], device, draw=draw) for i in range(0, share, micro_batch)]


def evaluation_batches(
    examples: Examples, rank: int, ranks: int, size: int, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """Every example once over all ranks, in batches of `size` a rank, as many on every rank: the last are padded.

    With `limit`, an even sample of that many.
    """
    n = len(examples)
    wanted = list(range(n)) if limit is None or limit >= n else [int(i) for i in np.linspace(0, n - 1, limit).round()]
    wanted.sort(key=examples.length)  # texts of like length together: less padding
    for begin in range(0, len(wanted), size * ranks):
        mine = wanted[begin : begin + size * ranks][rank::ranks]
        filler = [wanted[0]] * (1 if not mine else 0)  # no rank may skip a forward that the others take part in
        yield make_batch(examples, mine + filler, device, real=len(mine))


Make = Callable[[int], list[Batch]]  # step -> this rank's micro-batches, on the CPU


class _Steps(Dataset[list[Batch] | DcftError]):
    def __init__(self, make: Make) -> None:
        self._make = make

    def __getitem__(self, step: int) -> list[Batch] | DcftError:
        try:
            return self._make(step)
        except DcftError as error:  # a worker would wrap it into its own traceback
            return error


class Feed:
    """Gives the micro-batches of one step after the other."""

    def __init__(self, make: Make, workers: int, device: torch.device) -> None:
        self._steps, self._workers, self._device = _Steps(make), workers, device
        self._made: Iterator[list[Batch] | DcftError] = iter(())
        self._next: int | None = None

    def get(self, step: int, end: int) -> list[Batch]:
        """The micro-batches of a step, on the device. `end`: no step from there on will be asked for.

        Raises:
            DataError: an input cannot be read, or a worker process was killed.
        """
        if step != self._next:
            loader = DataLoader(self._steps, batch_size=None, sampler=range(step, end), num_workers=self._workers)
            self._made = iter(loader)
        try:
            found = next(self._made)
        except RuntimeError as error:
            raise alone(DataError(f"a process that reads training data has died at step {step}: {error}")) from error
        if isinstance(found, DcftError):
            raise found
        self._next = step + 1
        return [{key: value.to(self._device, non_blocking=True) for key, value in batch.items()} for batch in found]
