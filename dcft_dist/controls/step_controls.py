"""A control that acts on the whole body at each step. The penalty, in contrast, multiplies the steps of single weights.

`EqualDisplacement` tests whether DCFT does more than shorten the steps. It shrinks each step of the whole body by one
number, to the length that the step would have under DCFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Shard
from ..engines.find import find_engine
from ..errors import EngineError
from ..method.fundamental_set import FundamentalSet
from ..method.penalty_checks import check_factors


class EqualDisplacement:
    """Shrinks every step of the body to the length that it would have under DCFT, from now until `remove`.

    D is the step that the optimizer proposes for all weights outside the head. m are the multipliers of DCFT, as in
    `attach_penalty`. Each step becomes r D with r = |m D| / |D|. Each step is collective. The total distance after many
    steps can differ from that of DCFT: report it (`GroupNorms.movement`).

    Attributes:
        share: r of the last step; 1.0 before the first.
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
        """Hooks the optimizer.

        Args:
            model: the model, prepared for training under any engine but DeepSpeed.
            fundamental: the fundamental set of the DCFT run to compare with.
            factor: multiplier of fundamental weights, in [0, 1].
            optimizer: the optimizer that steps the model's weights.
            rest_factor: multiplier of eligible weights that are not fundamental, in [0, 1].
            unscored_factor: multiplier of weights that are neither eligible nor head, in [0, 1].

        Raises:
            EngineError: the model is a DeepSpeedEngine.
            PenaltyError: a multiplier is outside [0, 1].
        """
        check_factors(factor=factor, rest_factor=rest_factor, unscored_factor=unscored_factor)
        self._engine = find_engine(model)
        if self._engine.name == "deepspeed":
            raise EngineError("equal displacement does not support DeepSpeed: use another engine")
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
        """Removes the hooks; later steps have their full length."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        self._old = [(s, s.local.detach().clone()) for s in self._engine.shards() if s.name in self._body]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        proposed: Tensor | float = 0.0
        applied: Tensor | float = 0.0
        for shard, old in self._old:  # read no number from a GPU here: that would wait for it at each tensor
            squares = (shard.local.detach() - old).reshape(-1)[slice(*shard.owned)].double().square()
            proposed = proposed + squares.sum()
            applied = applied + self._multiplied(shard.name, squares)
        applied, proposed = collectives.reduce_numbers([float(applied), float(proposed)], what="length of a step")
        self.share = (applied / proposed) ** 0.5 if proposed else 1.0
        for shard, old in self._old:
            shard.local.copy_(torch.lerp(old, shard.local, self.share))
        self._old = []

    def _multiplied(self, name: str, squares: Tensor) -> Tensor:
        """Sum of squares of a weight's step after DCFT's multipliers, from the squares of the proposed step."""
        factor, rest, unscored = self._factors
        if name not in self._masks:
            return squares.sum() * unscored**2
        fundamental = squares[self._masks[name]].sum()
        return fundamental * factor**2 + (squares.sum() - fundamental) * rest**2
