"""Small sets and steps for the tests of the penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet

from ..nets import HEAD, loss_fn, make_net


def some_set(seed: int = 0, dtype: torch.dtype = torch.float32) -> FundamentalSet:
    g = torch.Generator().manual_seed(seed)
    net = make_net(dtype)
    names = ["conv.weight", "encode.weight", "blocks.0.up.weight", "blocks.1.down.weight", "mix.weight", "unused.weight"]
    return FundamentalSet.from_masks(
        {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}, head=HEAD
    )


def times(mask: Tensor, factor: float, values: Tensor) -> Tensor:
    """factor x values where the mask is set, in the precision of the values."""
    return torch.where(mask, factor * values, values)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
