"""Runs the score batches: forward, backward and the reduced gradient, with the model left as it was found."""

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
    """Groups of `accumulation` items; checks before each that every rank has them, so that no rank waits for ever."""
    iterator = iter(batches)
    while True:
        items = list(itertools.islice(iterator, accumulation))
        counts = [n for (n,) in collectives.all_gather_ints([len(items)], what="count of score items")]
        if not any(counts):
            return
        if set(counts) != {accumulation}:
            raise ScoreError(
                f"every rank must bring {accumulation} items to each score batch, but the ranks brought {counts}: "
                "give each rank the same number of items, a multiple of accumulation"
            )
        yield items


def backward_batch(engine: Engine, items: list[Any], loss_fn: LossFn) -> tuple[float, float]:
    """Runs one batch, inside `undisturbed`; returns its mean loss and what turns the reduced gradients into its own."""
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
        losses.append(loss.detach().double())  # read at the end: a GPU need not wait for the host
        counts.append(count.detach().double() if isinstance(count, Tensor) else float(count))
    engine.reduce_gradients()
    ranks = collectives.world_size()
    loss_sum, weight = collectives.reduce_numbers([sum(losses), sum(counts)], what="score loss")
    if weight <= 0:
        raise ScoreError("loss_fn returned a count of 0 for a whole score batch")
    mean = loss_sum / weight
    if not np.isfinite(mean):
        raise ScoreError(f"the loss of a score batch is {mean}: scores would be meaningless")
    return mean, (ranks / weight if counted else 1.0 / len(items))


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Eval mode and empty gradients for the block; then modes, buffers, gradients and random states are as before."""
    modes = [(m, m.training) for m in engine.model.modules()]
    # By slot: a forward may put a new tensor where the old one was.
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
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
