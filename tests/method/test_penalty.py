"""The penalty is in force where it should be, and says so where it is not."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_module

from dcft_dist import DcftError, FundamentalSet, attach_penalty, score_importance
from dcft_dist.distributed import collectives
from dcft_dist.errors import EngineError, FundamentalSetError, PenaltyError

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..ranks import run_ranks
from .penalty_cases import some_set, step, times


def test_a_penalty_that_is_collected_while_another_optimizer_steps() -> None:
    """Its going must not disturb torch, which is walking through its hooks just then."""
    net, other = make_net(), make_net()
    attach_penalty(net, some_set(), optimizer=make_optimizer("adamw", net.parameters()))
    net.itself = (net,)  # only the garbage collector can free it
    gone = weakref.ref(net)
    collect = optimizer_module.register_optimizer_step_pre_hook(lambda *_: [gc.collect(), None][1])
    after = optimizer_module.register_optimizer_step_pre_hook(lambda *_: None)
    gc.disable()
    try:
        del net
        step(other, make_optimizer("sgd", other.parameters()), make_batches(1, 4, torch.float32)[0])
        assert gone() is None
    finally:
        gc.enable()
        collect.remove()
        after.remove()


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["sgd", "momentum", "sgd_decay", "adamw", "rmsprop"])
def test_update_level_shortens_the_step_of_the_optimizer_alone(name: str, factor: float) -> None:
    """At each step the held weights move factor x the step that the optimizer alone makes from the same state."""
    net, chosen = make_net(torch.float64), some_set(dtype=torch.float64)
    optimizer = make_optimizer(name, net.parameters())
    penalty = attach_penalty(net, chosen, factor, optimizer=optimizer, level="update")
    penalty.watch = True
    for batch in make_batches(5, 8, torch.float64):
        before = full_state(net)
        alone = copy.deepcopy(net)
        other = make_optimizer(name, alone.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(alone, other, batch)
        step(net, optimizer, batch)
        proposed, applied = full_state(alone), full_state(net)
        for n in before:
            mask = chosen.mask(n) if n in chosen.names else torch.zeros_like(before[n], dtype=torch.bool)
            expected = times(mask, factor, proposed[n] - before[n])
            torch.testing.assert_close(applied[n] - before[n], expected, rtol=1e-9, atol=1e-15)
            assert torch.equal(applied[n][~mask], proposed[n][~mask])
        assert penalty.in_force() == pytest.approx(factor, abs=1e-6)
    assert penalty.calls["conv.weight"] == 5


def test_an_optimizer_that_was_not_passed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    attach_penalty(net, some_set())
    for name, warned in (("sgd", False), ("adamw", True)):
        net = make_net()
        caplog.clear()
        attach_penalty(net, some_set())
        step(net, make_optimizer(name, net.parameters()), make_batches(1, 8, torch.float32)[0])
        assert ("AdamW may cancel a gradient penalty" in caplog.text) == warned


def adamw_at_gradient_level_cancels() -> tuple[float, float]:
    """The trap that `auto` avoids: AdamW's displacement of the held weights with and without a gradient penalty."""
    moved = []
    for factor in (0.1, 1.0):
        net, chosen = make_net(), some_set()
        start, optimizer = full_state(net), torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        attach_penalty(net, chosen, factor, optimizer=optimizer, level="gradient")
        for batch in make_batches(10, 8, torch.float32):
            step(net, optimizer, batch)
        end = full_state(net)
        moved.append(float((end["mix.weight"] - start["mix.weight"])[chosen.mask("mix.weight")].norm()))
    return moved[0], moved[1]


def test_adam_cancels_a_gradient_penalty_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        with_penalty, without = adamw_at_gradient_level_cancels()
    assert with_penalty / without > 0.9
    assert "Adam may cancel a gradient penalty" in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "level"),
    [("sgd", "gradient"), ("momentum", "gradient"), ("sgd_decay", "update"), ("adamw", "update"), ("rmsprop", "update")],
)
def test_auto_level(optimizer: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    with (
        caplog.at_level(logging.INFO),
        attach_penalty(net, some_set(), optimizer=make_optimizer(optimizer, net.parameters())) as p,
    ):
        assert p.level == level
    assert f"penalty level {level}: " in caplog.text
    assert attach_penalty(net, some_set()).level == "gradient"


def test_head_is_never_touched_and_unscored_is() -> None:
    net = make_net()
    attach_penalty(net, some_set(), 0.0, rest_factor=0.0, unscored_factor=0.0)
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    touched = {n: bool(p.grad.any()) for n, p in net.named_parameters() if p.grad is not None}
    assert {n for n, any_ in touched.items() if any_} == {"head.weight", "head.bias"}


def test_handle() -> None:
    """set_factor acts at once, remove takes everything off, a dropped handle stays in force, copies are free of it."""
    net, batch = make_net(), make_batches(1, 8, torch.float32)[0]
    mask = some_set().mask("mix.weight")

    def gradient() -> Tensor:
        net.zero_grad()
        loss_fn(net, batch).backward()
        return net.mix.weight.grad.clone()

    plain = gradient()
    penalty = attach_penalty(net, some_set(), 0.5)
    torch.testing.assert_close(gradient(), times(mask, 0.5, plain))
    penalty.set_factor(0.25)
    assert penalty.factor == 0.25
    torch.testing.assert_close(gradient(), times(mask, 0.25, plain))
    with pytest.raises(PenaltyError, match="already attached"):
        attach_penalty(net, some_set())
    with pytest.raises(PenaltyError, match=r"between 0 and 1, not 1.5"):
        penalty.set_factor(1.5)
    penalty.remove()
    penalty.remove()
    assert torch.equal(gradient(), plain)
    with attach_penalty(net, some_set(), 0.5) as penalty:
        assert not torch.equal(gradient(), plain)
    assert torch.equal(gradient(), plain)
    attach_penalty(net, some_set(), 0.5)
    gc.collect()
    assert not torch.equal(gradient(), plain)
    for free in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert attach_penalty(free, some_set()).factor == 0.1


class Aliases(nn.Module):
    """A sum hands one and the same gradient memory to both of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.a + self.b).square().sum()


def test_gradients_that_share_memory_are_not_scaled_along() -> None:
    net = Aliases()
    attach_penalty(net, FundamentalSet.from_masks({"a": torch.ones(3, dtype=torch.bool)}), 0.0)
    net().backward()
    assert torch.equal(net.a.grad, torch.zeros(3)) and torch.equal(net.b.grad, torch.full((3,), 4.0))


def test_a_discarded_model_is_not_kept_alive() -> None:
    net = make_net()
    hooks = len(optimizer_module._global_optimizer_pre_hooks)
    attach_penalty(net, some_set(), optimizer=make_optimizer("adamw", net.parameters()))
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    assert len(optimizer_module._global_optimizer_pre_hooks) <= hooks


def test_an_optimizer_is_not_kept_alive() -> None:
    """It has two numbers for each weight; a training may go on with another one."""
    net = make_net()
    first = torch.optim.AdamW(net.parameters())
    attach_penalty(net, some_set(), optimizer=first)
    step(net, first, make_batches(1, 8, torch.float32)[0])
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None
    step(net, torch.optim.AdamW(net.parameters()), make_batches(1, 8, torch.float32)[0])


def sharded_bits(placement: Any) -> tuple[int, int, int, set[str]]:
    model = wrap(make_net(), "fsdp2")
    optimizer = make_optimizer("sgd", model.parameters())
    penalty = attach_penalty(model, some_set(), optimizer=optimizer, level="gradient", mask_placement=placement)
    for _ in range(2):
        step(model, optimizer, my_part(make_batches(1, 8, torch.float32)[0]))
    with collectives.counted() as count:
        step(model, optimizer, my_part(make_batches(1, 8, torch.float32)[0]))
    return penalty.mask_bytes, count.calls, count.num_bytes, set(penalty.calls)


def test_no_rank_holds_all_bits_when_they_are_sharded() -> None:
    """The bits of a group's buffer, once for all of its weights, and once more for those that the backward reaches."""
    net = make_net()
    rows = {n: -(-p.shape[0] // 2) * 2 * p[:1].numel() for n, p in net.named_parameters() if p.requires_grad}
    blocks = [sum(size for n, size in rows.items() if n.startswith(f"blocks.{i}")) for i in (0, 1)]
    root = sum(rows.values()) - sum(blocks)
    used = root - sum(size for n, size in rows.items() if n.startswith("unused"))
    whole = [-(-cells // 8) for cells in (*blocks, root, used)]
    assert {found[:3] for found in run_ranks(2, sharded_bits, "replicated")} == {(sum(whole), 0, 0)}
    part = [-(-size // 2) for size in whole]  # the last part is padded
    for held, calls, sent, fired in run_ranks(2, sharded_bits, "sharded"):
        assert held == sum(part) and len(fired) == 5
        assert (calls, sent) == (3, 2 * (sum(part) - part[2]))


def refused_placements() -> list[str]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    other = FundamentalSet.from_masks({"conv.weight": torch.rand(make_net().conv.weight.shape, generator=generator) < 0.5})
    found = []
    for chosen, placement in ((other, "sharded"), (some_set(), "split")):
        with pytest.raises(PenaltyError) as error:
            attach_penalty(wrap(make_net(), "fsdp2"), chosen, level="gradient", mask_placement=placement)  # type: ignore[arg-type]
        found.append(str(error.value))
    return found


def test_sharded_bits_of_different_sets_are_refused() -> None:
    for different, typo in run_ranks(2, refused_placements):
        assert "the ranks have different fundamental sets" in different and "not 'split'" in typo


def test_a_graph_of_gradients_is_kept() -> None:
    """For penalties on the norm of the gradient: contiguous gradients, and others."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    masks = {n: torch.eye(*p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    with attach_penalty(model, FundamentalSet.from_masks(masks), 0.5):
        (model(torch.randn(3, 4)).square().sum() + model[0].weight.t().square().sum()).backward(create_graph=True)
        assert all(p.grad is not None and p.grad.requires_grad for p in model.parameters())


# -- refused at once ---------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    net = make_net()
    with pytest.raises(FundamentalSetError, match=r"mix.weight is \[3, 3\] in the set and \[7, 13\] in the model"):
        attach_penalty(net, FundamentalSet.from_masks({"mix.weight": torch.ones(3, 3, dtype=torch.bool)}))
    with pytest.raises(FundamentalSetError, match=r"mixx.weight is not in the model .did you mean 'mix.weight'"):
        attach_penalty(net, FundamentalSet.from_masks({"mixx.weight": torch.ones(7, 13, dtype=torch.bool)}))
    tied = torch.ones(13, 7, dtype=torch.bool)
    with pytest.raises(FundamentalSetError, match=r"decode.weight and encode.weight are the same weight"):
        attach_penalty(net, FundamentalSet.from_masks({"encode.weight": tied, "decode.weight": ~tied}))
    with pytest.raises(PenaltyError, match="pass the optimizer"):
        attach_penalty(net, some_set(), level="update")
    with pytest.raises(PenaltyError, match="pass the optimizer"):
        attach_penalty(net, some_set(), where="after")
    with pytest.raises(PenaltyError, match="did you mean 'update'"):
        attach_penalty(net, some_set(), level="updat")  # type: ignore[arg-type]
    with pytest.raises(PenaltyError, match="steps none of the model's weights"):
        attach_penalty(net, some_set(), optimizer=make_optimizer("sgd", make_net().parameters()))
    with pytest.raises(PenaltyError, match="rest_factor must lie between 0 and 1, not -1"):
        attach_penalty(net, some_set(), rest_factor=-1)
    with pytest.raises(PenaltyError, match="factor must lie between 0 and 1, not True"):
        attach_penalty(net, some_set(), factor=True)
    with pytest.raises(PenaltyError, match="half precision without float32 masters"):
        attach_penalty(make_net(torch.bfloat16), some_set())
    with pytest.raises(PenaltyError, match=r"use select_fundamental\(scores\) or FundamentalSet.load\(path\)"):
        attach_penalty(net, "set.safetensors")  # type: ignore[arg-type]
    with pytest.raises(PenaltyError, match="factor must lie between 0 and 1"):
        attach_penalty(net, some_set(), make_optimizer("sgd", net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"must be a torch.nn.Module, not list"):
        attach_penalty([], some_set())  # type: ignore[arg-type]
    with attach_penalty(net, some_set()), pytest.raises(DcftError, match="remove it before scoring"):
        score_importance(net, make_batches(1, 4, torch.float32), loss_fn, head=HEAD)
