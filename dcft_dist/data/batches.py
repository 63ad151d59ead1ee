"""Batches: (seed, epoch, step, rank) alone decide which examples go to which rank at which step."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DcftError, TemporaryError, alone, line_of
from .splits import Split

# Tensors of one batch by name. Every batch has `labels` and `index` [size], and `real` [size] (False: padding).
# The other entries are the model's inputs: `input_ids` and `attention_mask` [size, tokens],
# or `pixel_values` [size, 3, side, side].
Batch = dict[str, Tensor]


class Examples(Protocol):
    """A split in the form that a model takes."""

    @property
    def labels(self) -> list[Any]:
        """The label of each example."""
        ...

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Returns the length of an example; examples of similar length are evaluated together."""

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns the model's inputs for some examples.

        Args:
            indices: which examples, by position in the split.
            draw: None: whole examples, to evaluate. A number: training inputs. 0: without random variation. An epoch: that
                epoch's random variants.

        Returns:
            Tensors [size, ...] by the name of the model's argument.
        """


class Processor(ABC):
    """Turns the examples of a split into tensors.

    Attributes:
        drawn_as: how to read what `picture` draws; may be empty.
    """

    drawn_as = ""

    @abstractmethod
    def __call__(self, split: Split) -> Examples:
        """Returns the split in the form that the model takes."""

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every input that can be damaged once. Each rank reads its part.

        Args:
            splits: the three splits before a run, or one split before a prediction.
            rank: this rank.
            ranks: number of ranks.

        Raises:
            DataError: some inputs cannot be read; the message names the first.
        """
        return None

    def describe(self, value: Any, label: Any) -> str:
        """Describes in a few words what was understood of one input, and of a label that is a mask or a text.

        Args:
            value: input of an example.
            label: its label.
        """
        return f"{type(value).__name__}"

    def picture(self, value: Any, label: Any) -> NDArray[np.uint8] | None:
        """Draws one input as the model sees it: [height, width, 3]; None if it cannot be drawn. Arguments as above."""
        return None

    def save(self, folder: Path) -> None:
        """Writes the files from which transformers loads the tokenizer or image processor, if the model has one."""
        return None

    def classes_seen(self, split: Split) -> set[int] | None:
        """Returns the classes in the masks of a split that `check` read on this rank; None if the labels are not masks."""
        return None


@dataclass(frozen=True)
class OneByOne:
    """A split of images or volumes, read from their files one at a time.

    Attributes:
        sources: path or array of each example.
        labels: label of each example.
        name: name of the model's argument.
        make: reads one input: (source, name of its random variant or None) -> tensor.
    """

    sources: list[Any]
    labels: list[Any]
    name: str
    make: Callable[[Any, str | None], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        """Returns 0: all inputs have one size."""
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns {`name`: [size, ...]}; see `Examples.inputs`."""
        return {self.name: torch.stack([self.make(self.sources[i], f"{draw}:{i}" if draw else None) for i in indices])}


def make_batch(
    examples: Examples,
    indices: Sequence[int],
    device: torch.device,
    real: int | None = None,
    draw: int | None = None,
) -> Batch:
    """Builds one batch.

    Args:
        examples: the split.
        indices: which examples, by position in the split.
        device: where the tensors go.
        real: only the first `real` examples count, the rest are padding. None: all count.
        draw: random variant of the examples; see `Examples.inputs`.

    Raises:
        DataError: an input cannot be read.
    """
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
    """Returns the order of the training examples in one epoch.

    Args:
        seed: the run's seed.
        epoch: number of the epoch.
        size: number of training examples.
        classes: class of each example. If given, `size` examples are drawn with replacement, all classes equally likely.
            None: a permutation.
    """
    generator = np.random.default_rng([seed, epoch])
    if classes is None:
        return [int(i) for i in generator.permutation(size)]
    counts = np.bincount(classes)
    weights = 1 / counts[np.asarray(classes)]
    return [int(i) for i in generator.choice(size, size, p=weights / weights.sum())]


def micro_batches(
    indices: Sequence[int],
    rank: int,
    ranks: int,
    micro_batch: int,
    examples: Examples,
    device: torch.device,
    draw: int | None = None,
) -> list[Batch]:
    """Returns this rank's part of one global batch, cut into micro-batches of equal size.

    Args:
        indices: the examples of the global batch.
        rank: this rank.
        ranks: number of ranks; must divide the size of the global batch.
        micro_batch: examples in a micro-batch; must divide a rank's part.
        examples: the training split.
        device: where the tensors go.
        draw: random variant of the examples; see `Examples.inputs`.
    """
    share = len(indices) // ranks
    own_indices = indices[rank * share : (rank + 1) * share]
    return [make_batch(examples, own_indices[i : i + micro_batch], device, draw=draw) for i in range(0, share, micro_batch)]


def evaluation_batches(
    examples: Examples, rank: int, ranks: int, size: int, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """Yields this rank's batches of an evaluation, in which every example occurs once over all ranks.

    Every rank gets the same number of batches; the last ones may be padded.

    Args:
        examples: the split.
        rank: this rank.
        ranks: number of ranks.
        size: examples in a batch of one rank.
        device: where the tensors go.
        limit: evaluate only this many examples, evenly spaced over the split. None: all.
    """
    total = len(examples)
    indices = (
        list(range(total)) if limit is None or limit >= total else [int(i) for i in np.linspace(0, total - 1, limit).round()]
    )
    indices.sort(key=examples.length)  # less padding where texts of similar length are together
    for begin in range(0, len(indices), size * ranks):
        own_indices = indices[begin : begin + size * ranks][rank::ranks]
        filler = [indices[0]] * (1 if not own_indices else 0)  # every rank must take part in every forward
        yield make_batch(examples, own_indices + filler, device, real=len(own_indices))


Make = Callable[[int], list[Batch]]  # step -> this rank's micro-batches, on the CPU


def is_of_worker(error: Exception) -> bool:
    """Whether torch says that a process that reads data has ended. It says so by a signal, anywhere in the program."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def worker_error(error: Exception) -> DcftError:
    """The error of a process that reads data: it was killed, or shared memory or file handles have run out."""
    return alone(
        TemporaryError(
            f"a process that reads training data has ended: {line_of(error, -1)}. If it was killed for memory, set "
            "train.workers lower; if /dev/shm is full, enlarge it, or set train.workers = 0"
        )
    )


class _Steps(Dataset[list[Batch] | DcftError]):
    """The micro-batches by step, for a `DataLoader`."""

    def __init__(self, make: Make) -> None:
        self._make = make

    def __getitem__(self, step: int) -> list[Batch] | DcftError:
        try:
            return self._make(step)
        except DcftError as error:  # returned, because a worker would wrap a raised error into its own traceback
            return error


def _leave_signals_to_rank(worker: int) -> None:
    """Ctrl-C, and SIGTERM to a whole group, reach a worker too. It goes on until its rank asks it to end, or has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Feed:
    """Loads the micro-batches of the training steps, ahead of time if there are worker processes."""

    def __init__(self, make: Make, workers: int, device: torch.device) -> None:
        """Prepares the feed; nothing is read yet.

        Args:
            make: step -> this rank's micro-batches, on the CPU.
            workers: number of worker processes; 0: this process reads.
            device: where the micro-batches go.
        """
        self._steps, self._workers, self._device = _Steps(make), workers, device
        self._loaded: Iterator[list[Batch] | DcftError] = iter(())
        self._next: int | None = None

    def get(self, step: int, end: int) -> list[Batch]:
        """Returns the micro-batches of a step, on the device.

        Args:
            step: which step; a jump restarts the workers.
            end: the feed prepares steps below this one.

        Raises:
            DataError: an input cannot be read.
            TemporaryError: a worker process was ended from outside, or the shared memory is full.
        """
        try:
            if step != self._next:
                loader = DataLoader(
                    self._steps,
                    batch_size=None,
                    sampler=range(step, end),
                    num_workers=self._workers,
                    pin_memory=self._device.type == "cuda",
                    worker_init_fn=_leave_signals_to_rank,
                )
                self._loaded = iter(loader)
            batches = next(self._loaded)
        except (RuntimeError, OSError) as error:
            if not self._workers:
                raise
            raise worker_error(error) from error
        if isinstance(batches, DcftError):
            raise batches
        self._next = step + 1
        return [{key: value.to(self._device, non_blocking=True) for key, value in batch.items()} for batch in batches]
