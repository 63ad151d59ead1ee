"""The penalty in FSDP2's buffers: beside a user's own communication, with unused weights, in units that share a group."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.compat.pytorch import fsdp2_reduction
from dcft_dist.engines.find import find_engine

from ..method.penalty_cases import some_set, step
from ..nets import OddNet, PlainReduceScatter, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from ..prepared import prepare
from ..ranks import run_ranks

FACTOR = 0.1
SETTING = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="this torch has no zeros for unused weights"
)


def trained(model: Any, change: Any = None, steps: int = 3) -> dict[str, Tensor]:
    """Weights after some steps; `change(model)` is called after the penalty was attached."""
    optimizer = make_optimizer("sgd", model.parameters())
    with attach_penalty(model, some_set(), FACTOR, optimizer=optimizer, level="gradient") as penalty:
        if change is not None:
            change(model)
        for batch in make_batches(steps, 8, torch.float32):
            step(model, optimizer, my_part(batch))
        penalty.in_force()
    return full_state(model)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def own_communications() -> list[str]:
    """What differs if the user has an own communication, set before or after the penalty was attached."""
    expected, wrong = trained(wrap(make_net(), "fsdp2")), []
    for before in (True, False):
        model: Any = wrap(make_net(), "fsdp2")
        mine, seen = PlainReduceScatter(), list[Tensor]()

        def change(model: Any, mine: Any = mine, seen: Any = seen) -> None:
            if dist.get_world_size() > 1:
                model.blocks[0].set_custom_reduce_scatter(mine)
            else:
                model.blocks[0].set_all_reduce_hook(lambda reduced: seen.append(reduced.clone()))

        if before:
            change(model)
        if not equal(expected, trained(model, None if before else change)):
            wrong.append(f"weights, before={before}")
        if mine.calls + len(seen) != 3:
            wrong.append(f"calls, before={before}: {mine.calls + len(seen)}")
        group = model.blocks[0]._get_fsdp_state()._fsdp_param_group
        if dist.get_world_size() > 1 and fsdp2_reduction(group, dist.get_world_size()) is not mine:
            wrong.append(f"not put back, before={before}")
    return wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_a_communication_of_the_user(ranks: int) -> None:
    assert run_ranks(ranks, own_communications) == [[]] * ranks


class Delegating(PlainReduceScatter):
    """A communication that was put around the one before, as a profiler may do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.calls += 1
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)


def around_the_penalty() -> tuple[bool, int]:
    outer: list[Delegating] = []

    def change(model: Any) -> None:
        group = model.blocks[0]._get_fsdp_state()._fsdp_param_group
        outer.append(Delegating(group._reduce_scatter_comm))
        model.blocks[0].set_custom_reduce_scatter(outer[0])

    return equal(trained(wrap(make_net(), "fsdp2")), trained(wrap(make_net(), "fsdp2"), change)), outer[0].calls


def test_a_communication_around_the_penalty() -> None:
    assert run_ranks(2, around_the_penalty) == [(True, 3)] * 2


class Skipping(OddNet):
    """Leaves a whole block out at every second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        block = self.blocks[1]
        if self.calls % 2 == 0:
            self.blocks = self.blocks[:1]
        try:
            return super().forward(x)
        finally:
            self.blocks = torch.nn.ModuleList([self.blocks[0], block])


def a_group_without_gradients() -> float:
    """With zeros for unused weights, FSDP2 reduces a buffer also for a group that no backward reaches."""
    states = []
    for engine in ("single", "fsdp2"):
        torch.manual_seed(0)
        net = Skipping()
        model: Any = net
        if engine == "fsdp2":
            for block in net.blocks:
                fully_shard(block)
            model = fully_shard(net)
            model.set_reduce_scatter_unused_params(True)
        optimizer = make_optimizer("sgd", model.parameters())
        with attach_penalty(model, some_set(), FACTOR, optimizer=optimizer, level="gradient"):
            for batch in make_batches(4, 8, torch.float32):
                step(model, optimizer, batch)  # the same on every rank
        states.append(full_state(model))
    return max(float((states[0][n] - states[1][n]).abs().max()) for n in states[0])


@SETTING
def test_a_group_without_gradients() -> None:
    assert max(run_ranks(2, a_group_without_gradients)) < 1e-6


def zeros_for_unused() -> bool:
    """With `reduce_scatter_unused_params` the buffer has zeros for weights that no backward reached."""
    model: Any = wrap(make_net(), "fsdp2")
    model.set_reduce_scatter_unused_params(True)
    return equal(trained(wrap(make_net(), "fsdp2")), trained(model))


@SETTING
def test_zeros_for_unused_weights() -> None:
    assert run_ranks(2, zeros_for_unused) == [True, True]


def _columns(ranks: int, p: Tensor) -> Shard:
    return Shard(1) if p.ndim == 2 and p.shape[1] % ranks == 0 else Shard(0)


def _note(seen: list[tuple[Any, Tensor, Any]], bucket: Any, buffer: Tensor, present: Any) -> None:
    seen.append((bucket, buffer.clone(), present))


def orders() -> list[str]:
    """Buckets that do not give back what they have laid out, or that lay it out otherwise than FSDP2 does."""
    wrong = []
    for name in ("plain", "columns", "group"):
        ranks, net = dist.get_world_size(), make_net()
        mesh = init_device_mesh("cpu", (ranks,))
        by_columns = {"shard_placement_fn": partial(_columns, ranks)}
        options: dict[str, Any] = {"mesh": mesh} | (by_columns if name == "columns" else {})
        if name == "group":
            fully_shard([net.blocks[0], net.blocks[1]], **options)
        model: Any = fully_shard(net, **options)
        engine = find_engine(model)
        buckets: Any = engine.buckets(engine.leaves())
        if len(buckets) != (2 if name == "group" else 1):
            wrong.append(f"{name}: {len(buckets)} buckets")
        seen: list[tuple[Any, Tensor, Any]] = []
        for bucket in buckets:
            bucket.intercept(partial(_note, seen, bucket))
        loss_fn(model, make_batches(1, 8, torch.float32)[0]).backward()  # the same batch, so the same gradient everywhere
        signs = {n: p.grad.full_tensor() > 0 for n, p in model.named_parameters() if p.grad is not None}
        for bucket, buffer, present in seen:
            if not torch.equal(buffer > 0, bucket.lay_out(signs, present)):
                wrong.append(f"{name}: another order")
            masks = {s.name: torch.rand(s.box.size) < 0.5 for s in bucket.segments}
            back = bucket.split(bucket.lay_out(masks, masks.keys()))
            wrong += [f"{name}: {n}" for n in masks if not torch.equal(back[n], masks[n])]
        if len(seen) != len(buckets):
            wrong.append(f"{name}: {len(seen)} of {len(buckets)} seen")
    return wrong


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bits_lie_as_fsdp2_lays_gradients(ranks: int) -> None:
    assert run_ranks(ranks, orders) == [[]] * ranks


def with_and_without_sync() -> float:
    """Largest difference if gradients are reduced with every micro-batch, or with the last one only."""
    states = []
    for sync in (True, False):
        prepared = prepare(make_net, "fsdp2", lambda p: make_optimizer("momentum", p))
        attach_penalty(prepared.model, some_set(), FACTOR, optimizer=prepared.optimizer, level="gradient")
        batches = make_batches(6, 8, torch.float32)
        for first in range(0, 6, 3):
            prepared.zero_grad(to_none=True)
            for i in range(3):
                prepared.model.set_requires_gradient_sync(sync or i == 2)
                (loss_fn(prepared.model, my_part(batches[first + i])) / 3).backward()
            prepared.step()
        states.append(prepared.state())
    return max(float((states[0][n] - states[1][n]).abs().max()) for n in states[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_with_and_without_synchronisation(ranks: int) -> None:
    assert max(run_ranks(ranks, with_and_without_sync)) < 1e-6


class Experts(torch.nn.Module):
    """Each forward uses other experts, as many combinations as there are steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return sum((expert(x) for i, expert in enumerate(self.experts) if self.number >> i & 1), start=x)


def many_combinations() -> tuple[float, int, int]:
    """Largest difference to one process; layouts kept; bytes of bits."""
    states, kept, size = [], 0, 0
    for engine in ("single", "fsdp2"):
        model: Any = Experts() if engine == "single" else fully_shard(Experts())
        masks = {f"experts.{i}.weight": torch.eye(4, dtype=torch.bool) for i in range(6)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        penalty = attach_penalty(model, FundamentalSet.from_masks(masks), FACTOR, optimizer=optimizer, level="gradient")
        for number in range(40):
            optimizer.zero_grad()
            model(torch.ones(2, 4) * (number + 1) / 40).square().sum().backward()
            optimizer.step()
        states.append(full_state(model))
        hooks: Any = penalty._hooks
        kept, size = sum(map(len, hooks._layouts)), penalty.mask_bytes
        penalty.remove()
    return max(float((states[0][n] - states[1][n]).abs().max()) for n in states[0]), kept, size


def test_layouts_of_many_combinations_do_not_pile_up() -> None:
    for difference, kept, size in run_ranks(2, many_combinations):
        assert difference < 1e-6 and kept == 17 and size <= 17 * 6 * 20 / 8
