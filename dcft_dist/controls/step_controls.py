"""Controls that act on the whole body at each step, beside the penalty's multipliers on single weights.

`EqualDisplacement` asks whether DCFT is more than moving less: each step of the body is shrunk as a whole, by one number, to
the length that DCFT's multipliers would have left of it. `PullToStart` is L2-SP (Li et al. 2018), decoupled from the
gradient as AdamW's weight decay is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Shard
from ..engines.find import find_engine
from ..engines.names import Patterns
from ..errors import EngineError
from ..method.fundamental_set import FundamentalSet
from ..method.penalty_checks import check_factors


class EqualDisplacement:
    """From here on every step of `optimizer` moves the body by r times what it proposes, r = |m D| / |D| of that step.

    D is the proposed step of all weights outside the head and m DCFT's multipliers, as in `attach_penalty`. Collective at
    each step. The total way after many steps need not be the same: report it (`GroupNorms.movement`).

    Attributes:
        share: r of the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        fundamental: FundamentalSet,
        factor: float,
        *,
        optimizer: torch.optim.Optimizer,
        rest_factor: float = 1.0,
        unscored_factor: float = 1.0,
    ) -> None:
        check_factors(factor=factor, rest_factor=rest_factor, unscored_factor=unscored_factor)
        self._engine = find_engine(model)
        if self._engine.name == "deepspeed":
            raise EngineError("equal displacement is not there for DeepSpeed: use another engine")
        names = self._engine.names
        head = set(names.match(fundamental.info.head, what="head")) if fundamental.info.head else set()
        self._body = set(names.trainable) - head
        shards = {shard.name: shard for shard in self._engine.shards()}
        self._masks = {
            name: fundamental.mask_in(name, shard.owned_box).to(shard.local.device)
            for name in fundamental.names
            for shard in [shards[name]]
        }
        self._factors = factor, rest_factor, unscored_factor
        self._old: list[tuple[Shard, Tensor]] = []
        self.share = 1.0
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        self._old = [(s, s.local.detach().clone()) for s in self._engine.shards() if s.name in self._body]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        proposed: Tensor | float = 0.0
        applied: Tensor | float = 0.0
        for shard, old in self._old:  # no number is read from a GPU here, which would wait for it at each tensor
            squares = (shard.local.detach() - old).reshape(-1)[slice(*shard.owned)].double().square()
            proposed = proposed + squares.sum()
            applied = applied + self._kept(shard.name, squares)
        applied, proposed = collectives.reduce_numbers([float(applied), float(proposed)], what="length of a step")
        self.share = (applied / proposed) ** 0.5 if proposed else 1.0
        for shard, old in self._old:
            shard.local.copy_(torch.lerp(old, shard.local, self.share))
        self._old = []

    def _kept(self, name: str, squares: Tensor) -> Tensor:
        factor, rest, unscored = self._factors
        if name not in self._masks:
            return squares.sum() * unscored**2
        inside = squares[self._masks[name]].sum()
        return inside * factor**2 + (squares.sum() - inside) * rest**2


class PullToStart:
    """After every step of `optimizer` the weights w outside the head go to w - rate * strength * (w - w_start).

    `rate` is the learning rate of the weight's group at that step; the start is where the weights are now.
    """

    def __init__(self, model: nn.Module, head: Patterns, strength: float, optimizer: torch.optim.Optimizer) -> None:
        engine = find_engine(model)
        heads = set(engine.names.match(head, what="head"))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        body = [s for s in engine.shards() if s.name not in heads and id(s.parameter) in groups]
        self._kept = [(s, groups[id(s.parameter)], s.local.detach().clone()) for s in body]
        self._strength = strength
        self._handle = optimizer.register_step_post_hook(self._after)

    def remove(self) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for shard, group, start in self._kept:
            shard.local.copy_(torch.lerp(shard.local, start, min(group["lr"] * self._strength, 1.0)))
