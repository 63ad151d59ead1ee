"""What every engine must do besides the penalty: score, remove, leave training alone; and what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from dcft_dist import (
    DcftError,
    FundamentalSet,
    attach_penalty,
    score_importance,
    select_fundamental,
    warm_up_head,
)
from dcft_dist.controls.removal import removed
from dcft_dist.distributed import collectives
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare as wrap_for_training

from ..nets import HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import ENGINES, ZERO, prepare
from ..ranks import run_ranks
from .cases import NUM, SIZE, get, one_step, whole_scores


def score(engine: str) -> dict[str, Tensor]:
    """Two items in a score batch; DeepSpeed's own accumulation is another one, and its clipping would be felt."""
    batches = [my_part(b) for b in make_batches(NUM, SIZE, torch.float32)]
    model = get(engine, accumulation=3, clip_norm=1e-3).model
    with collectives.counted() as count:
        scores = score_importance(model, batches, loss_fn, head=HEAD, criterion="removal", accumulation=2)
    if not engine.startswith(("single", "ddp")):  # there the reduced gradients are not sharded
        assert count.num_bytes < 4 * sum(p.numel() for p in make_net().parameters()), "nothing of full size is gathered"
    return whole_scores(scores)


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_are_those_of_one_process(engine: str) -> None:
    net = make_net()
    one = score_importance(
        net, make_batches(NUM, SIZE, torch.float32), loss_fn, head=HEAD, criterion="removal", accumulation=2
    )
    expected = whole_scores(one)
    for found in run_ranks(1 if engine == "single" else 4, score, engine):
        assert list(found) == list(expected)  # canonical names in the order of the unwrapped model
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-8, msg=name)


def half_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0].bfloat16()).float(), batch[1])


def score_apart(engine: str) -> float:
    """Largest difference between the scores of two batches and the mean of the scores of each, relative."""
    size = SIZE // dist.get_world_size()
    model = prepare(make_net, engine, lambda p: make_optimizer("sgd", p), bf16=True, micro_batch=size).model
    batches = [my_part(b) for b in make_batches(2, SIZE, torch.float32)]
    both, one, two = (
        whole_scores(score_importance(model, b, half_loss, head=HEAD)) for b in (batches, batches[:1], batches[1:])
    )
    return max(float((both[n] - (one[n] + two[n]) / 2).abs().max() / both[n].max().clamp(min=1e-12)) for n in both)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "zero1-sum32", "zero2-sum32", "zero3-sum32"])
def test_score_batches_in_half_precision_do_not_leak_into_each_other(engine: str) -> None:
    assert max(run_ranks(2, score_apart, engine)) <= 1e-5


def train_after(engine: str, scoring: bool) -> dict[str, Tensor]:
    prepared = get(engine, accumulation=2)
    batches = [my_part(b) for b in make_batches(8, SIZE, torch.float32)]
    for i, batch in enumerate(batches):
        last = i % 2 == 1
        if i % 2 == 0:
            prepared.zero_grad(to_none=True)
            if scoring and i in (0, 4):  # before the first step, and between two
                score_importance(prepared.model, batches[:3], loss_fn, head=HEAD)
        prepared.backward(loss_fn(prepared.model, batch) / 2, last)
        if last:
            prepared.step()
    return prepared.state()


@pytest.mark.parametrize("engine", ENGINES)
def test_training_after_scoring_is_bit_equal(engine: str) -> None:
    ranks = 1 if engine == "single" else 2
    plain, scored = run_ranks(ranks, train_after, engine, False), run_ranks(ranks, train_after, engine, True)
    start = make_net().state_dict()
    for before, after in zip(plain, scored, strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert not torch.equal(after["blocks.0.up.weight"].view(-1), start["blocks.0.up.weight"].view(-1)), "the body moves"


def scale_after_scoring(engine: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dynamic loss scale, which CPUs have no use for: scoring is no step that it may count."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    prepared, batches = get(engine), [my_part(b) for b in make_batches(2, SIZE, torch.float32)]
    optimizer = prepared.model.optimizer
    scaler = DynamicLossScaler(64.0, 1, 1.0, 1, False)
    optimizer.loss_scaler = scaler
    before = dict(vars(scaler)), prepared.model.micro_steps, prepared.model.global_steps, prepared.model.skipped_steps
    score_importance(prepared.model, batches, loss_fn, head=HEAD)
    return before, (
        dict(vars(scaler)),
        prepared.model.micro_steps,
        prepared.model.global_steps,
        prepared.model.skipped_steps,
    )


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_scoring_leaves_loss_scale_and_counters(engine: str) -> None:
    for before, after in run_ranks(2, scale_after_scoring, engine):
        assert before == after


def linked_state(engine: str) -> float:
    from deepspeed.utils import safe_get_full_optimizer_state

    prepared, batches = get(engine), [my_part(b) for b in make_batches(2, SIZE, torch.float32)]
    score_importance(prepared.model, batches, loss_fn, head=HEAD)
    one_step(prepared, batches[0])
    weight = prepared.model.module.conv.weight
    return float(safe_get_full_optimizer_state(weight, "momentum_buffer").abs().max())


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_scoring_first_does_not_hide_the_optimizer_state(engine: str) -> None:
    """DeepSpeed links its state, which its checkpoints read, at the first step: a score batch is none."""
    assert all(momentum > 0 for momentum in run_ranks(2, linked_state, engine))


def without(engine: str, bf16: bool) -> list[float]:
    make = lambda p: make_optimizer("sgd", p)  # noqa: E731
    model = prepare(make_net, engine, make, bf16=bf16, micro_batch=SIZE // dist.get_world_size()).model
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)})
    batch = my_part(make_batches(1, SIZE, torch.float32)[0])

    def loss() -> float:
        with torch.no_grad():
            value = half_loss(model, batch) if bf16 else loss_fn(model, batch)
        find_engine(model).settle()
        return float(collectives.all_reduce(value.detach().clone(), what="loss")) / dist.get_world_size()

    losses = [loss()]
    with removed(model, chosen):
        losses.append(loss())
    return [*losses, loss()]


@pytest.mark.parametrize(("engine", "bf16"), [*((e, False) for e in ENGINES), *((e, True) for e in ("fsdp2", *ZERO[:4]))])
def test_removed_weights_are_gone_and_come_back(engine: str, bf16: bool) -> None:
    net, batch = make_net().eval(), make_batches(1, SIZE, torch.float32)[0]
    loss, limit = (half_loss, 5e-3) if bf16 else (loss_fn, 1e-6)
    if bf16:
        net.bfloat16()
    with torch.no_grad():
        whole = float(loss(net, batch))
        net.blocks[0].up.weight.zero_()
        expected = float(loss(net, batch))
    assert abs(expected - whole) > 2 * limit
    for before, during, after in run_ranks(1 if engine == "single" else 2, without, engine, bf16):
        assert before == pytest.approx(whole, abs=limit) and after == before
        assert during == pytest.approx(expected, abs=limit)


def warm_up_then_train(engine: str) -> dict[str, float]:
    """The head is warmed up before wrapping; afterwards the whole body must move, under every engine."""
    batches = [my_part(b) for b in make_batches(4, SIZE, torch.float32)]
    net = make_net()
    warm_up_head(net, batches, loss_fn, head=HEAD, validation=batches, max_epochs=2)
    prepared = prepare(lambda: net, engine, lambda p: make_optimizer("sgd", p), micro_batch=SIZE // dist.get_world_size())
    before = prepared.state()
    for batch in batches:
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, batch), True)
        prepared.step()
    after = prepared.state()
    return {n: float((after[n] - before[n]).abs().max()) for n in before}


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "fsdp1-full-flat"])
def test_the_body_moves_after_a_warm_up(engine: str) -> None:
    for moved in run_ranks(2, warm_up_then_train, engine):
        still = [n for n, distance in moved.items() if distance == 0]
        assert sorted(still) == ["frozen.bias", "frozen.weight", "unused.bias", "unused.weight"]


# -- the trainer's way of wrapping ---------------------------------------------------------------------------------------


def clipping_of_the_trainer() -> float:
    net = make_net()
    plan = WrapOptions("deepspeed", torch.device("cpu"), list(net.blocks))
    found = wrap_for_training(net, plan, lambda weights: make_optimizer("sgd", [p for _, p, _ in weights]))
    return float(found.model.gradient_clipping())


def test_the_clipping_that_deepspeed_would_do_is_off() -> None:
    assert run_ranks(1, clipping_of_the_trainer) == [0.0]


NOSYNC = ("fsdp1-full-flat-nosync", "fsdp1-full-orig-nosync")


def refusals() -> dict[str, str]:
    found: dict[str, str] = {}
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)
    batches = [my_part(b) for b in make_batches(2, SIZE, torch.float32)]

    def attempt(case: str, run: Any) -> None:
        try:
            run()
        except DcftError as error:
            found[case] = str(error)

    part = make_net()
    part.blocks[0] = FullyShardedDataParallel(part.blocks[0], device_id=torch.device("cpu"))
    attempt("part", lambda: attach_penalty(part, chosen))
    engine = get("zero3", accumulation=2)
    attempt("bare", lambda: attach_penalty(engine.model.module, chosen))
    engine.backward(loss_fn(engine.model, batches[0]), last=False)
    attempt("middle", lambda: score_importance(engine.model, batches, loss_fn, head=HEAD))
    for name in ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "fsdp2", *NOSYNC):
        waiting = get(name)  # the step of this backward is still to come
        with waiting.accumulating(last=False):
            waiting.backward(loss_fn(waiting.model, batches[0]), last=name.startswith("zero"))
        attempt(f"waiting {name}", lambda model=waiting.model: score_importance(model, batches, loss_fn, head=HEAD))
        if name.startswith("zero"):
            waiting.step()
            score_importance(waiting.model, batches, loss_fn, head=HEAD)
    unmanaged = prepare(
        make_net, "zero2", lambda p: make_optimizer("sgd", p), micro_batch=SIZE // dist.get_world_size(),
        zero_options={"managed_gradient_accumulation": False},
    ).model  # fmt: skip
    attempt("unmanaged", lambda: score_importance(unmanaged, batches, loss_fn, head=HEAD))
    clipping = prepare(
        make_net, "zero2", lambda p: make_optimizer("sgd", p), micro_batch=SIZE // dist.get_world_size(), clip_norm=1.0
    )
    penalty = attach_penalty(clipping.model, chosen, level="gradient", where="after")
    attempt("clipping", penalty.apply)
    return found


def test_refusals() -> None:
    for found in run_ranks(2, refusals):
        assert "wrap the root module in FullyShardedDataParallel too" in found["part"]
        assert "pass the DeepSpeedEngine" in found["bare"]
        waiting = [what for case, what in found.items() if case == "middle" or case.startswith("waiting")]
        assert len(waiting) == 9 and all("score at a step boundary" in what for what in waiting), list(found)
        assert "scoring needs managed_gradient_accumulation" in found["unmanaged"]
        assert "DeepSpeed clips inside its step" in found["clipping"]


def test_sets_agree_between_engines() -> None:
    """The set that one engine selects is the set that any other selects, from the same scores."""
    expected = None
    for engine in ("fsdp2", "fsdp1-full-flat", "zero2", "zero3"):
        found = run_ranks(2, select_random, engine)[0]
        expected = expected or found
        assert all(torch.equal(found[n], expected[n]) for n in expected)


def select_random(engine: str) -> dict[str, Tensor]:
    scores = score_importance(get(engine).model, None, None, head=HEAD, criterion="random")
    chosen = select_fundamental(scores, 0.2)
    return {n: chosen.mask(n) for n in chosen.names}


def test_layouts_know_the_rank() -> None:
    """Meshes of the same ranks are equal to torch, whichever of them a process is: here first one, then the other."""
    from torch.distributed.tensor import Shard
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  it registers the backend

    from dcft_dist.engines.fsdp2 import _layout

    starts = []
    for rank in (0, 1):
        dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        starts.append(_layout(dist.get_rank(), (10, 4), mesh, (Shard(0),))[0].start)
        dist.destroy_process_group()
    assert starts == [(0, 0), (5, 0)]
