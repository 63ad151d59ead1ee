"""Optimal brain surgeon: against its definition, on any number of ranks, in any memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcft_dist import score_importance
from dcft_dist.errors import EngineError, ScoreError

from ..nets import HEAD, loss_fn, make_batches, make_net, my_part, wrap
from ..ranks import run_ranks

DAMPING, NUM, SIZE = 1e-3, 5, 8


def fisher(name: str, block: int) -> tuple[Tensor, list[Tensor]]:
    """The weight, and F of each block, from the definition."""
    net = make_net(torch.float64).eval()
    weight = net.get_parameter(name)
    rows = [torch.autograd.grad(loss_fn(net, b), weight)[0].reshape(-1) for b in make_batches(NUM, SIZE, torch.float64)]
    parts = torch.stack(rows).split(block, dim=1)
    return weight.detach().reshape(-1), [DAMPING * torch.eye(p.shape[1]) + p.T @ p / NUM for p in parts]


def rise_by_surgery(f: Tensor, w: Tensor, i: int) -> float:
    """min 1/2 d^T F d over all d with w_i + d_i = 0, by its Karush-Kuhn-Tucker system."""
    n = len(w)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[n, i], system[i, n] = f, 1.0, 1.0
    d = torch.linalg.solve(system, torch.cat([torch.zeros(n), -w[i : i + 1]]).double())[:n]
    return float(0.5 * d @ f @ d)


def scores_of(engine: str, block: int, limit_bytes: int = 1 << 20) -> dict[str, Tensor]:
    model = wrap(make_net(torch.float64), engine)
    batches = [my_part(b) for b in make_batches(NUM, SIZE, torch.float64)]
    scores = score_importance(
        model, batches, loss_fn, head=HEAD, criterion="obs", block=block, damping=DAMPING, limit_bytes=limit_bytes
    )
    out = {}
    for name, shape in scores.shapes.items():
        shard = scores.shards[name]
        whole = torch.zeros(torch.Size(shape).numel())
        whole[shard.box.flat_index(0, shard.box.numel)] = shard.values
        out[name] = whole
    return out


@pytest.mark.parametrize("block", [7, 10_000])
def test_equals_the_least_rise_by_surgery(block: int) -> None:
    found = run_ranks(1, scores_of, "single", block)[0]
    for name in ("blocks.0.up.weight", "conv.weight"):
        weight, matrices = fisher(name, block)
        for b, (f, w) in enumerate(zip(matrices, weight.split(block), strict=True)):
            exact = w.square() / (2 * torch.linalg.inv(f).diagonal())
            mine = found[name][b * block : b * block + len(w)].double()
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=0)
            assert float(mine[0]) == pytest.approx(rise_by_surgery(f, w, 0), rel=1e-5)


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2)])
def test_same_scores_on_any_number_of_ranks(engine: str, ranks: int) -> None:
    """In blocks of 1 under FSDP2, whose rows have odd lengths; DDP has whole weights everywhere."""
    block = 1 if engine == "fsdp2" else 7
    one = run_ranks(1, scores_of, "single", block)[0]
    parts = run_ranks(ranks, scores_of, engine, block)
    for name, values in one.items():
        torch.testing.assert_close(sum(part[name] for part in parts), values, rtol=1e-5, atol=1e-12)  # type: ignore[arg-type]


def test_little_memory_takes_more_passes_and_gives_the_same() -> None:
    rich, poor = (run_ranks(1, scores_of, "single", 7, limit)[0] for limit in (1 << 20, 4 * NUM * 20))
    assert all(torch.equal(poor[name], values) for name, values in rich.items())


def refused() -> list[str]:
    found = []
    cases: list[tuple[str, dict[str, Any]]] = [
        ("fsdp2", {"block": 7}),
        ("single", {"damping": 0.0}),
        ("single", {"batches": iter(())}),
    ]
    for engine, change in cases:
        if engine == "single" and torch.distributed.get_world_size() > 1:
            engine = "ddp"
        batches = change.pop("batches", [my_part(b) for b in make_batches(1, SIZE, torch.float32)])
        with pytest.raises((EngineError, ScoreError)) as error:
            score_importance(wrap(make_net(), engine), batches, loss_fn, head=HEAD, criterion="obs", **change)
        found.append(str(error.value))
    return found


def test_refusals() -> None:
    for cut, damping, no_list in run_ranks(2, refused):
        assert "blocks of 7 weights are cut by the sharding" in cut or "is not a range of rows" in cut
        assert "damping > 0, not 192 and 0.0" in damping and "needs its batches as a list" in no_list
