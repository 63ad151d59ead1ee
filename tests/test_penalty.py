"""The penalty is in force where it should be, and says so where it is not."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import optimizer as optimizer_module

from dcft_dist import DcftError, FundamentalSet, attach_penalty, score_importance
from dcft_dist.distributed import collectives
from dcft_dist.errors import EngineError, FundamentalSetError, PenaltyError

from .nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from .ranks import run_ranks


def some_set(seed: int = 0, dtype: torch.dtype = torch.float32) -> FundamentalSet:
    g = torch.Generator().manual_seed(seed)
    net = make_net(dtype)
    names = ["conv.weight", "encode.weight", "blocks.0.up.weight", "blocks.1.down.weight", "mix.weight", "unused.weight"]
    return FundamentalSet.from_masks(
        {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}, head=HEAD
    )


def times(mask: Tensor, factor: float, values: Tensor) -> Tensor:
    """factor x values where the mask is set, in the precision of the values."""
    return torch.where(mask, factor * values, values)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()


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


# -- on several ranks --------------------------------------------------------------------------------------------------


def failures(engine: str) -> dict[str, str]:
    """Every way to lose the penalty raises, on every rank."""
    found: dict[str, str] = {}
    batch = my_part(make_batches(1, 8, torch.float32)[0])

    def attempt(case: str, prepare: Any) -> None:
        try:
            prepare()
        except DcftError as error:
            found[case] = str(error)

    def lost_hook() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        penalty = attach_penalty(model, some_set(), optimizer=optimizer)
        step(model, optimizer, batch)
        if dist.get_rank() == 0:
            penalty._handles[0].remove()
            penalty._handles[1].remove()
        if dist.get_world_size() == 1 or engine == "fsdp2":
            for handle in penalty._handles[:-1]:
                handle.remove()
        step(model, optimizer, batch)
        penalty.in_force()

    def doubled_hook() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        penalty = attach_penalty(model, some_set(), optimizer=optimizer)
        if dist.get_rank() == 1:
            penalty._seen.leaves[0].fired += 1
        step(model, optimizer, batch)

    def attached_before_sharding() -> None:
        net = make_net()
        attach_penalty(net, some_set())
        model = fully_shard(net)
        step(model, make_optimizer("sgd", model.parameters()), batch)

    def optimizer_before_sharding() -> None:
        net = make_net()
        optimizer = make_optimizer("sgd", net.parameters())
        attach_penalty(fully_shard(net), some_set(), optimizer=optimizer)

    def other_factor_on_one_rank() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        attach_penalty(model, some_set(), optimizer=optimizer).set_factor(0.1 * (1 + dist.get_rank()))
        step(model, optimizer, batch)

    def second_step_on_the_same_gradients() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        attach_penalty(model, some_set(), optimizer=optimizer)
        step(model, optimizer, batch)
        step(model, optimizer, batch)
        optimizer.step()

    def other_factor_and_on_it_goes() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        attach_penalty(model, some_set(), optimizer=optimizer).set_factor(0.1 * (1 + dist.get_rank()))
        with pytest.raises(PenaltyError):
            step(model, optimizer, batch)
        optimizer.step()

    def other_factor_later() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        penalty = attach_penalty(model, some_set(), optimizer=optimizer)
        step(model, optimizer, batch)
        penalty.set_factor(0.1 * (1 + dist.get_rank()))
        step(model, optimizer, batch)
        penalty.in_force()

    def bad_factor_on_one_rank() -> None:
        attach_penalty(wrap(make_net(), engine), some_set(), 0.1 + 2 * dist.get_rank())

    def thawed() -> None:
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        attach_penalty(model, some_set(), optimizer=optimizer)
        loss_fn(model, batch).backward()
        (model.module if engine == "ddp" else model).frozen.weight.requires_grad_(True)
        optimizer.step()

    def half_outside() -> None:
        net = make_net()
        fully_shard(net.blocks[0])
        attach_penalty(net, some_set())

    for case in (
        lost_hook, doubled_hook, attached_before_sharding, optimizer_before_sharding, other_factor_on_one_rank,
        other_factor_later, other_factor_and_on_it_goes, second_step_on_the_same_gradients,
        bad_factor_on_one_rank, thawed, half_outside,
    ):  # fmt: skip
        attempt(case.__name__, case)
    return found


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_penalty_that_is_not_in_force_is_an_error_on_every_rank(engine: str) -> None:
    for rank, found in enumerate(run_ranks(2, failures, engine)):
        assert "attach it after sharding" in found["attached_before_sharding"]
        assert "create it after the model was wrapped" in found["optimizer_before_sharding"]
        assert "the ranks disagree on the factor (0.1 to 0.2)" in found["other_factor_on_one_rank"]
        assert "the ranks disagree on the factor (0.1 to 0.2)" in found["other_factor_later"]
        assert "the ranks disagree on the factor (0.1 to 0.2)" in found["other_factor_and_on_it_goes"]
        assert "a second step on the same gradients" in found["second_step_on_the_same_gradients"]
        assert "factor must lie between 0 and 1, not 2.1" in found["bad_factor_on_one_rank"]
        assert "frozen.weight were frozen when the penalty was attached" in found["thawed"]
        assert "outside every fully_shard group" in found["half_outside"]
        expected = "fired 2 times for 1 backwards" if rank == 1 else "another rank is without penalty"
        assert expected in found["doubled_hook"]
        if engine == "fsdp2":
            assert "hold a gradient, but no hook fired" in found["lost_hook"]


def collectives_of_steps(engine: str) -> dict[str, list[int]]:
    found = {}
    for level, where in (("gradient", "before"), ("gradient", "after"), ("update", "before")):
        model = wrap(make_net(), engine)
        optimizer = make_optimizer("sgd", model.parameters())
        penalty = attach_penalty(model, some_set(), optimizer=optimizer, level=level, where=where)  # type: ignore[arg-type]
        found[f"{level} {where}"] = []
        for i in range(4):
            penalty.set_factor(0.1 * i)
            with collectives.counted() as count:
                step(model, optimizer, my_part(make_batches(1, 8, torch.float32)[0]))
            found[f"{level} {where}"].append(count.calls)
    return found


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_step_sends_nothing_after_the_first(engine: str) -> None:
    for found in run_ranks(2, collectives_of_steps, engine):
        assert set(map(tuple, found.values())) == {(1, 0, 0, 0)}, found


def sharded_bits(placement: Any) -> tuple[int, int, int, set[str]]:
    model = wrap(make_net(), "fsdp2")
    optimizer = make_optimizer("sgd", model.parameters())
    penalty = attach_penalty(model, some_set(), optimizer=optimizer, level="gradient", mask_placement=placement)
    step(model, optimizer, my_part(make_batches(1, 8, torch.float32)[0]))
    with collectives.counted() as count:
        step(model, optimizer, my_part(make_batches(1, 8, torch.float32)[0]))
    return penalty.mask_bytes, count.calls, count.num_bytes, set(penalty.calls)


def test_no_rank_holds_all_bits_when_they_are_sharded() -> None:
    whole = {name: -(-prod(shape) // 8) for name, shape in some_set().info.shapes.items()}
    assert {found[:3] for found in run_ranks(2, sharded_bits, "replicated")} == {(sum(whole.values()), 0, 0)}
    part = {name: -(-size // 2) for name, size in whole.items()}  # the last part is padded
    for held, calls, sent, fired in run_ranks(2, sharded_bits, "sharded"):
        assert held == sum(part.values()) and calls == len(fired) == len(whole) - 1  # one is unused
        assert sent == sum(2 * part[name] for name in fired)


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
        assert "the ranks have different sets" in different and "not 'split'" in typo


class Branches(nn.Module):
    """Rank-dependent use of weights, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a if dist.get_rank() == 0 else self.b)(x).square().sum()


def unused_on_one_rank() -> int:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Branches(), find_unused_parameters=True)
    chosen = FundamentalSet.from_masks({n: torch.ones(4, 4, dtype=torch.bool) for n in ("a.weight", "b.weight")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach_penalty(model, chosen, 0.0, optimizer=optimizer)
    before = full_state(model)
    for to_none in (True, False, False):
        optimizer.zero_grad(set_to_none=to_none)
        model(torch.ones(2, 4)).backward()
        optimizer.step()
    after = full_state(model)
    assert torch.equal(before["a.weight"], after["a.weight"]) and torch.equal(before["b.weight"], after["b.weight"])
    assert not torch.equal(before["a.bias"], after["a.bias"])
    return penalty.calls.total()


def test_a_weight_unused_on_one_rank_is_no_false_alarm() -> None:
    assert run_ranks(2, unused_on_one_rank) == [3, 3]


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
    with pytest.raises(PenaltyError, match="half precision without float32 masters"):
        attach_penalty(make_net(torch.bfloat16), some_set())
    with pytest.raises(PenaltyError, match=r"FundamentalSet.load\(path\) of a file"):
        attach_penalty(net, "set.safetensors")  # type: ignore[arg-type]
    with pytest.raises(PenaltyError, match="factor must lie between 0 and 1"):
        attach_penalty(net, some_set(), make_optimizer("sgd", net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"must be a torch.nn.Module, not list"):
        attach_penalty([], some_set())  # type: ignore[arg-type]
    with attach_penalty(net, some_set()), pytest.raises(DcftError, match="remove it before scoring"):
        score_importance(net, make_batches(1, 4, torch.float32), loss_fn, head=HEAD)
