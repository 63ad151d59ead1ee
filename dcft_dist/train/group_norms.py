"""Gradient norms, and distances from the start, of the fundamental weights, the other eligible ones, and the body."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Shard
from ..engines.find import find_engine
from ..engines.names import Patterns
from ..method.fundamental_set import FundamentalSet


class GroupNorms:
    """Measures three groups of weights: `fundamental`, `rest` (eligible, not fundamental) and `body` (all but the head).

    Making one is collective.

    Args:
        model: the wrapped model.
        fundamental: the fundamental set; None: the groups `fundamental` and `rest` are empty.
        head: patterns of the head's weights.
    """

    def __init__(self, model: nn.Module, fundamental: FundamentalSet | None, head: Patterns) -> None:
        self._engine = find_engine(model)
        self._head = set(self._engine.names.match(head, what="head"))
        boxes = {shard.name: shard.owned_box for shard in self._engine.shards()}
        eligible = fundamental.names if fundamental else ()
        self._masks = {name: fundamental.mask_in(name, boxes[name]) for name in eligible if fundamental}
        self._start: dict[str, Tensor] = {}

    def remember_start(self) -> None:
        """Copies the weights that this rank owns: `movement` measures from here."""
        self._start = {s.name: _owned(s, s.local).clone() for s in self._shards()}

    def gradient_norms(self) -> dict[str, float]:
        """Euclidean norms of the reduced gradients, by group: {"fundamental", "rest", "body"}. Collective."""
        inside, outside, body, *_ = self._sums(lambda s: _owned(s, s.gradient) if s.gradient is not None else None)
        return {"fundamental": inside**0.5, "rest": outside**0.5, "body": body**0.5}

    def movement(self) -> dict[str, float]:
        """Change since `remember_start`, by group. Collective.

        Returns:
            The root mean square for "fundamental" and "rest", the Euclidean norm for "body".
        """
        inside, outside, body, num_inside, num_outside = self._sums(lambda s: _owned(s, s.local) - self._start[s.name])
        return {
            "fundamental": (inside / max(num_inside, 1.0)) ** 0.5,
            "rest": (outside / max(num_outside, 1.0)) ** 0.5,
            "body": body**0.5,
        }

    def _sums(self, values: Callable[[Shard], Tensor | None]) -> list[float]:
        """Sums of squares over fundamental, rest and body; then the numbers of weights in fundamental and rest."""
        sums = torch.zeros(5, dtype=torch.float64)
        for shard in self._shards():
            value, mask = values(shard), self._masks.get(shard.name)
            if value is not None:
                squares = value.double().square().cpu()
                inside, total = squares[mask].sum() if mask is not None else squares.new_zeros(()), squares.sum()
                selected, size = (float(mask.sum()), mask.numel()) if mask is not None else (0.0, 0)
                outside = total - inside if size else 0 * total
                counts = total.new_tensor(selected), total.new_tensor(size - selected)
                sums += torch.stack([inside, outside, total, *counts])
        return [max(v, 0.0) for v in collectives.all_reduce(sums, what="norms").tolist()]

    def _shards(self) -> list[Shard]:
        return [s for s in self._engine.shards() if s.name not in self._head]


def _owned(shard: Shard, values: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros(0)
    return values.detach().reshape(-1)[slice(*shard.owned)]
