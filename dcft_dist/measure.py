"""What the fundamental weights and the rest do during training: norms of gradients, distance from the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import collectives
from .bits import cut, unpack
from .engines import Shard, find_engine
from .fundamental import FundamentalSet


class Groups:
    """This rank's owned eligible weights, sorted into fundamental and rest. Making it is collective."""

    def __init__(self, model: nn.Module, fundamental: FundamentalSet) -> None:
        self._engine = find_engine(model)
        boxes = {shard.name: shard.owned_box for shard in self._engine.shards()}
        bits = {name: cut(fundamental.packed(name), boxes[name]) for name in fundamental.names}
        self._masks = {name: unpack(b, boxes[name].numel) for name, b in bits.items()}
        self._start: dict[str, Tensor] = {}

    def remember_start(self) -> None:
        """Keeps a copy of the owned weights: `movement` is measured from here."""
        self._start = {s.name: _owned(s, s.local).clone() for s in self._shards()}

    def gradient_norms(self) -> dict[str, float]:
        """Euclidean norms of the reduced gradients: {"fundamental", "rest"}. Collective."""
        return self._norms(lambda s: _owned(s, s.gradient) if s.gradient is not None else None)

    def movement(self) -> dict[str, float]:
        """Root mean square of the change since `remember_start`: {"fundamental", "rest"}. Collective."""
        norms = self._norms(lambda s: _owned(s, s.local) - self._start[s.name])
        return {group: norms[group] / max(norms[f"{group}_count"], 1.0) ** 0.5 for group in ("fundamental", "rest")}

    def _norms(self, values: Callable[[Shard], Tensor | None]) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64)
        for shard in self._shards():
            value, mask = values(shard), self._masks[shard.name]
            if value is not None:
                squares = value.double().square().cpu()
                inside = squares[mask].sum()
                count = float(mask.sum())
                sums += torch.tensor([inside, squares.sum() - inside, count, mask.numel() - count], dtype=torch.float64)
        a, b, n, m = collectives.all_reduce(sums, what="norms").tolist()
        return {
            "fundamental": a**0.5,
            "rest": max(b, 0.0) ** 0.5,
            "fundamental_count": n,
            "rest_count": m,
        }

    def _shards(self) -> list[Shard]:
        return [s for s in self._engine.shards() if s.name in self._masks]


def _owned(shard: Shard, values: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros(0)
    return values.detach().reshape(-1)[slice(*shard.owned)]
