"""Sums up, over score batches, what a criterion takes from gradients g and weights w: one operation on all shards at once.

| criterion | term of a score batch |
|---|---|
| taylor | g |
| taylor_squared | (g w)^2 |
| removal | 1/2 (g w)^2 - g w |
| fisher | g^2 |

Nothing as large as the scores is allocated in float32: g w takes the place of the gradient, which nobody needs afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..compat.pytorch import add_all, add_products, divide_all, multiply_all
from ..engines.base import gradients_of, overlap
from ..engines.current import Current


class TermSums:
    """The sums of one scoring, on this rank's shards."""

    def __init__(self, criterion: str, values: Mapping[str, Tensor]) -> None:
        """
        Args:
            criterion: "taylor", "taylor_squared", "removal" or "fisher".
            values: name -> where to add up, flat float32, of the size that this rank owns.
        """
        self._criterion, self._values = criterion, values
        self._version = 0

    def add(self, current: Current, divisor: float | Tensor) -> None:
        """Adds the terms of one score batch, and overwrites its gradients.

        Args:
            current: the shards, with reduced gradients. Weights without a gradient are left out.
            divisor: divides each gradient first; a number, or a tensor without dimensions.
        """
        if current.version != self._version:
            self._look(current)
        sums, weights, gradients = list[Tensor](), list[Tensor](), list[Tensor]()
        for gradient, (begin, end, numel), total, weight in zip(
            gradients_of(self._shards), self._spans, self._sums, self._weights, strict=True
        ):
            if gradient is None:  # the loss does not depend on this weight
                continue
            flat = gradient.detach().reshape(-1)
            flat = flat if end - begin == numel else flat[begin:end]
            sums.append(total)
            weights.append(weight)
            gradients.append(flat.contiguous() if flat.dtype == torch.float32 else flat.float())
        if overlap(gradients):  # weights that are added get one gradient, which must not be overwritten twice
            gradients = [gradient.clone() for gradient in gradients]
        if sums:
            self._add(sums, weights, gradients, divisor)

    def _look(self, current: Current) -> None:
        self._version = current.version
        self._shards = [shard for name, shard in current.shards.items() if name in self._values]
        self._spans = [(*shard.owned, shard.local.numel()) for shard in self._shards]
        self._sums = [self._values[shard.name] for shard in self._shards]
        self._weights = [shard.local.detach().reshape(-1)[slice(*shard.owned)] for shard in self._shards]

    def _add(self, sums: list[Tensor], weights: list[Tensor], gradients: list[Tensor], divisor: float | Tensor) -> None:
        if isinstance(divisor, Tensor) or divisor != 1.0:
            divide_all(gradients, divisor)
        if self._criterion == "taylor":
            add_all(sums, gradients)
            return
        if self._criterion != "fisher":
            multiply_all(gradients, [w if w.dtype == torch.float32 else w.float() for w in weights])
        add_products(sums, gradients, gradients, value=0.5 if self._criterion == "removal" else 1.0)
        if self._criterion == "removal":
            add_all(sums, gradients, alpha=-1.0)
