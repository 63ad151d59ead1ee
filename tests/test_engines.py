"""What every engine must do besides the penalty: score, remove, leave training alone; and what it must refuse."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dcft_dist import (
    DcftError,
    FundamentalSet,
    attach_penalty,
    load_weights,
    save_weights,
    score_importance,
    select_fundamental,
    warm_up_head,
)
from dcft_dist.compat.pytorch import fsdp2_groups
from dcft_dist.compat.versions import TESTED, USES, check_version
from dcft_dist.controls.removal import removed
from dcft_dist.distributed import collectives
from dcft_dist.engines.base import Leaf, Segment
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare as wrap_for_training
from dcft_dist.errors import PenaltyError
from dcft_dist.method.scores import Scores
from dcft_dist.weights.checkpoint import load_checkpoint, model_state, save_checkpoint

from .nets import HEAD, full, loss_fn, make_batches, make_net, make_optimizer, my_part
from .prepared import ENGINES, ZERO, Prepared, prepare
from .ranks import run_ranks

NUM, SIZE = 4, 8


def whole_scores(scores: Scores) -> dict[str, Tensor]:
    """Scores of whole weights, put together from all ranks; every cell must be owned exactly once."""
    out = {}
    for name, shape in scores.shapes.items():
        shard, values = scores.shards[name], torch.zeros(shape).view(-1)
        owners = torch.zeros_like(values)
        index = shard.box.flat_index(0, shard.box.numel)
        values[index], owners[index] = shard.values.float(), 1.0
        owners = collectives.all_reduce(owners, what="owners")
        assert bool((owners == 1).all()), name
        out[name] = collectives.all_reduce(values, what="scores").view(shape)
    return out


def get(engine: str, optimizer: str = "momentum", accumulation: int = 1, clip_norm: float | None = None) -> Prepared:
    return prepare(
        make_net,
        engine,
        lambda p: make_optimizer(optimizer, p),
        accumulation=accumulation,
        micro_batch=SIZE // dist.get_world_size(),
        clip_norm=clip_norm,
    )


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


# -- tensor parallelism, compiled blocks --------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(15)
        self.up = nn.Linear(15, 12)
        self.down = nn.Linear(12, 15)
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def mlp_masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        n: torch.rand(p.shape, generator=g) < 0.4 for n, p in Mlp().named_parameters() if n in ("up.weight", "down.weight")
    }


def make_mlp(kind: str) -> nn.Module:
    """Under tensor parallelism x FSDP2 on 2 x 2 ranks, compiled block by block, or plain."""
    torch.manual_seed(0)
    net: Any = Mlp().double()
    if kind == "tensor_parallel":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        # The rest is replicated over the tensor-parallel ranks.
        parallelize_module(net, mesh["tp"], {"norm": Whole(), "head": Whole()})
        fully_shard(net.up, mesh=mesh["dp"])
        fully_shard(net, mesh=mesh["dp"])
    elif kind == "compiled":
        net.up = torch.compile(net.up, backend="aot_eager")
        fully_shard(net.up)
        fully_shard(net)
    return net  # type: ignore[no-any-return]


def train_mlp(kind: str, level: str, where: str, optimizer_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (scores, whole weights)."""
    net, batches = make_mlp(kind), make_batches(4, SIZE, torch.float64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if kind == "tensor_parallel":
        ranks, rank = 2, rank // 2
    mine = [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in batches] if kind != "one" else batches
    scores = whole_scores(score_importance(net, mine, loss_fn, head=HEAD, criterion="removal"))
    optimizer = make_optimizer(optimizer_name, net.parameters())
    attach_penalty(
        net, FundamentalSet.from_masks(mlp_masks(), head=HEAD), 0.1, optimizer=optimizer, level=level, where=where,
        rest_factor=0.7, unscored_factor=0.4,
    )  # type: ignore[arg-type]  # fmt: skip
    for batch in mine:
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
    return scores, {n.replace("_orig_mod.", ""): full(p.detach()).clone() for n, p in net.named_parameters()}


class Whole(torch.distributed.tensor.parallel.style.ParallelStyle):
    """Replicates a module's weights over the tensor-parallel ranks, and takes plain tensors in and out."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        from torch.distributed.tensor import DTensor, Replicate, distribute_module

        def come(_: nn.Module, inputs: Any, m: Any) -> Any:
            return tuple(DTensor.from_local(x, m, [Replicate()], run_check=False) for x in inputs)

        return distribute_module(module, mesh, None, come, lambda _, out, m: out.to_local())


@pytest.mark.parametrize(("kind", "ranks"), [("tensor_parallel", 4), ("compiled", 2)])
@pytest.mark.parametrize(("level", "where"), [("gradient", "before"), ("gradient", "after"), ("update", "before")])
def test_tensor_parallel_and_compiled_blocks(kind: str, ranks: int, level: str, where: str) -> None:
    scores, state = run_ranks(1, train_mlp, "one", level, where, "adamw")[0]
    for found, weights in run_ranks(ranks, train_mlp, kind, level, where, "adamw"):
        for name, values in scores.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9)
        assert max(float((weights[n] - state[n]).abs().max()) for n in state) <= 1e-10


def sharded_bits_of_split_weights() -> str:
    with pytest.raises(PenaltyError) as error:
        chosen = FundamentalSet.from_masks(mlp_masks(), head=HEAD)
        attach_penalty(make_mlp("tensor_parallel"), chosen, level="gradient", mask_placement="sharded")
    return str(error.value)


def test_sharded_bits_are_refused_under_tensor_parallelism() -> None:
    assert all("not there for tensor parallelism" in found for found in run_ranks(4, sharded_bits_of_split_weights))


def save_mlp(folder: str) -> None:
    net = make_mlp("tensor_parallel")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    save_weights(net, f"{folder}/weights")
    save_checkpoint(Path(folder) / "checkpoint", model_state(net), {})


def load_mlp(folder: str, kind: str) -> list[dict[str, Tensor]]:
    found = []
    for load in (load_weights, lambda net, f: load_checkpoint(Path(f).parent / "checkpoint", net)):
        net = make_mlp(kind)
        load(net, f"{folder}/weights")
        found.append({n: full(p.detach()).clone() for n, p in net.named_parameters()})
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 1), ("tensor_parallel", 4)])
def test_weights_and_checkpoints_under_tensor_parallelism(kind: str, ranks: int, tmp_path: Path) -> None:
    run_ranks(4, save_mlp, str(tmp_path))
    expected = {n: 2.0 * p.detach() for n, p in make_mlp("plain").named_parameters()}
    for results in run_ranks(ranks, load_mlp, str(tmp_path), kind):
        for found in results:
            assert all(torch.equal(found[n], w) for n, w in expected.items())


# -- the trainer's way of wrapping ---------------------------------------------------------------------------------------


def clipping_of_the_trainer() -> float:
    net = make_net()
    plan = WrapOptions("deepspeed", torch.device("cpu"), list(net.blocks))
    found = wrap_for_training(net, plan, lambda weights: make_optimizer("sgd", [p for _, p, _ in weights]))
    return float(found.model.gradient_clipping())


def test_the_clipping_that_deepspeed_would_do_is_off() -> None:
    assert run_ranks(1, clipping_of_the_trainer) == [0.0]


# -- what fails in silence elsewhere is an error here --------------------------------------------------------------------


def one_step(prepared: Prepared, batch: Any) -> None:
    prepared.zero_grad(to_none=True)
    prepared.backward(loss_fn(prepared.model, batch), True)
    prepared.step()


def silent_failures(engine: str) -> dict[str, str]:
    found: dict[str, str] = {}
    batch = my_part(make_batches(1, SIZE, torch.float32)[0])
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)

    def attached_before_wrapping() -> None:
        def make() -> Any:
            net = make_net()
            attach_penalty(net, chosen)
            return net

        one_step(prepare(make, engine, lambda p: make_optimizer("sgd", p), micro_batch=len(batch[0])), batch)

    def attached_with_optimizer_before_wrapping() -> None:
        """At the update level, with the optimizer that the engine is then given."""
        optimizer: Any = None

        def make() -> Any:
            nonlocal optimizer
            net = make_net()
            optimizer = make_optimizer("adamw", net.parameters())
            attach_penalty(net, chosen, optimizer=optimizer)
            return net

        kept = [optimizer]  # under FSDP1 with original parameters and DeepSpeed it goes on to step the weights
        prepared = prepare(make, engine, lambda p: kept.append(optimizer) or optimizer, micro_batch=len(batch[0]))
        one_step(prepared, batch)

    def hooks_on_the_sharded() -> None:
        """What others hook: there nothing ever fires."""
        prepared = get(engine, optimizer="sgd")
        kind = type(find_engine(prepared.model))
        leaves = kind.leaves
        kind.leaves = lambda self: [  # type: ignore[method-assign]
            Leaf(s.parameter, (Segment(s.name, 0, s.box),)) for s in self.shards() if s.parameter.requires_grad
        ]
        try:
            attach_penalty(prepared.model, chosen)
        finally:
            kind.leaves = leaves  # type: ignore[method-assign]
        one_step(prepared, batch)

    def wrapped_again() -> None:
        """DeepSpeed takes the module over with other partitions and another optimizer."""
        prepared = get(engine, optimizer="adamw")
        attach_penalty(prepared.model, chosen)
        again = prepare(
            lambda: prepared.model.module, engine, lambda p: make_optimizer("adamw", p), micro_batch=len(batch[0])
        )
        one_step(again, batch)

    def weights_assigned() -> None:
        """`load_state_dict(assign=True)` puts other tensors in the place of the sharded ones."""
        prepared = get(engine, optimizer="adamw")
        attach_penalty(prepared.model, chosen, optimizer=prepared.optimizer)
        names = {n for n, _ in prepared.model.named_parameters()}
        state = {n: t.detach().clone() for n, t in prepared.model.state_dict().items()}
        state = {n: nn.Parameter(t) if n in names else t for n, t in state.items()}
        prepared.model.load_state_dict(state, assign=True)
        prepared.model.frozen.requires_grad_(False)
        prepared.optimizer = make_optimizer("adamw", prepared.model.parameters())
        one_step(prepared, batch)

    def hooks_lost() -> None:
        prepared = get(engine, optimizer="sgd")
        penalty = attach_penalty(prepared.model, chosen)
        for handle in penalty._handles[: 2 * len(penalty._seen.leaves)]:
            handle.remove()
        one_step(prepared, batch)

    def applied_twice() -> None:
        prepared = get(engine, optimizer="sgd")
        penalty = attach_penalty(prepared.model, chosen)
        leaf = next(x for x in find_engine(prepared.model).leaves() if any(s.name in chosen.names for s in x.segments))
        hook = next(f for f in leaf.tensor._backward_hooks.values())
        leaf.tensor.register_hook(hook)
        assert penalty.level == "gradient"
        one_step(prepared, batch)

    def optimizer_before_wrapping() -> None:
        optimizer: Any = None

        def make() -> Any:
            nonlocal optimizer
            net = make_net()
            optimizer = make_optimizer("sgd", copy.deepcopy(net).parameters())
            return net

        prepared = prepare(make, engine, lambda p: make_optimizer("sgd", p), micro_batch=len(batch[0]))
        attach_penalty(prepared.model, chosen, optimizer=optimizer)

    cases = [attached_before_wrapping, attached_with_optimizer_before_wrapping, hooks_lost, applied_twice]
    cases += [optimizer_before_wrapping]
    if engine.startswith("fsdp2") or engine.endswith("orig"):
        cases.append(hooks_on_the_sharded)
    if engine == "fsdp2":
        cases.append(weights_assigned)
    if engine in ("zero1", "zero2"):  # at stage 3 DeepSpeed itself fails
        cases.append(wrapped_again)
    for case in cases:
        try:
            case()
        except DcftError as error:
            found[case.__name__] = str(error)
    return found


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-hybrid", "fsdp1-full-flat", "fsdp1-full-orig", *ZERO[1:4]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_fails_in_silence_elsewhere_raises(engine: str, ranks: int) -> None:
    """At one rank too: there a reduction in a group of size 1 is skipped, and with it what hangs on it."""
    for found in run_ranks(ranks, silent_failures, engine):
        assert "hold a gradient, but no hook fired" in found["hooks_lost"]
        assert "fired 2 times for 1 backwards" in found["applied_twice"]
        if engine.endswith("orig") and ranks == 1:  # the same objects, whole
            assert "a model that was wrapped again" in found["attached_before_wrapping"]
        elif engine.startswith("fsdp"):  # DDP and DeepSpeed keep the parameters, and with them the hooks
            assert "attach it after sharding" in found["attached_before_wrapping"]
        else:
            assert "attached_before_wrapping" not in found
        if engine.endswith("orig") and ranks > 1:  # the same objects, with a part of their values each
            assert "attach it after sharding" in found["attached_with_optimizer_before_wrapping"]
        elif engine.startswith("zero"):
            assert "attach the penalty after deepspeed.initialize" in found["attached_with_optimizer_before_wrapping"]
        silent = ("hold a gradient, but no hook fired", "fired 0 times for 1 backwards")
        hooked = any(text in found.get("hooks_on_the_sharded", "") for text in silent)
        assert hooked == (engine.startswith("fsdp2") or engine.endswith("orig"))
        assert ("attach it after sharding" in found.get("wrapped_again", "")) == (engine in ("zero1", "zero2"))
        assert ("attach it after sharding" in found.get("weights_assigned", "")) == (engine == "fsdp2")
        wrong = (
            "DeepSpeed steps with the optimizer given" if engine.startswith("zero") else "steps none of the model's weights"
        )
        assert wrong in found["optimizer_before_wrapping"]


def hooks_on_originals() -> list[int]:
    """What others do: hooks on FSDP1's original parameters and on FSDP2's sharded ones never fire; ours do."""
    counts = []
    for engine in ("fsdp1-full-orig", "fsdp2"):
        prepared, fired = get(engine, optimizer="sgd"), [0]
        for p in prepared.model.parameters():
            if p.requires_grad:
                p.register_hook(lambda g, fired=fired: fired.__setitem__(0, fired[0] + 1))
        chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)
        penalty = attach_penalty(prepared.model, chosen)
        one_step(prepared, my_part(make_batches(1, SIZE, torch.float32)[0]))
        counts += [fired[0], penalty.calls["blocks.0.up.weight"]]
    return counts


def test_hooks_on_sharded_parameters_never_fire_but_these_do() -> None:
    assert run_ranks(2, hooks_on_originals) == [[0, 1, 0, 1]] * 2


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


# -- private attributes -------------------------------------------------------------------------------------------------


def private_objects() -> dict[str, list[str]]:
    """Attributes of `private.USES` that are missing, on live objects."""
    import importlib

    fsdp2, fsdp1 = get("fsdp2").model, get("fsdp1-hybrid-flat").model
    zero2, zero3 = get("zero2"), get("zero3")
    loss_fn(fsdp2, my_part(make_batches(1, SIZE, torch.float32)[0]))
    one_step(zero3, my_part(make_batches(1, SIZE, torch.float32)[0]))
    loss_fn(fsdp1, my_part(make_batches(1, SIZE, torch.float32)[0]))
    state = fsdp2._get_fsdp_state()
    parameters = [dict(z.model.module.named_parameters())["conv.weight"] for z in (zero2, zero3)]
    checkpointed = get("fsdp2-checkpoint").model.blocks[0]
    half = prepare(make_net, "zero0", lambda p: make_optimizer("sgd", p), bf16=True, micro_batch=SIZE // 2)
    bf16 = prepare(make_net, "zero1-sum32", lambda p: make_optimizer("sgd", p), bf16=True, micro_batch=SIZE // 2)
    objects = {
        "Module": make_net(),
        "FSDPModule": fsdp2,
        "FSDPState": state,
        "FSDPParamGroup": fsdp2_groups(fsdp2)[0],
        "FSDPParam": fsdp2_groups(fsdp2)[0].fsdp_params[0],
        "FullyShardedDataParallel": fsdp1,
        "FlatParamHandle": fsdp1._handle,
        "FlatParameter": fsdp1._handle.flat_param,
        "DeepSpeedEngine": zero2.model,
        "DeepSpeedZeroOptimizer": zero2.model.optimizer,
        "DeepSpeedZeroOptimizer.parameter": parameters[0],
        "DeepSpeedZeroOptimizer.parameter._hp_mapping": next(
            p._hp_mapping for p in zero2.model.module.parameters() if getattr(p, "_hp_mapping", None)
        ),
        "CheckpointWrapper": checkpointed,
        "OptimizedModule": torch.compile(nn.Linear(1, 1)),
        "DeepSpeedZeroOptimizer_Stage3": zero3.model.optimizer,
        "DeepSpeedZeroOptimizer_Stage3.parameter": parameters[1],
        "FP16_UnfusedOptimizer": half.model.optimizer,
        "BF16_Optimizer": bf16.model.optimizer,
    }
    for where in USES:
        if where == "transformers.Trainer":
            objects[where] = importlib.import_module("transformers").Trainer
        elif where.startswith(("torch.", "deepspeed.", "transformers.")):
            objects[where] = importlib.import_module(where)
    named = {where: type(thing).__name__ for where, thing in objects.items() if where.endswith("Optimizer")}
    assert all(where == name for where, name in named.items()), named
    return {w: [a for a in names if not hasattr(objects[w], a)] for w, names in USES.items()}


def test_no_private_attribute_is_gone() -> None:
    for missing in run_ranks(2, private_objects):
        assert {where: names for where, names in missing.items() if names} == {}


def test_an_untested_version_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    check_version.cache_clear()
    check_version("torch")
    assert caplog.text == ""
    check_version.cache_clear()
    monkeypatch.setitem(TESTED, "torch", ("2.9", "2.10"))
    check_version("torch")
    assert "is none of the versions" in caplog.text and "(2.9, 2.10)" in caplog.text
    check_version.cache_clear()


# -- DeepSpeed on a machine without GPU -----------------------------------------------------------------------------------

ONE_RANK = """
import os, torch
from dcft_dist.compat.deepspeed import import_deepspeed
deepspeed = import_deepspeed()
deepspeed.init_distributed("gloo")
net = torch.nn.Linear(4, 2)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
model, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1), config=config)
model.backward(model(torch.ones(1, 4)).sum())
model.step()
print("stepped", os.listdir(os.environ["TORCH_EXTENSIONS_DIR"]))
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_deepspeed_neither_compiles_nor_waits_for_a_stale_build_lock(tmp_path: Path) -> None:
    """A compilation that was killed leaves a lock that later ones wait for without end: nothing may ask for it."""
    stale = tmp_path / "extensions/deepspeed_shm_comm"
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK], capture_output=True, text=True, timeout=60,
        env={k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        | {"TORCH_EXTENSIONS_DIR": str(stale.parent), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert "stepped ['deepspeed_shm_comm']" in done.stdout, done.stderr
    assert [f.name for f in stale.iterdir()] == ["lock"]


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
