"""Runs score batches: forward, backward and the reduced gradient. The state of the model is restored afterwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..compat.pytorch import has_values
from ..distributed import collectives
from ..engines.base import Engine
from ..errors import ScoreError, alone

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | int | float]]


def score_batches(batches: Iterable[Any], accumulation: int) -> Iterator[list[Any]]:
    """Yields groups of `accumulation` items. Collective.

    All ranks check that every rank has its items. Otherwise a rank could wait forever for another. If `batches` has a length
    on every rank, they check once; otherwise before each group, for which a GPU has to be waited for.

    Args:
        batches: this rank's items.
        accumulation: items per score batch and rank.

    Raises:
        ScoreError: the ranks have unequal numbers of items, or a number that is not a multiple of `accumulation`.
    """
    iterator = iter(batches)
    lengths = [n for (n,) in collectives.all_gather_ints([_length(batches)], what="count of score items")]
    if all(n >= 0 for n in lengths):
        if len(set(lengths)) > 1 or lengths[0] % accumulation:
            raise _uneven(accumulation, lengths)
        for _ in range(lengths[0] // accumulation):
            items = list(itertools.islice(iterator, accumulation))
            if len(items) < accumulation:
                rank = collectives.rank()
                raise alone(ScoreError(f"rank {rank}: batches has a length of {lengths[0]}, but ended before"))
            yield items
        next(iterator, None)  # lets it end: a progress bar that is in it shows 100 %, processes that read stop
        return
    while True:
        items = list(itertools.islice(iterator, accumulation))
        counts = [n for (n,) in collectives.all_gather_ints([len(items)], what="count of score items")]
        if not any(counts):
            return
        if set(counts) != {accumulation}:
            raise _uneven(accumulation, counts)
        yield items


def _length(batches: Any) -> int:
    """Number of items, or -1 if only reading them would tell."""
    try:
        return len(batches)
    except TypeError:
        return -1


def _uneven(accumulation: int, counts: list[int]) -> ScoreError:
    return ScoreError(
        f"a score batch takes {accumulation} items from every rank, but the ranks have {counts} left: "
        "give each rank the same number of items, a multiple of accumulation"
    )


class Losses:
    """Losses and counts of score batches. They are read at the end, so that no batch waits for a GPU."""

    def __init__(self) -> None:
        self._losses: list[list[Tensor]] = []
        self._counts: list[list[Tensor | float]] = []

    @property
    def num_batches(self) -> int:
        """Number of score batches."""
        return len(self._losses)

    def add(self, losses: list[Tensor], counts: list[Tensor | float]) -> None:
        """Adds one score batch: the losses of its items on this rank, and their counts."""
        self._losses.append(losses)
        self._counts.append(counts)

    def means(self) -> list[float]:
        """The mean loss of each score batch over all ranks. Collective; waits for the device.

        Raises:
            ScoreError: a mean is not finite, or a whole score batch has a count of 0.
        """
        if not self._losses:
            return []
        sums, counts = (_sums(rows) for rows in (self._losses, self._counts))
        both = collectives.reduce_numbers([*sums, *counts], what="score loss")
        means = []
        for index, (loss, count) in enumerate(zip(both[: len(sums)], both[len(sums) :], strict=True)):
            if count <= 0:
                raise ScoreError("loss_fn returned a count of 0 for a whole score batch: every score batch needs samples")
            means.append(loss / count)
            if not np.isfinite(means[-1]):
                raise ScoreError(
                    f"the loss of a score batch is {means[-1]} (number {index}), but scores need a finite loss: check the "
                    "data and the model"
                )
        return means


def _sums(rows: Sequence[Sequence[Tensor | float]]) -> list[float]:
    """The sum of each row; tensors are read all at once."""
    tensors = [value.reshape(()) for row in rows for value in row if isinstance(value, Tensor)]
    stacked = torch.stack(tensors).double() if tensors else torch.zeros(0)
    read = iter(stacked.tolist() if has_values(stacked) else [1.0] * len(tensors))  # without values: `dcft plan`
    return [sum(next(read) if isinstance(value, Tensor) else value for value in row) for row in rows]


def backward_batch(engine: Engine, items: list[Any], loss_fn: LossFn, losses: Losses) -> float | Tensor:
    """Runs forward and backward of one score batch, inside `undisturbed`. Collective. Waits for no device.

    Args:
        engine: the engine of the model.
        items: this rank's items of the score batch.
        loss_fn: `loss_fn(model, item)` returns the mean loss as a scalar tensor, or `(sum, count)`.
        losses: gets the losses of the items.

    Returns:
        A divisor: reduced gradient / divisor = gradient of the mean loss of the score batch over all ranks.

    Raises:
        ScoreError: the loss is not a scalar with a gradient, or only some ranks return counts.
    """
    model = engine.scoring_model()
    found: list[Tensor] = []
    counts: list[Tensor | float] = []
    counted = False
    for i, item in enumerate(items):
        engine.expect(last=i == len(items) - 1)
        result = loss_fn(model, item)
        counted = isinstance(result, tuple)
        loss, count = result if isinstance(result, tuple) else (result, 1.0)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ScoreError("loss_fn must return a scalar tensor with a gradient, or (sum, count)")
        engine.backward(loss)
        found.append(loss.detach())
        counts.append(count.detach() if isinstance(count, Tensor) else float(count))
    engine.reduce_gradients()
    if losses.num_batches == 0 and collectives.world_size() > 1:
        kinds = collectives.all_gather_ints([int(counted)], what="kind of the score loss")
        if kinds.count(kinds[0]) != len(kinds):
            raise ScoreError("loss_fn returns (sum, count) on some ranks only: return the same on every rank")
    losses.add(found, counts)
    if not counted:
        return float(len(items))
    ranks = collectives.world_size()
    if ranks == 1 and not any(isinstance(count, Tensor) for count in counts):
        return sum(map(float, counts)) or 1.0  # a count of 0 is an error, said with the losses
    tensors = [torch.as_tensor(count, dtype=torch.float64, device=found[0].device).view(1) for count in counts]
    total = tensors[0] if len(tensors) == 1 else torch.cat(tensors).sum(0, keepdim=True)
    return collectives.all_reduce(total, what="count of a score batch").view(()) / ranks


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Runs the block in eval mode with empty gradients, then restores modes, buffers, gradients and random states."""
    modes = [(m, m.training) for m in engine.model.modules()]
    # Saved by module and key, since a forward may replace a buffer by a new tensor.
    buffers = [(m, k, b, b.detach().clone()) for m in engine.module.modules() for k, b in m.named_buffers(recurse=False)]
    with ExitStack() as stack:
        stack.enter_context(random_states_kept())
        stack.enter_context(engine.gradients_aside())
        engine.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, key, buffer, saved in buffers:
                    setattr(module, key, buffer.copy_(saved))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restores the random states of Python, NumPy and torch (CPU and all GPUs) after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
