"""Runs score batches: forward, backward and the reduced gradient. The state of the model is restored afterwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Engine
from ..errors import ScoreError

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | int | float]]


def score_batches(batches: Iterable[Any], accumulation: int) -> Iterator[list[Any]]:
    """Yields groups of `accumulation` items. Collective.

    Before each group all ranks check that every rank has its items. Otherwise a rank could wait forever for another.

    Args:
        batches: this rank's items.
        accumulation: items per score batch and rank.

    Raises:
        ScoreError: the ranks have unequal numbers of items, or a number that is not a multiple of `accumulation`.
    """
    iterator = iter(batches)
    while True:
        items = list(itertools.islice(iterator, accumulation))
        counts = [n for (n,) in collectives.all_gather_ints([len(items)], what="count of score items")]
        if not any(counts):
            return
        if set(counts) != {accumulation}:
            raise ScoreError(
                f"a score batch takes {accumulation} items from every rank, but the ranks have {counts} left: "
                "give each rank the same number of items, a multiple of accumulation"
            )
        yield items


def backward_batch(engine: Engine, items: list[Any], loss_fn: LossFn) -> tuple[float, float]:
    """Runs forward and backward of one score batch, inside `undisturbed`. Collective.

    Args:
        engine: the engine of the model.
        items: this rank's items of the score batch.
        loss_fn: `loss_fn(model, item)` returns the mean loss as a scalar tensor, or `(sum, count)`.

    Returns:
        The mean loss of the score batch over all ranks. Then a scale: reduced gradient x scale = gradient of that mean.

    Raises:
        ScoreError: the loss is not a finite scalar with a gradient, or the whole score batch has a count of 0.
    """
    model = engine.scoring_model()
    losses: list[Any] = []
    counts: list[Any] = []
    counted = False
    for i, item in enumerate(items):
        engine.expect(last=i == len(items) - 1)
        result = loss_fn(model, item)
        counted = isinstance(result, tuple)
        loss, count = result if isinstance(result, tuple) else (result, 1.0)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ScoreError("loss_fn must return a scalar tensor with a gradient, or (sum, count)")
        engine.backward(loss)
        losses.append(loss.detach().double())  # converted at the end, so that nothing waits for a GPU here
        counts.append(count.detach().double() if isinstance(count, Tensor) else float(count))
    engine.reduce_gradients()
    ranks = collectives.world_size()
    loss_sum, weight = collectives.reduce_numbers([sum(losses), sum(counts)], what="score loss")
    if weight <= 0:
        raise ScoreError("loss_fn returned a count of 0 for a whole score batch: every score batch needs samples")
    mean = loss_sum / weight
    if not np.isfinite(mean):
        raise ScoreError(f"the loss of a score batch is {mean}, but scores need a finite loss: check the data and the model")
    return mean, (ranks / weight if counted else 1.0 / len(items))


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
