"""The exponential moving average of the weights during a training (EMA), on sharded weights in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..compat.pytorch import blend_all
from ..engines.current import Current
from ..engines.find import find_engine
from ..errors import EngineError


class AveragedWeights:
    """Averages of the trained weights: average = decay x average + (1 - decay) x weight, after each optimizer step.

    They are those of `torch.optim.swa_utils.get_ema_multi_avg_fn`. They begin with the weights as they are now. Each rank
    keeps the averages of its own part: 4 bytes x trained weights / ranks. Buffers are not averaged.

        averages = AveragedWeights(model, decay=0.999)
        ...                                   # after each optimizer step: averages.update()
        with averages.applied():
            ...                               # evaluate or export the averages

    Attributes:
        decay: the decay.
        values: name -> average of this rank's part of a weight, in the shape of `Shard.local`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the wrapped model.
            decay: between 0 (the average is the weight) and 1 (the average never changes).
        """
        self.decay = decay
        self._engine = find_engine(model)
        self._current = Current(self._engine)
        trained = self._engine.names.trainable
        self.values: dict[str, Tensor] = {n: self._current.shards[n].local.detach().clone() for n in trained}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights into the averages. No communication."""
        blend_all(list(self.values.values()), self._weights(), 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages in place of its weights, and `values` has the weights. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Changes places, one tensor after the other, so that no further copy of all is needed."""
        for weight, average in zip(self._weights(), self.values.values(), strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        self._engine.publish()

    def _weights(self) -> list[Tensor]:
        """This rank's part of each averaged weight.

        Raises:
            EngineError: the model is sharded in another way than at the start.
        """
        self._current.refresh()
        found = [self._current.shards[name].local.detach() for name in self.values]
        for name, weight in zip(self.values, found, strict=True):
            if weight.shape != self.values[name].shape:
                raise EngineError(f"{name} is sharded in another way than when its average began")
        return found
