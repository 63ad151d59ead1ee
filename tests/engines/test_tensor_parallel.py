"""Tensor parallelism and compiled blocks: penalty, weights and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dcft_dist import (
    FundamentalSet,
    attach_penalty,
    load_weights,
    save_weights,
    score_importance,
)
from dcft_dist.errors import PenaltyError
from dcft_dist.weights.checkpoint import save_checkpoint
from dcft_dist.weights.model_state import load_checkpoint, model_state

from ..nets import HEAD, full, loss_fn, make_batches, make_optimizer
from ..ranks import run_ranks
from .cases import SIZE, whole_scores

# -- tensor parallelism, compiled blocks --------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(15)
        self.up = nn.Linear(15, 12)
        self.down = nn.Linear(12, 15)
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def mlp_masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        n: torch.rand(p.shape, generator=g) < 0.4 for n, p in Mlp().named_parameters() if n in ("up.weight", "down.weight")
    }


def make_mlp(kind: str) -> nn.Module:
    """Under tensor parallelism x FSDP2 on 2 x 2 ranks, compiled block by block, or plain."""
    torch.manual_seed(0)
    net: Any = Mlp().double()
    if kind == "tensor_parallel":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        # The rest is replicated over the tensor-parallel ranks.
        parallelize_module(net, mesh["tp"], {"norm": Whole(), "head": Whole()})
        fully_shard(net.up, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
    elif kind == "compiled":
        net.up = torch.compile(net.up, backend="aot_eager")
        fully_shard(net.up)
        fully_shard(net)
    return net  # type: ignore[no-any-return]


def train_mlp(kind: str, level: str, where: str, optimizer_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (scores, whole weights)."""
    net, batches = make_mlp(kind), make_batches(4, SIZE, torch.float64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if kind == "tensor_parallel":
        ranks, rank = 2, rank // 2
    mine = [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in batches] if kind != "one" else batches
    scores = whole_scores(score_importance(net, mine, loss_fn, head=HEAD, criterion="removal"))
    optimizer = make_optimizer(optimizer_name, net.parameters())
    attach_penalty(
        net, FundamentalSet.from_masks(mlp_masks(), head=HEAD), 0.1, optimizer=optimizer, level=level, where=where,
        rest_factor=0.7, unscored_factor=0.4,
    )  # type: ignore[arg-type]  # fmt: skip
    for batch in mine:
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
    return scores, {n.replace("_orig_mod.", ""): full(p.detach()).clone() for n, p in net.named_parameters()}


class Whole(torch.distributed.tensor.parallel.style.ParallelStyle):
    """Replicates a module's weights over the tensor-parallel ranks, and takes plain tensors in and out."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        from torch.distributed.tensor import DTensor, Replicate, distribute_module

        def come(_: nn.Module, inputs: Any, m: Any) -> Any:
            return tuple(DTensor.from_local(x, m, [Replicate()], run_check=False) for x in inputs)

        return distribute_module(module, mesh, None, come, lambda _, out, m: out.to_local())


@pytest.mark.parametrize(("kind", "ranks"), [("tensor_parallel", 4), ("compiled", 2)])
@pytest.mark.parametrize(("level", "where"), [("gradient", "before"), ("gradient", "after"), ("update", "before")])
def test_tensor_parallel_and_compiled_blocks(kind: str, ranks: int, level: str, where: str) -> None:
    scores, state = run_ranks(1, train_mlp, "one", level, where, "adamw")[0]
    for found, weights in run_ranks(ranks, train_mlp, kind, level, where, "adamw"):
        for name, values in scores.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9)
        assert max(float((weights[n] - state[n]).abs().max()) for n in state) <= 1e-10


def sharded_bits_of_split_weights() -> str:
    with pytest.raises(PenaltyError) as error:
        chosen = FundamentalSet.from_masks(mlp_masks(), head=HEAD)
        attach_penalty(make_mlp("tensor_parallel"), chosen, level="gradient", mask_placement="sharded")
    return str(error.value)


def test_sharded_bits_are_refused_under_tensor_parallelism() -> None:
    assert all("does not support tensor parallelism" in found for found in run_ranks(4, sharded_bits_of_split_weights))


def save_mlp(folder: str) -> None:
    net = make_mlp("tensor_parallel")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    save_weights(net, f"{folder}/weights")
    save_checkpoint(Path(folder) / "checkpoint", model_state(net), {})


def load_mlp(folder: str, kind: str) -> list[dict[str, Tensor]]:
    found = []
    for load in (load_weights, lambda net, f: load_checkpoint(Path(f).parent / "checkpoint", net)):
        net = make_mlp(kind)
        load(net, f"{folder}/weights")
        found.append({n: full(p.detach()).clone() for n, p in net.named_parameters()})
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 1), ("tensor_parallel", 4)])
def test_weights_and_checkpoints_under_tensor_parallelism(kind: str, ranks: int, tmp_path: Path) -> None:
    run_ranks(4, save_mlp, str(tmp_path))
    expected = {n: 2.0 * p.detach() for n, p in make_mlp("plain").named_parameters()}
    for results in run_ranks(ranks, load_mlp, str(tmp_path), kind):
        for found in results:
            assert all(torch.equal(found[n], w) for n, w in expected.items())
