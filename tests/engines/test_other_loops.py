"""Loops that people bring: a tied weight under reentrant checkpointing, hybrid sharding that reduces late."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dcft_dist import FundamentalSet, attach_penalty, check_replicas
from dcft_dist.errors import TemporaryError

from ..nets import DEVICE, full_state
from ..ranks import run_ranks

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double(), torch.arange(16) % 3
MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) < 0.4


class Tied(nn.Module):
    """One weight in two layers, each inside a checkpoint or none."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mid, self.last, self.head = (nn.Linear(8, n, bias=b) for n, b in ((8, 0), (8, 1), (8, 0), (3, 1)))
        self.last.weight = self.first.weight
        self.checkpointed = checkpointed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        for layer in (self.first, self.mid, self.last):
            x = torch.tanh(checkpoint(layer, x, use_reentrant=True) if self.checkpointed else layer(x))
        out: Tensor = self.head(x)
        return out


def steps(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, late: bool = False) -> None:
    """Three steps of two micro-batches; `late`: replicas are reduced with the second."""
    for _ in range(3):
        optimizer.zero_grad()
        for i in range(2):
            if late:
                model.set_requires_all_reduce(i == 1)  # type: ignore[operator]
            (nn.functional.cross_entropy(model(x[i::2]), y[i::2]) / 2).backward()
        optimizer.step()


def by_hand() -> dict[str, Tensor]:
    net = Tied(checkpointed=False)
    for _ in range(3):
        net.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        with torch.no_grad():
            for p in net.parameters():
                step = 0.5 * p.grad  # type: ignore[operator]
                p -= torch.where(MASK, 0.1 * step, step) if p is net.first.weight else step
    return {name: p.detach() for name, p in net.named_parameters()}


def penalised(engine: str, level: str, where: str) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), 16 // dist.get_world_size()
    model: nn.Module = Tied(checkpointed=engine != "hybrid")
    if engine == "ddp":
        model = DistributedDataParallel(model, static_graph=True)
    elif engine == "hybrid":
        mesh = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif engine == "fsdp2":
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    chosen = FundamentalSet.from_masks({"first.weight": MASK})
    penalty = attach_penalty(model, chosen, 0.1, optimizer=optimizer, level=level, where=where)  # type: ignore[arg-type]
    late = engine == "hybrid"
    if late:
        steps(model, X[rank * size :][:size], Y[rank * size :][:size], optimizer, late)
    else:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rank * size :][:size]), Y[rank * size :][:size]).backward()
            optimizer.step()
    penalty.in_force()
    check_replicas(model)
    return full_state(model)


@pytest.mark.parametrize(("level", "where"), [("gradient", "before"), ("gradient", "after"), ("update", "before")])
@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("hybrid", 4)])
def test_it_equals_one_process(engine: str, ranks: int, level: str, where: str) -> None:
    wanted = by_hand()
    for found in run_ranks(ranks, penalised, engine, level, where):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


def averaged_too_early() -> str:
    """DDP without a static graph averages a tied weight after the first of its two gradients, in silence."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Tied(checkpointed=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(X[rank * 8 :][:8]), Y[rank * 8 :][:8]).backward()
    optimizer.step()
    with pytest.raises(TemporaryError) as error:
        check_replicas(model)
    return str(error.value)


def test_replicas_that_drift_apart_are_named() -> None:
    for message in run_ranks(2, averaged_too_early):
        assert "other values of first.weight" in message and "gradients that were not averaged" in message
