"""Learns the penalty factor from held-out data during training.

D is the step that the optimizer proposes for the fundamental weights, and w' are the weights after the step. The loss on
held-out data changes with the factor by

    dL(w')/d factor = <grad L(w'), D>

This takes one dot product on the shards and one all-reduce. The slope is divided by its own running root mean square, so one
update changes the factor by about `rate`.

The method is greedy. It measures the immediate effect of a step, and a step that helps now may hurt later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.find import find_engine
from ..errors import PenaltyError
from .penalty import Penalty
from .score_batches import Losses, LossFn, backward_batch, undisturbed

_DECAY = 0.9  # of the running mean of squared slopes


class LearnedFactor:
    """Learns the factor of a penalty from held-out data; call `update` after optimizer steps.

    The method is greedy: it measures the immediate effect of a step on the held-out loss.

    Attributes:
        slope: the derivative of the held-out loss with respect to the factor at the last update; NaN before the first.
    """

    def __init__(self, model: nn.Module, penalty: Penalty, loss_fn: LossFn, rate: float = 0.05) -> None:
        """Makes the penalty store the proposed steps, which takes as much memory as a second set of weights.

        Args:
            model: the model that the penalty is attached to.
            penalty: what `attach_penalty(..., level="update")` returned.
            loss_fn: `loss_fn(model, batch)` returns the mean loss as a scalar tensor, or `(sum, count)`.
            rate: change of the factor in one update, about.

        Raises:
            PenaltyError: the penalty is not at the update level.
        """
        if penalty.level != "update":
            raise PenaltyError("a factor can be learned only at the update level: use attach_penalty(..., level='update')")
        penalty.keep_proposal = True
        self._model, self._penalty, self._loss_fn, self._rate = model, penalty, loss_fn, rate
        self._size, self._count = 0.0, 0
        self.slope = float("nan")

    def update(self, items: Sequence[Any]) -> float:
        """Changes the factor by one step against the slope, within [0, 1]. Call it after `optimizer.step`. Collective.

        Args:
            items: this rank's part of a held-out batch, with the same number of items on every rank.

        Returns:
            The new factor.

        Raises:
            PenaltyError: the optimizer has not made a step yet.
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
        """State for a checkpoint: the factor, and the running statistics of the slope."""
        return {"factor": self._penalty.factor, "size": self._size, "count": self._count}

    def load_state(self, state: dict[str, float]) -> None:
        """Restores what `state` returned. Call it on every rank."""
        self._penalty.set_factor(state["factor"])
        self._size, self._count = state["size"], int(state["count"])

    def _slope(self, items: list[Any]) -> float:
        engine, losses = find_engine(self._model), Losses()
        dots: list[Tensor] = []
        with undisturbed(engine):
            divisor = backward_batch(engine, items, self._loss_fn, losses)
            for shard in engine.shards():
                proposed, gradient = self._penalty.proposal.get(shard.name), shard.gradient
                if proposed is not None and gradient is not None:
                    span = slice(*shard.owned)
                    dots.append((gradient.reshape(-1)[span].double() * proposed.reshape(-1)[span].double()).sum())
            engine.clear_gradients()
        losses.means()  # which must be finite
        total = torch.stack(dots).sum() / divisor if dots else 0.0
        return collectives.reduce_numbers([total], what="slope of the held-out loss")[0]
