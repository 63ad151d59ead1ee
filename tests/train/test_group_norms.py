"""Logged gradient norms are the same for every engine and number of ranks: those of the mean gradient, before clipping."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dcft_dist.train.group_norms import GroupNorms

from ..engines.cases import get
from ..method.penalty_cases import some_set
from ..nets import loss_fn, make_batches, make_net
from ..ranks import run_ranks


def norms(engine: str) -> dict[str, float]:
    rank, size = dist.get_rank(), 8 // dist.get_world_size()
    prepared = get(engine)
    groups = GroupNorms(prepared.model, some_set(), "head")
    x, y = make_batches(1, 8, torch.float32)[0]
    prepared.zero_grad(to_none=True)
    prepared.backward(loss_fn(prepared.model, (x[rank * size :][:size], y[rank * size :][:size])), True)
    return groups.gradient_norms()


def by_hand() -> dict[str, float]:
    net, mask = make_net(), some_set()
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    squares = {n: p.grad.double().square() for n, p in net.named_parameters() if p.grad is not None and "head" not in n}
    inside = sum(float(value[mask.mask(n)].sum()) for n, value in squares.items() if n in mask.names)
    scored = sum(float(value.sum()) for n, value in squares.items() if n in mask.names)
    body = sum(float(value.sum()) for value in squares.values())
    return {"fundamental": inside**0.5, "rest": (scored - inside) ** 0.5, "body": body**0.5}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp1-full-flat", "fsdp1-full-orig", "fsdp2-hybrid"])
def test_gradient_norms_do_not_depend_on_the_ranks(engine: str) -> None:
    wanted = by_hand()
    assert 0 < wanted["fundamental"] < wanted["body"]
    for ranks in (4,) if "hybrid" in engine else (1, 2, 4):
        for found in run_ranks(ranks, norms, engine):
            assert found == pytest.approx(wanted, rel=1e-5), ranks
