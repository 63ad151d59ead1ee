"""A pull back to the start after every optimizer step: L2-SP, and a pull that is stronger on weights with high scores.

After each step a weight w becomes w + lr strength (1 - a + a g) (w_start - w).

- lr is the learning rate of the weight's parameter group at that step.
- a is `by_importance`. With a = 0 this is L2-SP (Li et al. 2018, arXiv 1802.01483), decoupled from the gradient like AdamW's
  weight decay.
- g depends on the weight's level among the scores of the task (`method.levels`), as the Fisher information weights the pull
  of EWC (Kirkpatrick et al. 2017, arXiv 1612.00796). Its mean over the eligible weights is 1. Weights that are not eligible
  have g = 1.

The head is never pulled.

A *selective* pull (Tian et al. 2024, Selective Projection Decay, arXiv 2411.01713) acts on a tensor only while its descent
direction points back to its start, and takes back no more than the last step has added. D is the way of a tensor from its
start before the step, D' after it, G its gradient. If sum(G D) > 0, w becomes w - strength r D' with
r = max(0, 1 - |D| / |D'|). Otherwise the tensor is left as it is. lr has no part in it.

Beside a penalty, the penalty shortens the step first, and then the pull acts on the shortened one.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..compat.pytorch import is_capturing
from ..distributed import collectives
from ..engines.base import Shard
from ..engines.current import Current
from ..engines.find import find_engine, torch_optimizer
from ..engines.names import Patterns
from ..errors import PenaltyError, alone, listing
from .bits import step_of
from .levels import Levels
from .penalty_checks import check_precision
from .penalty_hooks import Optimizer, is_watched, unwatch, watch_optimizers
from .step_checks import StepChecks


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
        selective: bool = False,
    ) -> None:
        """Stores the current weights and follows the optimizer. Collective.

        Args:
            model: the model, prepared for training under any engine.
            head: patterns of the head, which is not pulled; `()` for none.
            strength: strength of the pull, at least 0.
            optimizer: the optimizer that steps the model's weights; not needed for a DeepSpeedEngine, which has its own.
            by_importance: a, in [0, 1].
            levels: what `levels_of` returned; needed if a is not 0.
            selective: whether the pull is selective. It makes one collective for each step.

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
            shapes = engine.full_shapes()
            if levels and (other := [n for n, shape in levels.shapes.items() if shapes.get(n) != shape]):
                raise PenaltyError(f"the model lacks {listing(other, 3)} of the levels, or has it in another shape")
            if selective and strength * (1.0 + by_importance) > 1.0:
                raise PenaltyError(
                    f"strength x (1 + by_importance) of a selective pull must be at most 1, not "
                    f"{strength * (1.0 + by_importance):g}, which throws weights past their start"
                )
        trained = set(engine.names.trainable) - head_names
        self._starts = {n: s.local.detach().clone() for n, s in self._current.shards.items() if n in trained}
        self._levels: dict[str, Tensor] = {}
        self._largest, self._table = 1.0, np.ones(0)
        if by_importance and levels is not None:
            self._levels = {n: found for n, found in levels.of(self._current.shards).items() if n in trained}
            self._table = 1.0 - by_importance + by_importance * levels.strengths()
            self._largest = float(self._table.max())
        self._strength, self._optimizer, self.steps = strength, weakref.ref(own), 0
        self._selective = selective
        self._before: dict[str, list[Tensor]] = {}  # of a selective pull: sum(G D) and |D|^2 on this rank
        self._checks = StepChecks(self._current, self._starts, "pull")
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
            PenaltyError: it was removed, its optimizer is gone, or somebody has cleared torch's hooks on optimizers.
        """
        if not is_watched(self) or self._engine.pull is not self or self._optimizer() is None:
            raise alone(PenaltyError(f"rank {collectives.rank()}: the pull to the start was taken off: attach it again"))

    # -- around optimizer.step ---------------------------------------------------------------------------------------------

    def on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before a step of any optimizer, and after every penalty has changed its gradients."""
        own = self._optimizer()
        if optimizer is not own:
            self._require_apart(optimizer, own)
            return None
        if is_capturing():
            raise alone(PenaltyError(f"rank {collectives.rank()}: a pull cannot be captured in a CUDA graph: it reads lr"))
        closure = any(callable(a) and a is not optimizer for a in (*args, *kwargs.values()))
        if self._engine.penalty is None or self._engine.penalty.level != "update":  # which tries it as well
            self._checks.try_out(optimizer, [shard for _, shard in self._stepped(optimizer)], closure)
        if not self._selective:
            return None
        if closure:
            raise alone(PenaltyError(f"rank {collectives.rank()}: a selective pull cannot follow a step with a closure"))
        with torch.no_grad():
            for name, shard in self._stepped(optimizer):
                way, gradient = self._way(shard), shard.gradient
                product = torch.zeros((), dtype=torch.float64, device=way.device)
                if gradient is not None:
                    product = (gradient.reshape(-1)[slice(*shard.owned)] * way).sum(dtype=torch.float64)
                self._before[name] = [product, way.square().sum(dtype=torch.float64)]
        return None

    @torch.no_grad()
    def on_stepped(self, optimizer: Optimizer) -> None:
        """Called after a step of any optimizer, and after every penalty has shortened it."""
        if optimizer is not self._optimizer():
            return
        self.steps += 1
        stepped, rates = self._stepped(optimizer), self._rates(optimizer)
        shares = self._selected(stepped) if self._selective else {n: rates[id(s.parameter)] for n, s in stepped}
        for name, shard in stepped:
            weight = shares[name] * self._strength
            if weight * self._largest > 1.0:
                raise alone(
                    PenaltyError(
                        f"rank {collectives.rank()}: the pull of {name} is {weight * self._largest:.3g} of its way to the "
                        f"start ({'share' if self._selective else 'lr'} {shares[name]:g} x strength {self._strength:g} x "
                        f"{self._largest:.3g}): it must be at most 1, so lower the strength or the learning rate"
                    )
                )
            if name in self._levels:
                self._pull_by_level(shard.local.detach(), self._starts[name], self._levels[name], weight)
            else:
                shard.local.detach().lerp_(self._starts[name], weight)

    def _require_apart(self, optimizer: Optimizer, own: Optimizer | None) -> None:
        """Checks that an optimizer which the pull does not follow steps none of its weights."""
        if getattr(own, "optim", None) is optimizer:  # inside a ZeroRedundancyOptimizer
            return
        others = {id(p) for group in optimizer.param_groups for p in group["params"]}
        pulled = [name for name in self._starts if id(self._current.shards[name].parameter) in others]
        if pulled:
            raise alone(
                PenaltyError(
                    f"rank {collectives.rank()}: {type(optimizer).__name__} steps {listing(pulled, 3)}, but the pull to the "
                    "start follows another optimizer: attach it after the optimizer is made, and use one for the whole body"
                )
            )

    def _stepped(self, optimizer: Optimizer) -> list[tuple[str, Shard]]:
        """The pulled weights that the optimizer steps now: ZeRO steps one part of them after the other."""
        self._current.refresh()
        rates, found = self._rates(optimizer), []
        for name, start in self._starts.items():
            shard = self._current.shards[name]
            if id(shard.parameter) in rates:
                if start.shape != shard.local.shape:
                    where = f"rank {collectives.rank()}: {name}"
                    raise alone(PenaltyError(f"{where} is sharded in another way than when the pull began"))
                found.append((name, shard))
        return found

    def _selected(self, stepped: list[tuple[str, Shard]]) -> dict[str, float]:
        """r of each tensor; 0 for those that are left as they are. Collective."""
        names, rows = list(self._starts), dict(self._before)  # all names: ZeRO steps others on each rank
        for name, shard in stepped:
            way = self._way(shard)
            rows[name] = [*self._before[name], way.square().sum(dtype=torch.float64)]
        self._before = {}
        device = stepped[0][1].local.device if stepped else "cpu"
        zeros = [torch.zeros((), dtype=torch.float64, device=device)] * 3
        table = torch.stack([number for name in names for number in rows.get(name, zeros)]).view(-1, 3)  # read at once
        found = {}
        for name, (product, before, after) in zip(
            names, collectives.all_reduce(table, what="selective pull").tolist(), strict=True
        ):
            found[name] = max(0.0, 1.0 - (before / after) ** 0.5) if product > 0 and after > 0 else 0.0
        return found

    def _way(self, shard: Shard) -> Tensor:
        """How far the cells that this rank owns are from their start, flat."""
        return (shard.local.detach() - self._starts[shard.name]).reshape(-1)[slice(*shard.owned)]

    @staticmethod
    def _rates(optimizer: Optimizer) -> dict[int, float]:
        """Learning rate of each tensor that an optimizer steps, by its id."""
        if any(group["lr"] is None for group in optimizer.param_groups):
            raise alone(PenaltyError(f"{type(optimizer).__name__} has no lr, of which a pull is a multiple"))
        return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}

    def _pull_by_level(self, local: Tensor, start: Tensor, levels: Tensor, weight: float) -> None:
        """In pieces, so that no more memory is needed than for one of them."""
        table = torch.from_numpy(weight * self._table).to(local.device, local.dtype)
        if not local.is_contiguous():
            local.copy_(torch.lerp(local, start, table[levels.to(torch.int32)]))
            return
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
