"""A new engine is one file: nothing else in the package knows `toy_engine`, and everything works under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcft_dist import attach_penalty, score_importance, select_fundamental
from dcft_dist.engines.find import engine_named, find_engine
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.errors import EngineError

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..ranks import run_ranks

TOY = "tests.engines.toy_engine:AveragedEngine"


def score_select_train(engine: str, level: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The selected masks, and the weights after four steps."""
    net = make_net(torch.float64)
    batches = [my_part(batch) for batch in make_batches(4, 8, torch.float64)]
    options = WrapOptions(engine, torch.device("cpu"), list(net.blocks))
    prepared = prepare(net, options, lambda weights: make_optimizer("momentum", [p for _, p, _ in weights]))
    fundamental = select_fundamental(score_importance(prepared.model, batches, loss_fn, head=HEAD), 0.3)
    how: Any = {"level": level, "optimizer": prepared.optimizer}
    with attach_penalty(prepared.model, fundamental, 0.1, **how):
        for batch in batches:
            prepared.zero_grad()
            with prepared.accumulating(last=True):
                prepared.backward(loss_fn(prepared.model, batch))
            prepared.step()
    module = find_engine(prepared.model).module
    return {name: fundamental.mask(name) for name in fundamental.names}, full_state(module)


@pytest.mark.parametrize("level", ["gradient", "update"])
def test_equals_one_process(level: str) -> None:
    masks, weights = run_ranks(1, score_select_train, "single", level)[0]
    for ranks in (1, 2):
        for found_masks, found_weights in run_ranks(ranks, score_select_train, TOY, level):
            assert all(torch.equal(mask, found_masks[name]) for name, mask in masks.items())
            torch.testing.assert_close(found_weights, weights, rtol=1e-9, atol=1e-12)


def test_engines_by_name() -> None:
    assert engine_named("fsdp2").name == "fsdp2" and engine_named(TOY).kinds == ("averaged",)
    assert engine_named("averaged") is engine_named(TOY), "known by its name once it was imported"
    with pytest.raises(EngineError, match=r"unknown engine 'fsdp3' \(did you mean 'fsdp2'\?\)"):
        engine_named("fsdp3")
    with pytest.raises(EngineError, match=r"engine: tests\.engines\.toy_engine:Averaged is not a subclass of"):
        engine_named("tests.engines.toy_engine:Averaged")
