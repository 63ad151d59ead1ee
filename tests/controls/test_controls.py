"""What DCFT is compared with: other sets, and steps of the same length; and the learned factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental
from dcft_dist.config.method import Penalty
from dcft_dist.controls.control_sets import KINDS, control_set
from dcft_dist.controls.removal import choose_fraction
from dcft_dist.controls.step_controls import EqualDisplacement
from dcft_dist.errors import PenaltyError, SelectionError
from dcft_dist.method.gradual_pruning import kept, scores_after_training
from dcft_dist.method.learned_factor import LearnedFactor
from dcft_dist.train.group_norms import GroupNorms
from dcft_dist.train.optimizer import factor_at

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..ranks import run_ranks

FACTOR, REST, UNSCORED = 0.1, 0.8, 0.5


def some_set(dtype: torch.dtype = torch.float64) -> FundamentalSet:
    g, net = torch.Generator().manual_seed(0), make_net(dtype)
    names = ["conv.weight", "encode.weight", "blocks.0.up.weight", "blocks.1.down.weight", "mix.weight"]
    return FundamentalSet.from_masks(
        {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}, head=HEAD
    )


def body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p for n, p in state.items() if not n.startswith("head") and not n.startswith("frozen")}


def chosen_fraction(engine: str) -> tuple[float, list[dict[str, Any]]]:
    """A hundredth of the weights matters much, all others alike and little: removing more does more damage at random too."""
    model = wrap(make_net(torch.float64), engine)
    scores = score_importance(model, None, None, head=HEAD, criterion="random", seed=1)
    matters, start = select_fundamental(scores, 0.01), full_state(model)

    def evaluate() -> dict[str, float]:
        gone = {n: (w == 0) & (start[n] != 0) for n, w in full_state(model).items() if n in matters.names}
        lost = sum(int((gone[n] & matters.mask(n)).sum()) for n in gone)
        return {"loss": lost + 0.1 * sum(int(g.sum()) for g in gone.values())}

    return choose_fraction(model, scores, evaluate, 0)


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp2", 2)])
def test_automatic_fraction_takes_what_matters_and_no_more(engine: str, ranks: int) -> None:
    (fraction, curve), *others = run_ranks(ranks, chosen_fraction, engine)
    assert fraction == 0.01 and all(other == (fraction, curve) for other in others)
    assert [row["fraction"] for row in curve] == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    assert curve[-1]["top"] > curve[2]["top"]  # the damage alone grows on


def one_step(engine: str, control: str) -> dict[str, Any]:
    model = wrap(make_net(torch.float64), engine)
    optimizer = make_optimizer("adamw", model.parameters())
    factors: dict[str, Any] = {"rest_factor": REST, "unscored_factor": UNSCORED}
    share = None
    if control == "equal":
        share = EqualDisplacement(model, some_set(), FACTOR, optimizer=optimizer, **factors)
    elif control == "dcft":
        attach_penalty(model, some_set(), FACTOR, optimizer=optimizer, level="update", **factors)
    groups = GroupNorms(model, some_set(), HEAD)
    groups.remember_start()
    before = full_state(model)
    loss_fn(model, my_part(make_batches(1, 8, torch.float64)[0])).backward()
    optimizer.step()
    after = full_state(model)
    step = {n: after[n] - before[n] for n in after}
    return {"step": step, "share": share and share.share, "movement": groups.movement()}


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
def test_equal_displacement_goes_as_far_as_dcft_in_the_direction_proposed(engine: str, ranks: int) -> None:
    plain, dcft = (run_ranks(1, one_step, "single", control)[0] for control in ("none", "dcft"))
    for found in run_ranks(ranks, one_step, engine, "equal"):
        length = sum(float(d.square().sum()) for d in body(dcft["step"]).values()) ** 0.5
        assert found["movement"]["body"] == pytest.approx(length, rel=1e-9)
        assert 0 < found["share"] < 1
        for name, proposed in plain["step"].items():
            share = found["share"] if name in body(plain["step"]) else 1.0
            torch.testing.assert_close(found["step"][name], share * proposed, rtol=1e-7, atol=1e-12)


def learned(engine: str) -> tuple[float, list[float]]:
    model = wrap(make_net(torch.float64), engine)
    optimizer = make_optimizer("adamw", model.parameters())
    penalty = attach_penalty(model, some_set(), FACTOR, optimizer=optimizer, level="update")
    factor = LearnedFactor(model, penalty, loss_fn, rate=0.05)
    with pytest.raises(PenaltyError, match="no step has been proposed"):
        factor.update([])
    held_out, slope, factors = my_part(make_batches(5, 8, torch.float64)[-1]), 0.0, []
    for i, batch in enumerate(make_batches(3, 8, torch.float64)):
        optimizer.zero_grad()
        loss_fn(model, my_part(batch)).backward()
        optimizer.step()
        factors.append(factor.update([held_out]))
        slope = factor.slope if i == 0 else slope
    return slope, factors


def held_out_loss(factor: float) -> float:
    """After one step with that factor."""
    model = make_net(torch.float64)
    optimizer = make_optimizer("adamw", model.parameters())
    attach_penalty(model, some_set(), factor, optimizer=optimizer, level="update")
    loss_fn(model, make_batches(3, 8, torch.float64)[0]).backward()
    optimizer.step()
    return float(loss_fn(model.eval(), make_batches(5, 8, torch.float64)[-1]).detach())


def finite_difference() -> float:
    return (held_out_loss(FACTOR + 1e-4) - held_out_loss(FACTOR - 1e-4)) / 2e-4


def test_learned_factor_follows_the_slope_of_the_held_out_loss() -> None:
    expected = run_ranks(1, finite_difference)[0]
    slope, factors = run_ranks(1, learned, "single")[0]
    assert slope == pytest.approx(expected, rel=1e-4)
    assert factors[0] == pytest.approx(FACTOR - 0.05 * (1 if slope > 0 else -1))  # the first change is of full length
    assert all(0.0 <= f <= 1.0 for f in factors) and len(set(factors)) > 1
    for found, same in run_ranks(2, learned, "fsdp2"):
        assert found == pytest.approx(slope, rel=1e-7) and same == pytest.approx(factors, rel=1e-6)


def test_a_factor_is_learned_at_the_update_level_alone() -> None:
    net = make_net()
    penalty = attach_penalty(net, some_set(torch.float32), level="gradient")
    with pytest.raises(PenaltyError, match="only at the update level"):
        LearnedFactor(net, penalty, loss_fn)


def test_scheduled_factors() -> None:
    linear, cosine = (Penalty(factor=0.2, schedule=kind, final_factor=1.0) for kind in ("linear", "cosine"))  # type: ignore[arg-type]
    assert [factor_at(linear, step, 5) for step in (0, 2, 4)] == pytest.approx([0.2, 0.6, 1.0])
    assert [factor_at(cosine, step, 5) for step in (0, 1, 2, 4)] == pytest.approx([0.2, 0.317157, 0.6, 1.0], abs=1e-5)


def control_sets(engine: str) -> dict[str, Any]:
    model = wrap(make_net(torch.float64), engine)
    parts = [my_part(batch) for batch in make_batches(2, 8, torch.float64)]
    scores = score_importance(model, parts, loss_fn, head=HEAD)
    top = select_fundamental(scores, 0.2)
    sets = {kind: control_set(model, scores, top, kind, 0) for kind in KINDS}
    with pytest.raises(SelectionError, match=r"unknown control set 'random_matched'.*the kinds are top, random, "):
        control_set(model, scores, top, "random_matched", 0)
    return {k: {n: s.mask(n).numpy() for n in s.names} for k, s in sets.items()} | {"weights": full_state(model)}


def test_control_sets_have_as_many_members_and_are_the_same_on_any_number_of_ranks() -> None:
    one = run_ranks(1, control_sets, "single")[0]
    count = {kind: {n: int(m.sum()) for n, m in one[kind].items()} for kind in KINDS}
    assert len({sum(c.values()) for c in count.values()}) == 1
    assert count["random_tensor"] == count["random_magnitude"] == count["top"] != count["random"]
    for name, top in one["top"].items():
        bins = one["weights"][name].abs().float().view(torch.int32).numpy() >> 21
        matched = one["random_magnitude"][name]
        assert sorted(bins[matched].tolist()) == sorted(bins[top].tolist())
        assert not (one["lowest"][name] & top).any()
    for found in run_ranks(2, control_sets, "fsdp2"):
        for kind in ("random", "random_tensor", "random_magnitude"):
            assert all((found[kind][n] == m).all() for n, m in one[kind].items())


def pruned_gradually(engine: str) -> dict[str, Any]:
    model = wrap(make_net(torch.float64), engine)
    optimizer = make_optimizer("adamw", model.parameters())
    before, zeros, batches = full_state(model), [], make_batches(6, 8, torch.float64)

    def train(turn: int) -> None:
        for batch in batches[2 * turn : 2 * turn + 2]:
            optimizer.zero_grad()
            loss_fn(model, my_part(batch)).backward()
            optimizer.step()
        state = full_state(model)
        zeros.append({n: int((state[n] == 0).sum()) for n in names})

    def scores_now() -> Any:
        return score_importance(model, [my_part(b) for b in batches[:2]], loss_fn, head=HEAD)

    names = list(scores_now().shapes)
    scores = scores_after_training(model, optimizer, rounds=3, fraction=0.2, train=train, score=scores_now)
    after, top = full_state(model), select_fundamental(scores, 0.2)
    return {
        "put back": all(torch.equal(before[n], p) for n, p in after.items()) and not optimizer.state,
        "zeros": [sum(z.values()) for z in zeros],
        "eligible": scores.num_eligible,
        "set": {n: top.mask(n).numpy() for n in top.names},
    }


def test_gradual_pruning_keeps_its_zeros_and_puts_all_back() -> None:
    one = run_ranks(1, pruned_gradually, "single")[0]
    n = one["eligible"]
    assert [kept(0.2, turn, 3) for turn in range(3)] == pytest.approx([0.2 + 0.8 * 8 / 27, 0.2 + 0.8 / 27, 0.2])
    # At the end of each round: what was pruned before it is still zero, though AdamW went on with its moments.
    assert one["zeros"] == [0, n - round(n * kept(0.2, 0, 3)), n - round(n * kept(0.2, 1, 3))] and one["put back"]
    for found in run_ranks(2, pruned_gradually, "fsdp2"):
        assert found["put back"] and found["zeros"] == one["zeros"]
        assert all((found["set"][name] == mask).all() for name, mask in one["set"].items())
