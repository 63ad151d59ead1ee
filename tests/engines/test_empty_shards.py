"""Ranks without a part of some weight: a layer with fewer rows than ranks, through every criterion and selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dcft_dist import attach_penalty, score_importance, select_fundamental
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.whole_tensors import whole_weight

from ..nets import DEVICE
from ..ranks import run_ranks

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(16) % 3
BATCHES = [(X[i::4], Y[i::4]) for i in range(4)]
SELECTIONS: list[dict[str, Any]] = [{}, {"scope": "per_tensor"}, {"floor": 0.05}, {"cap": 0.2}]
CRITERIA: dict[str, dict[str, Any]] = {"obs": {"block": 8}}
CRITERIA |= {name: {} for name in ("fisher", "taylor_squared", "taylor", "magnitude", "removal")}


def narrow() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 3))
    return nn.Sequential(*layers).double()


def wrapped(engine: str) -> nn.Module:
    net = narrow()
    if engine == "fsdp2":
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer)
        fully_shard(net)
        return net
    if engine == "fsdp1":
        return FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device(DEVICE))
    return net


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def everything(engine: str) -> dict[str, Any]:
    """The sets of every criterion and selection, and the weights after three penalised steps."""
    rank, size = dist.get_rank(), 4 // dist.get_world_size()
    mine = [(x[rank * size :][:size], y[rank * size :][:size]) for x, y in BATCHES]
    out: dict[str, Any] = {}
    model = wrapped(engine)
    for criterion, options in CRITERIA.items():
        if engine == "fsdp1" and criterion == "obs":  # flattened parameters are cut inside blocks, which is an error
            continue
        scores = score_importance(model, mine, loss, head="4", criterion=criterion, **options)  # type: ignore[arg-type]
        for selection in SELECTIONS:
            found = select_fundamental(scores, 0.1, **selection)
            out[f"{criterion} {selection}"] = {n: found.mask(n).flatten().nonzero().flatten().tolist() for n in found.names}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    penalty = attach_penalty(model, found, 0.1, optimizer=optimizer)
    for batch in mine[:3]:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        penalty.in_force()
    return out | {"weights": {s.name: whole_weight(s, s.local) for s in find_engine(model).shards()}}


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1"])
def test_ranks_without_a_part_of_a_weight(engine: str) -> None:
    wanted = run_ranks(1, everything, "single")[0]
    for found in run_ranks(4, everything, engine):
        weights = found.pop("weights")
        for name, value in wanted["weights"].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12)
        assert len(found) >= 20 and found == {key: wanted[key] for key in found}
