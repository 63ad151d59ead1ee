"""A penalty that does not act is an error on every rank, and watching it sends nothing after the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dcft_dist import DcftError, FundamentalSet, attach_penalty
from dcft_dist.distributed import collectives
from dcft_dist.errors import PenaltyError
from dcft_dist.method import penalty_watch

from ..nets import full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..ranks import run_ranks
from .penalty_cases import some_set, step

# -- on several ranks --------------------------------------------------------------------------------------------------


Batch = tuple[torch.Tensor, torch.Tensor]


# -- ways to lose a penalty: (engine, this rank's batch) --------------------------------------------------------------


def lost_hook(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    penalty = attach_penalty(model, some_set(), optimizer=optimizer)
    step(model, optimizer, batch)
    hooks: Any = penalty._hooks
    if engine == "fsdp2":
        for count in hooks.buckets:
            count.bucket.release()
    elif dist.get_rank() == 0:
        for handle in hooks.handles[:2]:
            handle.remove()
    step(model, optimizer, batch)
    penalty.in_force()


def doubled_hook(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    penalty = attach_penalty(model, some_set(), optimizer=optimizer)
    hooks: Any = penalty._hooks
    if dist.get_rank() == 1 and engine == "fsdp2":
        bucket = hooks.buckets[0].bucket
        before = bucket._before
        bucket._before = lambda buffer, present: (before(buffer, present), before(buffer, frozenset()))
    elif dist.get_rank() == 1:
        hooks.leaves[0].fired += 1
    step(model, optimizer, batch)


def attached_before_sharding(_: str, batch: Batch) -> None:
    net = make_net()
    attach_penalty(net, some_set())
    model = fully_shard(net)
    step(model, make_optimizer("sgd", model.parameters()), batch)


def optimizer_before_sharding(_: str, __: Batch) -> None:
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    attach_penalty(fully_shard(net), some_set(), optimizer=optimizer)


def other_factor_on_one_rank(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    attach_penalty(model, some_set(), optimizer=optimizer).set_factor(0.1 * (1 + dist.get_rank()))
    step(model, optimizer, batch)


def second_step_on_the_same_gradients(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    attach_penalty(model, some_set(), optimizer=optimizer)
    step(model, optimizer, batch)
    step(model, optimizer, batch)
    optimizer.step()


def other_factor_and_on_it_goes(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    attach_penalty(model, some_set(), optimizer=optimizer).set_factor(0.1 * (1 + dist.get_rank()))
    with pytest.raises(PenaltyError):
        step(model, optimizer, batch)
    optimizer.step()


def other_factor_later(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    penalty = attach_penalty(model, some_set(), optimizer=optimizer)
    step(model, optimizer, batch)
    penalty.set_factor(0.1 * (1 + dist.get_rank()))
    step(model, optimizer, batch)
    penalty.in_force()


def bad_factor_on_one_rank(engine: str, _: Batch) -> None:
    attach_penalty(wrap(make_net(), engine), some_set(), 0.1 + 2 * dist.get_rank())


def thawed(engine: str, batch: Batch) -> None:
    model = wrap(make_net(), engine)
    optimizer = make_optimizer("sgd", model.parameters())
    attach_penalty(model, some_set(), optimizer=optimizer)
    loss_fn(model, batch).backward()
    (model.module if engine == "ddp" else model).frozen.weight.requires_grad_(True)
    optimizer.step()


def half_outside(_: str, __: Batch) -> None:
    net = make_net()
    fully_shard(net.blocks[0])
    attach_penalty(net, some_set())


FAILURES = (
    lost_hook,
    doubled_hook,
    attached_before_sharding,
    optimizer_before_sharding,
    other_factor_on_one_rank,
    other_factor_later,
    other_factor_and_on_it_goes,
    second_step_on_the_same_gradients,
    bad_factor_on_one_rank,
    thawed,
    half_outside,
)


def failures(engine: str) -> dict[str, str]:
    """Every way to lose the penalty raises, on every rank: the message by case."""
    messages: dict[str, str] = {}
    batch = my_part(make_batches(1, 8, torch.float32)[0])
    for case in FAILURES:
        try:
            case(engine, batch)
        except DcftError as error:
            messages[case.__name__] = str(error)
    return messages


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
        twice = "no backward was seen to reach them" if engine == "fsdp2" else "fired 2 times for 1 backwards"
        expected = twice if rank == 1 else "the penalty is not in force on another rank"
        assert expected in found["doubled_hook"]
        if engine == "fsdp2":
            assert "have a gradient, but no penalty hook fired" in found["lost_hook"]


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


def test_what_lies_on_a_gpu_is_read_when_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight without a gradient costs no wait in a step; a hook that was lost is still an error, at the next log."""
    monkeypatch.setattr(penalty_watch, "_is_far", lambda flag: True)
    net = make_net()
    optimizer = make_optimizer("sgd", net.parameters())
    penalty = attach_penalty(net, some_set(), optimizer=optimizer, level="gradient")
    batch = make_batches(1, 8, torch.float32)[0]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # as engines with flat buffers give them
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        loss_fn(net, batch).backward()
        optimizer.step()
    assert penalty._seen._unread.keys() == {"unused.weight"}
    penalty.in_force()
    assert not penalty._seen._unread
    hooks: Any = penalty._hooks
    for handle in hooks.handles:
        handle.remove()
    optimizer.zero_grad(set_to_none=False)
    loss_fn(net, batch).backward()
    optimizer.step()
    with pytest.raises(PenaltyError, match="have a gradient, but no penalty hook fired"):
        penalty.in_force()
