"""What fails in silence elsewhere raises here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcft_dist import DcftError, FundamentalSet, attach_penalty
from dcft_dist.engines.base import Leaf, Segment
from dcft_dist.engines.find import find_engine

from ..nets import HEAD, PlainReduceScatter, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..prepared import ZERO, prepare
from ..ranks import run_ranks
from .cases import SIZE, get, one_step

Batch = tuple[torch.Tensor, torch.Tensor]


def up_weights() -> FundamentalSet:
    return FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)


# -- what fails in silence elsewhere: (engine, this rank's batch) -------------------------------------------------------


def attached_before_wrapping(engine: str, batch: Batch) -> None:
    def make() -> Any:
        net = make_net()
        attach_penalty(net, up_weights())
        return net

    one_step(prepare(make, engine, lambda p: make_optimizer("sgd", p), micro_batch=len(batch[0])), batch)


def attached_with_optimizer_before_wrapping(engine: str, batch: Batch) -> None:
    """At the update level, with the optimizer that the engine is then given."""
    optimizer: Any = None

    def make() -> Any:
        nonlocal optimizer
        net = make_net()
        optimizer = make_optimizer("adamw", net.parameters())
        attach_penalty(net, up_weights(), optimizer=optimizer)
        return net

    kept = [optimizer]  # under FSDP1 with original parameters and DeepSpeed it goes on to step the weights
    prepared = prepare(make, engine, lambda p: kept.append(optimizer) or optimizer, micro_batch=len(batch[0]))
    one_step(prepared, batch)


def hooks_on_the_sharded(engine: str, batch: Batch) -> None:
    """What others hook: there nothing ever fires."""
    prepared = get(engine, optimizer="sgd")
    kind = type(find_engine(prepared.model))
    leaves = kind.leaves
    kind.leaves = lambda self: [  # type: ignore[method-assign]
        Leaf(s.parameter, (Segment(s.name, 0, s.box),)) for s in self.shards() if s.parameter.requires_grad
    ]
    try:
        attach_penalty(prepared.model, up_weights())
    finally:
        kind.leaves = leaves  # type: ignore[method-assign]
    one_step(prepared, batch)


def wrapped_again(engine: str, batch: Batch) -> None:
    """DeepSpeed takes the module over with other partitions and another optimizer."""
    prepared = get(engine, optimizer="adamw")
    attach_penalty(prepared.model, up_weights())
    again = prepare(lambda: prepared.model.module, engine, lambda p: make_optimizer("adamw", p), micro_batch=len(batch[0]))
    one_step(again, batch)


def weights_assigned(engine: str, batch: Batch) -> None:
    """`load_state_dict(assign=True)` puts other tensors in the place of the sharded ones."""
    prepared = get(engine, optimizer="adamw")
    attach_penalty(prepared.model, up_weights(), optimizer=prepared.optimizer)
    names = {n for n, _ in prepared.model.named_parameters()}
    state = {n: t.detach().clone() for n, t in prepared.model.state_dict().items()}
    state = {n: nn.Parameter(t) if n in names else t for n, t in state.items()}
    prepared.model.load_state_dict(state, assign=True)
    prepared.model.frozen.requires_grad_(False)
    prepared.optimizer = make_optimizer("adamw", prepared.model.parameters())
    one_step(prepared, batch)


def hooks_lost(engine: str, batch: Batch) -> None:
    prepared = get(engine, optimizer="sgd")
    penalty = attach_penalty(prepared.model, up_weights())
    for handle in penalty._hooks.handles if penalty._hooks else ():
        handle.remove()
    for count in penalty._hooks.buckets if penalty._hooks else ():
        for handle in count.bucket._handles:  # type: ignore[attr-defined]
            handle.remove()
    one_step(prepared, batch)


def communication_replaced(engine: str, batch: Batch) -> None:
    """Between the forward and the reduction; before a forward, the penalty takes the new one in."""
    prepared = get(engine, optimizer="sgd")
    attach_penalty(prepared.model, up_weights())
    loss = loss_fn(prepared.model, batch)
    block = prepared.model.blocks[0]
    if dist.get_world_size() == 1:
        block.set_all_reduce_hook(lambda reduced: None)
    else:
        block.set_custom_reduce_scatter(PlainReduceScatter())
    prepared.backward(loss, True)
    prepared.step()


class Twice(PlainReduceScatter):
    """A communication that reduces twice."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)


def applied_twice(engine: str, batch: Batch) -> None:
    prepared = get(engine, optimizer="sgd")
    penalty = attach_penalty(prepared.model, up_weights())
    if penalty._hooks and penalty._hooks.buckets:
        bucket: Any = penalty._hooks.buckets[0].bucket
        loss = loss_fn(prepared.model, batch)
        bucket.group._reduce_scatter_comm = Twice(bucket.ours)
        if bucket.ours == bucket.group._all_reduce_hook:
            ours = bucket.ours
            bucket.group._all_reduce_hook = lambda reduced: (ours(reduced), ours(reduced))
        prepared.backward(loss, True)
        return prepared.step()
    leaf = next(x for x in find_engine(prepared.model).leaves() if any(s.name in up_weights().names for s in x.segments))
    hook = next(f for f in leaf.tensor._backward_hooks.values())
    leaf.tensor.register_hook(hook)
    assert penalty.level == "gradient"
    one_step(prepared, batch)


def optimizer_before_wrapping(engine: str, batch: Batch) -> None:
    optimizer: Any = None

    def make() -> Any:
        nonlocal optimizer
        net = make_net()
        optimizer = make_optimizer("sgd", copy.deepcopy(net).parameters())
        return net

    prepared = prepare(make, engine, lambda p: make_optimizer("sgd", p), micro_batch=len(batch[0]))
    attach_penalty(prepared.model, up_weights(), optimizer=optimizer)


def cases_of(engine: str) -> list[Callable[[str, Batch], None]]:
    cases = [attached_before_wrapping, attached_with_optimizer_before_wrapping, hooks_lost, applied_twice]
    cases += [optimizer_before_wrapping]
    if engine.startswith("fsdp2") or engine.endswith("orig"):
        cases.append(hooks_on_the_sharded)
    if engine == "fsdp2":
        cases += [weights_assigned, communication_replaced]
    if engine in ("zero1", "zero2"):  # at stage 3 DeepSpeed itself fails
        cases.append(wrapped_again)
    return cases


def silent_failures(engine: str) -> dict[str, str]:
    """The message of each case that raises."""
    messages: dict[str, str] = {}
    batch = my_part(make_batches(1, SIZE, torch.float32)[0])
    for case in cases_of(engine):
        try:
            case(engine, batch)
        except DcftError as error:
            messages[case.__name__] = str(error)
    return messages


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-hybrid", "fsdp1-full-flat", "fsdp1-full-orig", *ZERO[1:4]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_fails_in_silence_elsewhere_raises(engine: str, ranks: int) -> None:
    """At one rank too: there a reduction in a group of size 1 is skipped, and with it what hangs on it."""
    for found in run_ranks(ranks, silent_failures, engine):
        if engine == "fsdp2":
            assert "no backward was seen to reach them since the last reduction" in found["hooks_lost"]
            assert found["applied_twice"] == found["hooks_lost"]
            assert "were reduced without the penalty" in found["communication_replaced"]
        elif engine == "fsdp2-hybrid" and ranks == 1:
            assert "no backward was seen" in found["applied_twice"]
        else:
            assert "have a gradient, but no penalty hook fired" in found["hooks_lost"]
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
        silent = ("have a gradient, but no penalty hook fired", "fired 0 times for 1 backwards")
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
