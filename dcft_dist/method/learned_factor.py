"""A factor that is learned while training goes on, from held-out data.

With D the step that the optimizer proposes for the fundamental weights and w' the weights reached, the loss on held-out data
would change with the factor by dL(w')/d factor = <grad L(w'), D>: one dot product on the shards and one all-reduce. The
derivative is divided by its own running size, so `rate` is about the change of the factor.

It is greedy: it sees what a step does at once, not what it does in the end, and a step that helps now may hurt later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..distributed import collectives
from ..engines.find import find_engine
from ..errors import PenaltyError
from .penalty import Penalty
from .score_batches import LossFn, backward_batch, undisturbed

_DECAY = 0.9  # of the running mean of squares


class LearnedFactor:
    """Changes the factor of `penalty` (update level) by `update`, to be called after optimizer steps. Collective.

    Attributes:
        slope: the last derivative of the held-out loss with respect to the factor.
    """

    def __init__(self, model: nn.Module, penalty: Penalty, loss_fn: LossFn, rate: float = 0.05) -> None:
        if penalty.level != "update":
            raise PenaltyError("a factor is learned at the update level alone: use attach_penalty(..., level='update')")
        penalty.keep_proposal = True
        self._model, self._penalty, self._loss_fn, self._rate = model, penalty, loss_fn, rate
        self._size, self._count = 0.0, 0
        self.slope = float("nan")

    def update(self, items: Sequence[Any]) -> float:
        """Moves the factor against the slope on `items`, this rank's part of a held-out batch; returns the new factor.

        Raises:
            PenaltyError: there has been no step yet.
        """
        if not self._penalty.proposal:
            raise PenaltyError("no step has been proposed yet: call update after optimizer.step")
        self.slope = self._slope(list(items))
        self._count += 1
        self._size = _DECAY * self._size + (1 - _DECAY) * self.slope**2
        scale = (self._size / (1 - _DECAY**self._count)) ** 0.5
        change = self._rate * self.slope / scale if scale else 0.0
        self._penalty.set_factor(min(max(self._penalty.factor - change, 0.0), 1.0))
        return self._penalty.factor

    def state(self) -> dict[str, float]:
        """What a run that goes on needs."""
        return {"factor": self._penalty.factor, "size": self._size, "count": self._count}

    def load_state(self, state: dict[str, float]) -> None:
        self._penalty.set_factor(state["factor"])
        self._size, self._count = state["size"], int(state["count"])

    def _slope(self, items: list[Any]) -> float:
        engine, total = find_engine(self._model), torch.zeros((), dtype=torch.float64)
        with undisturbed(engine):
            _, scale = backward_batch(engine, items, self._loss_fn)
            for shard in engine.shards():
                way, gradient = self._penalty.proposal.get(shard.name), shard.gradient
                if way is not None and gradient is not None:
                    span = slice(*shard.owned)
                    dot = (gradient.reshape(-1)[span].double() * way.reshape(-1)[span].double()).sum()
                    total += scale * dot.cpu()
            engine.clear_gradients()
        return collectives.reduce_numbers([total], what="slope of the factor")[0]
