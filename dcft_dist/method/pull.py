"""A pull back to the start after every optimizer step: L2-SP, and a pull that is stronger on weights with high scores.

After each step a weight w becomes w + lr strength (1 - a + a g) (w_start - w).

- lr is the learning rate of the weight's parameter group at that step.
- a is `by_importance`. With a = 0 this is L2-SP (Li et al. 2018, arXiv 1802.01483), decoupled from the gradient like AdamW's
  weight decay.
- g depends on the weight's level among the scores of the task (`method.levels`), as the Fisher information weights the pull
  of EWC (Kirkpatrick et al. 2017, arXiv 1612.00796). Its mean over the eligible weights is 1. Weights that are not eligible
  have g = 1.

The head is never pulled.

Beside a penalty, the penalty shortens the step first, and then the pull acts on the shortened one.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.current import Current
from ..engines.find import find_engine, torch_optimizer
from ..engines.names import Patterns
from ..errors import PenaltyError, alone, listing
from .bits import step_of
from .levels import Levels
from .penalty_checks import check_precision
from .penalty_hooks import Optimizer, is_watched, unwatch, watch_optimizers


class PullToStart:
    """Pulls the weights outside the head back to their start after every step, from now until `remove`.

    Takes 4 bytes for each weight on the rank, and one byte more with levels.

    Attributes:
        steps: how many steps of the optimizer it has followed. ZeRO-3 makes several for one step of the model.
    """

    after_penalties = True

    def __init__(
        self,
        model: nn.Module,
        head: Patterns,
        strength: float,
        optimizer: Any = None,
        *,
        by_importance: float = 0.0,
        levels: Levels | None = None,
    ) -> None:
        """Stores the current weights and follows the optimizer. Collective.

        Args:
            model: the model, prepared for training under any engine.
            head: patterns of the head, which is not pulled; `()` for none.
            strength: strength of the pull, at least 0.
            optimizer: the optimizer that steps the model's weights; not needed for a DeepSpeedEngine, which has its own.
            by_importance: a, in [0, 1].
            levels: what `levels_of` returned; needed if a is not 0.

        Raises:
            PatternError: a head pattern matches nothing.
            PenaltyError: a number is out of range, levels or optimizer are missing or do not fit the model, or weights are
                stored in half precision. A later step raises it if lr strength (1 - a + a g) is above 1 for a weight, which
                would throw the weight past its start.
        """
        engine = find_engine(model)
        self._engine, self._current = engine, Current(engine)
        head_names = set(engine.names.match(head, what="head"))
        with collectives.agreed("attach pull"):
            if not 0.0 <= strength < float("inf") or not 0.0 <= by_importance <= 1.0:
                raise PenaltyError(f"strength {strength} must be at least 0, by_importance {by_importance} in [0, 1]")
            if by_importance and levels is None:
                raise PenaltyError("by_importance needs levels: levels_of(scores)")
            check_precision(engine)
            if engine.pull is not None:
                raise PenaltyError("a pull to the start is already attached to this model: remove it first")
            own = engine.own_optimizer or torch_optimizer(optimizer)
            stepped = engine.stepped().keys()
            steps_the_model = isinstance(own, Optimizer) and bool(self._rates(own).keys() & stepped)
            if own is None or not (steps_the_model or own is engine.own_optimizer):
                raise PenaltyError("pass the optimizer that steps the model's weights, made after the model was wrapped")
            if by_importance and levels and (unknown := levels.shapes.keys() - self._current.shards.keys()):
                raise PenaltyError(f"the model has no weight {listing(sorted(unknown), 3)}, of which there are levels")
        trained = set(engine.names.trainable) - head_names
        self._starts = {n: s.local.detach().clone() for n, s in self._current.shards.items() if n in trained}
        self._levels: dict[str, Tensor] = {}
        self._largest, self._table = 1.0, np.ones(0)
        if by_importance and levels is not None:
            self._levels = {n: found for n, found in levels.of(self._current.shards).items() if n in trained}
            self._table = 1.0 - by_importance + by_importance * levels.strengths()
            self._largest = float(self._table.max())
        self._strength, self._optimizer, self.steps = strength, weakref.ref(own), 0
        self._number = watch_optimizers(self)
        engine.pull = self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a copy or a pickle of the model is not pulled

    def remove(self) -> None:
        """Ends the pull; later steps are not pulled back."""
        unwatch(self._number)
        if self._engine.pull is self:
            self._engine.pull = None

    @property
    def num_bytes(self) -> int:
        """Memory that this rank uses for the starts and the levels, in bytes."""
        return sum(t.nbytes for t in (*self._starts.values(), *self._levels.values()))

    def check(self) -> None:
        """Checks that the pull is still in force.

        Raises:
            PenaltyError: it was removed, or somebody has cleared torch's hooks on optimizers.
        """
        if not is_watched(self) or self._engine.pull is not self:
            raise alone(PenaltyError(f"rank {collectives.rank()}: the pull to the start was taken off: attach it again"))

    # -- around optimizer.step ---------------------------------------------------------------------------------------------

    def on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before a step of any optimizer."""
        return None

    @torch.no_grad()
    def on_stepped(self, optimizer: Optimizer) -> None:
        """Called after a step of any optimizer, and after every penalty has shortened it."""
        if optimizer is not self._optimizer():
            return
        self.steps += 1
        self._current.refresh()
        rates = self._rates(optimizer)
        for name, start in self._starts.items():
            shard = self._current.shards[name]
            if (rate := rates.get(id(shard.parameter))) is None:
                continue  # ZeRO steps one part of the weights after the other
            weight = rate * self._strength
            if weight * self._largest > 1.0:
                raise alone(
                    PenaltyError(
                        f"rank {collectives.rank()}: the pull of {name} is {weight * self._largest:.3g} of its way to the "
                        f"start (lr {rate:g} x strength {self._strength:g} x {self._largest:.3g}): it must be at "
                        "most 1, so lower the strength or the learning rate"
                    )
                )
            if start.shape != shard.local.shape:
                raise alone(PenaltyError(f"rank {collectives.rank()}: {name} is sharded in another way than at the start"))
            if name in self._levels:
                self._pull_by_level(shard.local.detach(), start, self._levels[name], weight)
            else:
                shard.local.copy_(torch.lerp(shard.local, start, weight))

    @staticmethod
    def _rates(optimizer: Optimizer) -> dict[int, float]:
        """Learning rate of each tensor that an optimizer steps, by its id."""
        return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}

    def _pull_by_level(self, local: Tensor, start: Tensor, levels: Tensor, weight: float) -> None:
        """In pieces, so that no more memory is needed than for one of them."""
        table = torch.from_numpy(weight * self._table).to(local.device, local.dtype)
        local, start, levels, step = local.view(-1), start.view(-1), levels.view(-1), step_of(local.device)
        for first in range(0, len(local), step):
            piece = local[first : first + step]
            strengths = table[levels[first : first + step].to(torch.int32)]
            piece.copy_(torch.lerp(piece, start[first : first + step], strengths))

    def on_finished(self, optimizer: Optimizer) -> None:
        """Called when all watchers have followed a step."""
        return None

    def sees_forward_of(self, module: nn.Module) -> bool:
        """A pull does not follow forwards."""
        return False

    def on_forward(self) -> None:
        """A pull does not follow forwards."""
        return None


def _nothing() -> None:
    return None
