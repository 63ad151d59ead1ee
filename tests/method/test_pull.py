"""The pull to the start: under every engine as in one process, alone and after a penalty has shortened the step."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.distributed import collectives
from dcft_dist.errors import PenaltyError
from dcft_dist.method.levels import levels_of
from dcft_dist.method.pull import PullToStart

from ..nets import HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import RANKS, prepare
from ..ranks import run_ranks
from .test_levels import expected, some_scores

STRENGTH, FACTOR, STEPS = 3.0, 0.1, 3


def some_set() -> FundamentalSet:
    g, net = torch.Generator().manual_seed(0), make_net()
    names = ["conv.weight", "blocks.0.up.weight", "mix.weight"]
    return FundamentalSet.from_masks(
        {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}, head=HEAD
    )


def trained(
    engine: str, ranks: int, optimizer: str, share: float, penalty: str, selective: bool = False
) -> dict[str, Tensor]:
    """Whole weights after three steps. `penalty`: when it is attached, "before" or "after" the pull, or "" for none."""
    prepared = prepare(make_net, engine, lambda p: make_optimizer(optimizer, p), micro_batch=8 // ranks)
    levels = levels_of(some_scores(prepared.model, "zeros"))

    def attach() -> None:
        attach_penalty(prepared.model, some_set(), FACTOR, optimizer=prepared.optimizer, level="update")

    if penalty == "before":
        attach()
    strength = 0.45 if selective else STRENGTH
    pull = PullToStart(
        prepared.model,
        HEAD,
        strength,
        prepared.optimizer,
        by_importance=share,
        levels=levels,
        selective=selective,
    )
    if penalty == "after":
        attach()
    for batch in make_batches(STEPS, 8, torch.float32):
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
        prepared.step()
    pull.check()
    assert pull.steps >= STEPS
    return prepared.state()


def level_of_each(net: nn.Module) -> dict[str, Tensor]:
    scores = some_scores(net, "zeros")
    return expected({n: s.values.view(scores.shapes[n]) for n, s in scores.shards.items()})


def by_hand(optimizer_name: str, share: float, penalty: bool, selective: bool = False) -> dict[str, Tensor]:
    """One process and plain tensors: the optimizer's step, times the factor on the set, and then the pull."""
    net = make_net()
    level = level_of_each(net)
    every = torch.cat([v.reshape(-1) for v in level.values()]).double()
    mean = ((2 * every + 1) / 256).mean()
    strengths = {n: 1 - share + share * (2 * v.double() + 1) / 256 / mean for n, v in level.items()}
    chosen = some_set()
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = make_optimizer(optimizer_name, net.parameters())
    lr, selected = optimizer.param_groups[0]["lr"], list[bool]()
    for batch in make_batches(STEPS, 8, torch.float32):
        old = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if penalty and name in chosen.names:
                    p.copy_(torch.where(chosen.mask(name), old[name] + FACTOR * (p - old[name]), p))
                if p.requires_grad and not name.startswith("head"):
                    rate = lr * STRENGTH
                    if selective:
                        before, after = (old[name] - start[name]).norm(), (p - start[name]).norm()
                        back = p.grad is not None and float((p.grad * (old[name] - start[name])).sum()) > 0
                        rate = 0.45 * float((1 - before / after).clamp(min=0)) if back and after > 0 else 0.0
                        selected.append(rate > 0)
                    weight = rate * strengths.get(name, torch.ones(())).to(p.dtype)
                    p.copy_(torch.lerp(p, start[name], float(weight) if not weight.dim() else weight))
    assert not selective or (any(selected) and not all(selected)), "some tensors are pulled, and some are not"
    return {n: p.detach() for n, p in net.named_parameters()}


def all_cases(engine: str, ranks: int) -> list[dict[str, Tensor]]:
    return [trained(engine, ranks, *case) for case in CASES]


# optimizer, share by importance, when a penalty is attached, whether the pull is selective
CASES = [("sgd", 0.0, "", False), ("adamw_smooth", 1.0, "before", False), ("sgd", 0.5, "after", False)]
CASES += [("momentum", 0.5, "after", True)]


@pytest.mark.parametrize(("engine", "ranks"), RANKS)
def test_pull_under_every_engine(engine: str, ranks: int) -> None:
    results = run_ranks(ranks, all_cases, engine, ranks)
    for number, case in enumerate(CASES):
        optimizer, share, penalty, selective = case
        right = by_hand(optimizer, share, bool(penalty), selective)
        for found in results:
            for name, weight in right.items():
                if name.startswith("unused") and optimizer == "adamw_smooth":
                    continue  # some engines give it a gradient of 0, so AdamW decays it
                torch.testing.assert_close(
                    found[number][name], weight, rtol=2e-5, atol=2e-6, msg=partial("{} {}: {}".format, case, name)
                )


def test_without_importance_it_is_l2_sp_to_the_bit() -> None:
    for optimizer in ("sgd", "adamw"):
        right, found = by_hand(optimizer, 0.0, False), trained("single", 1, optimizer, 0.0, "")
        assert all(torch.equal(found[name], weight) for name, weight in right.items())


def test_it_differs_from_other_pulls_by_what_it_should() -> None:
    """The head is not pulled; a weight with a high level stays nearer to its start, one with a low level moves further."""
    start = {n: p.detach() for n, p in make_net().named_parameters()}
    even, uneven = (trained("single", 1, "sgd", share, "") for share in (0.0, 1.0))
    level = level_of_each(make_net())
    high, low = (
        torch.cat([v.reshape(-1) for v in level.values()]) >= 200,
        torch.cat([v.reshape(-1) for v in level.values()]) < 50,
    )
    way = [torch.cat([(s[n] - start[n]).abs().reshape(-1) for n in level]) for s in (even, uneven)]
    assert (way[1] - way[0])[high].sum() < 0 < (way[1] - way[0])[low].sum()


def test_what_is_refused() -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    levels = levels_of(some_scores(net, "random"))
    with pytest.raises(PenaltyError, match="by_importance needs levels"):
        PullToStart(net, HEAD, 1.0, optimizer, by_importance=0.5)
    with pytest.raises(PenaltyError, match="must be at least 0"):
        PullToStart(net, HEAD, -1.0, optimizer)
    with pytest.raises(PenaltyError, match="in \\[0, 1\\]"):
        PullToStart(net, HEAD, 1.0, optimizer, by_importance=1.5, levels=levels)
    with pytest.raises(PenaltyError, match="pass the optimizer"):
        PullToStart(net, HEAD, 1.0, make_optimizer("sgd", make_net().parameters()))
    with pytest.raises(PenaltyError, match="pass the optimizer"):
        PullToStart(net, HEAD, 1.0)
    with pytest.raises(PenaltyError, match="half precision"):
        half = nn.Linear(3, 3).to(torch.bfloat16)
        PullToStart(half, (), 1.0, torch.optim.SGD(half.parameters(), lr=0.1))
    for other in (nn.Linear(3, 3), nn.Sequential(OrderedDict(mix=nn.Linear(12, 7)))):
        with pytest.raises(PenaltyError, match=r"the model lacks .* of the levels, or has it in another shape"):
            PullToStart(other, (), 1.0, torch.optim.SGD(other.parameters(), lr=0.1), by_importance=1.0, levels=levels)
    with pytest.raises(PenaltyError, match=r"of a selective pull must be at most 1, not 1\.5"):
        PullToStart(net, HEAD, 1.0, optimizer, by_importance=0.5, levels=levels, selective=True)
    pull = PullToStart(net, HEAD, 6.0, optimizer, by_importance=1.0, levels=levels)
    with pytest.raises(PenaltyError, match="already attached"):
        PullToStart(net, HEAD, 6.0, optimizer)
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    with pytest.raises(PenaltyError, match=r"lr 0.1 x strength 6 x (1.99|2)\d*\): it must be at most 1"):
        optimizer.step()
    pull.remove()
    PullToStart(net, HEAD, 6.0, optimizer)


class Masters(torch.optim.SGD):
    """Steps copies of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.own = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.own[p] -= group["lr"] * p.grad
                    p.copy_(self.own[p])


def test_an_optimizer_that_undoes_the_pull() -> None:
    net = make_net()
    optimizer = Masters([p for p in net.parameters() if p.requires_grad], 0.1)
    PullToStart(net, HEAD, 1.0, optimizer)
    with pytest.raises(PenaltyError, match=r"Masters cannot be tried on a copy of .* so the pull cannot hold"):
        for batch in make_batches(3, 8, torch.float32):
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            optimizer.step()


def test_another_optimizer_of_the_same_weights() -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    pull = PullToStart(net, HEAD, 1.0, optimizer)
    of_the_head = torch.optim.SGD(net.head.parameters(), lr=0.1)
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    of_the_head.step()  # which is not pulled
    other = make_optimizer("sgd", net.parameters())
    with pytest.raises(PenaltyError, match=r"SGD steps conv.weight, conv.bias, encode.weight .*follows another optimizer"):
        other.step()
    pull.check()
    del optimizer
    gc.collect()
    with pytest.raises(PenaltyError, match="was taken off"):
        pull.check()


@pytest.mark.parametrize(("selective", "number"), [(False, 0), (True, 1)])
def test_what_a_step_sends(selective: bool, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = make_net(), list[str]()
    optimizer = make_optimizer("sgd", net.parameters())
    PullToStart(net, HEAD, 0.5, optimizer, selective=selective)
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    for name in ("all_reduce", "all_gather_ints", "all_gather_uneven", "reduce_numbers"):
        called = getattr(collectives, name)
        monkeypatch.setattr(collectives, name, lambda *a, n=name, f=called, **k: calls.append(n) or f(*a, **k))
    optimizer.step()
    assert calls == ["all_reduce"] * number


def test_a_selective_pull_takes_no_closure() -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    PullToStart(net, HEAD, 1.0, optimizer, selective=True)
    with pytest.raises(PenaltyError, match="cannot follow a step with a closure"):
        optimizer.step(lambda: 0.0)


def test_it_lasts_and_says_when_it_does_not() -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    PullToStart(net, HEAD, 10.0, optimizer)  # lr * strength = 1: back to the start at every step; nobody keeps the handle
    twin = copy.deepcopy(net)
    for model, steps in ((net, optimizer), (twin, make_optimizer("sgd", twin.parameters()))):
        loss_fn(model, make_batches(1, 8, torch.float32)[0]).backward()
        steps.step()
    assert torch.equal(net.mix.weight, start["mix.weight"]) and not torch.equal(net.head.weight, start["head.weight"])
    assert not torch.equal(twin.mix.weight, start["mix.weight"]), "a copy is not pulled"
    other = make_net()
    of_other = make_optimizer("sgd", other.parameters())
    pull = PullToStart(other, HEAD, 1.0, of_other)
    pull.check()
    hooks = dict(_global_optimizer_post_hooks)
    _global_optimizer_post_hooks.clear()
    try:
        with pytest.raises(PenaltyError, match="was taken off"):
            pull.check()
    finally:
        _global_optimizer_post_hooks.update(hooks)
