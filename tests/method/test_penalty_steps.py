"""The penalty around steps: several optimizers, skipped steps, closures, errors inside a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dcft_dist import attach_penalty
from dcft_dist.errors import PenaltyError

from ..nets import full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..ranks import run_ranks
from .penalty_cases import some_set, step, times


def test_several_optimizers_share_the_weights() -> None:
    """As with Muon for matrices and AdamW for the rest: each step shortens the weights that it steps, once."""
    net, chosen, batches = make_net(torch.float64), some_set(dtype=torch.float64), make_batches(4, 8, torch.float64)
    first = torch.optim.AdamW([net.conv.weight, net.mix.weight, net.head.weight], lr=0.01)
    second = torch.optim.RMSprop([net.encode.weight, net.blocks[0].up.weight], lr=0.01)
    attach_penalty(net, chosen, 0.1, optimizer=first, level="update")
    for batch in batches:
        before = full_state(net)
        net.zero_grad()
        loss_fn(net, batch).backward()
        alone = copy.deepcopy(net)
        for mine, theirs in (
            (first, [alone.conv.weight, alone.mix.weight, alone.head.weight]),
            (second, [alone.encode.weight, alone.blocks[0].up.weight]),
        ):
            other = type(mine)(theirs, lr=0.01)
            other.load_state_dict(copy.deepcopy(mine.state_dict()))
            for p, q in zip(theirs, mine.param_groups[0]["params"], strict=True):
                p.grad = q.grad.clone()
            other.step()
            mine.step()
        after, proposed = full_state(net), full_state(alone)
        for n in ("mix.weight", "encode.weight", "head.weight"):
            mask = chosen.mask(n) if n in chosen.names else torch.zeros_like(before[n], dtype=torch.bool)
            torch.testing.assert_close(
                after[n] - before[n], times(mask, 0.1, proposed[n] - before[n]), rtol=1e-9, atol=1e-15
            )


def test_a_skipped_step_moves_nothing_and_the_next_one_is_right() -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    penalty = attach_penalty(net, some_set(), 0.1, optimizer=optimizer)
    for i, batch in enumerate(make_batches(3, 8, torch.float32)):
        before = full_state(net)
        optimizer.zero_grad()
        scaler.scale(loss_fn(net, batch)).backward()
        if i == 1:
            net.mix.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(full_state(net)["mix.weight"], before["mix.weight"])
        assert moved == (i != 1)
    assert penalty.calls["mix.weight"] == 3


def test_a_skipped_step_after_apply_does_not_count() -> None:
    """Gradients that were multiplied, then thrown away: the next ones are multiplied again."""
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    penalty = attach_penalty(net, some_set(), 0.0, optimizer=optimizer, where="after")
    first, second = make_batches(2, 8, torch.float32)
    before = full_state(net)
    loss_fn(net, first).backward()
    penalty.apply()
    optimizer.zero_grad()
    loss_fn(net, second).backward()
    optimizer.step()
    for name in ("mix.weight", "conv.weight"):
        mask = some_set().mask(name)
        assert torch.equal(full_state(net)[name][mask], before[name][mask])
        assert not torch.equal(full_state(net)[name], before[name])


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("level", "where"), [("update", "before"), ("gradient", "before"), ("gradient", "after")])
def test_a_closure_computes_the_gradients_inside_the_step(level: Any, where: Any, by_name: bool) -> None:
    states = []
    for inside in (False, True):
        net, batches = make_net(), make_batches(3, 8, torch.float32)
        optimizer = make_optimizer("sgd", net.parameters())
        penalty = attach_penalty(net, some_set(), 0.1, optimizer=optimizer, level=level, where=where)
        for batch in batches:

            def closure(batch: Any = batch, net: Any = net, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_fn(net, batch)
                loss.backward()
                return loss

            if inside:
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert loss.requires_grad
            else:
                closure()
                optimizer.step()
        assert penalty.calls["mix.weight"] == 3
        states.append(full_state(net))
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize(("level", "where"), [("gradient", "after"), ("update", "before")])
def test_a_closure_that_steps_another_optimizer(level: Any, where: Any) -> None:
    """Both optimizers' weights are held: those of the outer one, whose gradients the closure makes, too."""
    net, chosen = make_net(), some_set()
    parts = {
        k: [p for n, p in net.named_parameters() if p.requires_grad and n.startswith("mix") == k] for k in (True, False)
    }
    outer, inner = (torch.optim.SGD(parts[k], lr=0.1) for k in (True, False))
    start = full_state(net)
    attach_penalty(net, chosen, 0.0, optimizer=outer, level=level, where=where)

    def closure() -> Tensor:
        net.zero_grad()
        loss = loss_fn(net, make_batches(1, 8, torch.float32)[0])
        loss.backward()
        inner.step()
        return loss

    outer.step(closure)
    for name in ("mix.weight", "encode.weight"):
        moved = full_state(net)[name] != start[name]
        assert not moved[chosen.mask(name)].any() and moved[~chosen.mask(name)].any(), name


@pytest.mark.parametrize(
    ("level", "where", "works"), [("update", "before", False), ("gradient", "after", False), ("gradient", "before", True)]
)
def test_a_closure_that_is_evaluated_several_times(level: Any, where: Any, works: bool) -> None:
    net, batch = make_net(), make_batches(1, 8, torch.float32)[0]
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(net, batch)
        loss.backward()
        return loss

    before = full_state(net)
    attach_penalty(net, some_set(), 0.0, optimizer=optimizer, level=level, where=where)
    if not works:
        with pytest.raises(PenaltyError, match="evaluates its closure more than once"):
            optimizer.step(closure)
        return
    optimizer.step(closure)
    mask = some_set().mask("mix.weight")
    assert torch.equal(full_state(net)["mix.weight"][mask], before["mix.weight"][mask])
    assert not torch.equal(full_state(net)["mix.weight"], before["mix.weight"])


def test_an_error_inside_a_step_does_not_switch_it_off() -> None:
    net, (first, second) = make_net(), make_batches(2, 8, torch.float32)
    interrupted = make_optimizer("adamw", net.parameters())
    attach_penalty(net, some_set(), 0.0, optimizer=interrupted)
    for group in interrupted.param_groups:
        group["betas"] = None  # raises in the middle of the step
    with pytest.raises(TypeError):
        step(net, interrupted, first)
    before = full_state(net)
    step(net, make_optimizer("adamw", net.parameters()), second)
    mask = some_set().mask("mix.weight")
    assert torch.equal(full_state(net)["mix.weight"][mask], before["mix.weight"][mask])
    assert not torch.equal(full_state(net)["mix.weight"], before["mix.weight"])


def zero_redundancy() -> float:
    """An optimizer inside an optimizer: the step is shortened once."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ends = []
    for sharded in (True, False):
        model = wrap(make_net(torch.float64), "ddp")
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(weights, lr=0.01)
        if sharded:
            optimizer = ZeroRedundancyOptimizer(weights, torch.optim.AdamW, lr=0.01)
        attach_penalty(model, some_set(dtype=torch.float64), 0.1, optimizer=optimizer)
        for batch in make_batches(3, 8, torch.float64):
            step(model, optimizer, my_part(batch))
        ends.append(full_state(model))
    return max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0])


def test_zero_redundancy_optimizer() -> None:
    assert max(run_ranks(2, zero_redundancy)) < 1e-12
