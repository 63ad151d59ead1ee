"""After a training, a set and the rest go back by different shares: under every engine as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.controls.interpolation import Way
from dcft_dist.errors import EngineError

from ..nets import HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import RANKS, prepare
from ..ranks import run_ranks

PLACES = [(0.0, 1.0), (0.25, 0.75), (1.0, 0.5), (0.5, 0.5), (0.0, 0.0)]


def places(engine: str) -> tuple[list[dict[str, Tensor]], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights and loss at start, end and each place; whether `back` gives the bits of the end; and the masks."""
    prepared = prepare(
        make_net, engine, lambda p: make_optimizer("adamw_smooth", p), micro_batch=12 // dist.get_world_size()
    )
    batches = [my_part(batch) for batch in make_batches(3, 12, torch.float32)]
    scores = score_importance(prepared.model, batches[:1], loss_fn, head=HEAD)
    chosen = select_fundamental(scores, fraction=0.3)
    way = Way(prepared.model, HEAD)
    with pytest.raises(EngineError, match="the way has no end"):
        way.go(chosen, 0.0, 1.0)
    states, losses = [prepared.state()], []
    for batch in batches:
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, batch), True)
        prepared.step()
    way.ended()
    states.append(prepared.state())
    for on_set, on_rest in PLACES:
        way.go(chosen, on_set, on_rest)
        with torch.no_grad():
            prepared.model.eval()
            losses.append(float(loss_fn(prepared.model, batches[0])))
        states.append(prepared.state())
    way.back()
    back = prepared.state()
    assert all(torch.equal(back[name], weight) for name, weight in states[1].items())
    return states, losses, {name: chosen.mask(name) for name in chosen.info.shapes}, back


@pytest.mark.parametrize(("engine", "ranks"), RANKS)
def test_every_place_under_every_engine(engine: str, ranks: int) -> None:
    for states, losses, masks, _ in run_ranks(ranks, places, engine):
        start, end, *found = states
        moved = [name for name in start if not torch.equal(start[name], end[name])]
        assert {"head.weight", "blocks.0.up.weight", "blocks.0.up.bias"} <= set(moved)
        for (on_set, on_rest), state in zip(PLACES, found, strict=True):
            for name, weight in state.items():
                share = torch.full(weight.shape, on_rest)
                if name in masks:
                    share[masks[name].view(weight.shape)] = on_set
                if name.startswith("head"):
                    share = torch.ones(weight.shape)
                expected = torch.where(share == 1, end[name], start[name] + share * (end[name] - start[name]))
                assert torch.equal(weight, expected.to(weight.dtype)), (name, on_set, on_rest)
        assert len(set(losses)) == len(PLACES), "the next forward computes with them"


def test_a_set_of_another_model() -> None:
    net = make_net()
    way = Way(net, HEAD)
    way.ended()
    way.go(FundamentalSet.from_masks({"mix.weight": torch.ones(net.mix.weight.shape, dtype=torch.bool)}), 0.0, 1.0)
    way.back()
