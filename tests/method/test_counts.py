"""What the penalty costs the host in a step: Python calls, launches, lookups. On the structure of a ViT-L, after nine steps.

On a GPU a step is late because the host is, so these counts are what a step may cost there.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dcft_dist import FundamentalSet, attach_penalty, score_importance
from dcft_dist.compat.deepspeed import import_deepspeed
from dcft_dist.compat.pytorch import fake_ranks
from dcft_dist.engines.find import find_engine
from dcft_dist.method import kernels, shard_table
from dcft_dist.method.multipliers import Multipliers

from ..counts import Counts, VitLike, operations, python_calls
from ..ranks import run_ranks

GROUPS = 25  # 24 blocks and the root
WAYS = {"before": ("gradient", "before"), "after": ("gradient", "after"), "update": ("update", "before")}


class Steps:
    """A model under an engine, and steps of it."""

    def __init__(self, engine: str, way: str, steps: int = 9) -> None:
        torch.manual_seed(0)
        net, generator = VitLike(), torch.Generator().manual_seed(0)
        linear = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "head"]
        masks = {f"{n}.weight": torch.rand(net.get_submodule(n).weight.shape, generator=generator) < 0.1 for n in linear}
        self.batch = torch.randn(4, 12, generator=generator), torch.randint(0, 3, (4,), generator=generator)
        self.zero = engine.startswith("zero")
        self.model: Any = self._wrapped(net, engine)
        if not self.zero:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self.penalty: Any = None
        if way != "plain":
            level, where = WAYS[way]
            chosen = FundamentalSet.from_masks(masks, head="head")
            log, level_before = logging.getLogger("dcft_dist"), logging.getLogger("dcft_dist").level
            log.setLevel(logging.ERROR)  # a gradient penalty under AdamW is warned of
            self.penalty = attach_penalty(self.model, chosen, optimizer=self.optimizer, level=level, where=where)  # type: ignore[arg-type]
            log.setLevel(level_before)
        for _ in range(steps):
            self()

    def _wrapped(self, net: nn.Module, engine: str) -> Any:
        if engine == "fsdp2":
            for block in net.blocks:  # type: ignore[union-attr]
                fully_shard(block)
            return fully_shard(net)
        if engine == "fsdp1":
            for i, block in enumerate(net.blocks):  # type: ignore[arg-type]
                net.blocks[i] = FullyShardedDataParallel(block, device_id=torch.device("cpu"), use_orig_params=True)  # type: ignore[index]
            return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        if self.zero:
            self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
            zero = {"stage": int(engine[-1]), "reduce_bucket_size": 10_000_000}
            config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
            return import_deepspeed().initialize(
                model=net, optimizer=self.optimizer, config=config | {"zero_force_ds_cpu_optimizer": False}
            )[0]
        return DistributedDataParallel(net, find_unused_parameters=True) if engine == "ddp" else net

    def __call__(self) -> None:
        x, y = self.batch
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        if self.zero:
            self.model.backward(loss)
            self.model.step()
        else:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def noted(method: Any, calls: list[str]) -> Any:
    """The method, which also notes that it was called."""

    def call(self: Any) -> Any:
        calls.append(method.__name__)
        return method(self)

    return call


def added(engine: str) -> dict[str, tuple[int, int, int, int]]:
    """What each way adds to a step: Python calls, waits, collectives of the package, calls of `shards` and `stepped`."""
    found, plain = {}, Counts()
    for way in ("plain", *WAYS):
        steps = Steps(engine, way)
        kind, lookups, patch = type(find_engine(steps.model)), list[str](), pytest.MonkeyPatch()
        for name in ("shards", "stepped"):
            patch.setattr(kind, name, noted(getattr(kind, name), lookups))
        with python_calls() as counts:
            steps()
        with operations() as ops:
            steps()
        if way == "plain":
            plain, waits = counts, ops.waits
        else:
            steps.penalty.remove()
            found[way] = (counts.calls - plain.calls, ops.waits - waits, counts.sent, len(lookups))
        patch.undo()
    return found


LIMITS = {"before": 250, "after": 60, "update": 60}


@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2(ranks: int) -> None:
    for found in run_ranks(ranks, added, "fsdp2"):
        for way, (calls, *others) in found.items():
            assert calls <= LIMITS[way], (way, calls)
            assert others == [0, 0, 0], (way, others)


def test_fsdp2_on_eight_ranks() -> None:
    with fake_ranks(8):
        for way, (calls, *others) in added("fsdp2").items():
            assert calls <= LIMITS[way] and others == [0, 0, 0], (way, calls, others)


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp1", 2), ("zero2", 2), ("zero3", 2)])
def test_other_engines(engine: str, ranks: int) -> None:
    for found in run_ranks(ranks, added, engine):
        for way, (calls, *others) in found.items():
            assert calls <= 600, (engine, way, calls)
            assert others == [0, 0, 0], (engine, way, others)


def launches() -> dict[str, dict[str, int]]:
    """Launches and Python calls in a step where kernels are used, which do nothing here."""
    found = {}
    patch = pytest.MonkeyPatch()
    launched = dict.fromkeys(("scale_many", "save_many", "shorten_many", "multiply"), 0)
    for name in ("scale_many", "save_many", "shorten_many"):
        patch.setattr(kernels, name, lambda *_, name=name: launched.__setitem__(name, launched[name] + 1))
    multiply = Multipliers.multiply

    def counted(self: Multipliers, jobs: Any) -> None:
        jobs = list(jobs)
        launched["multiply"] += len(jobs)
        multiply(self, jobs)

    patch.setattr(shard_table, "usable", bool)
    patch.setattr(Multipliers, "multiply", counted)
    for way in WAYS:
        steps = Steps("fsdp2", way)
        launched.update(dict.fromkeys(launched, 0))
        with operations() as ops:
            steps()
        found[way] = {name: n for name, n in launched.items() if n}
        with python_calls() as counts:
            steps()
        found[way]["calls"] = counts.calls
        found[way]["waits"] = ops.waits
        steps.penalty.remove()
    steps = Steps("fsdp2", "plain")
    with python_calls() as counts:
        steps()
    with operations() as ops:
        steps()
    for way in WAYS:
        found[way]["calls"] -= counts.calls
        found[way]["waits"] -= ops.waits
    patch.undo()
    return found


def test_launches() -> None:
    found = run_ranks(1, launches)[0]
    assert found["before"].pop("calls") <= 250 + 2 * GROUPS  # those of the counting function
    assert found["after"].pop("calls") <= 60 and found["update"].pop("calls") <= 60, found
    assert found == {
        "before": {"multiply": GROUPS, "waits": 0},
        "after": {"scale_many": 1, "waits": 0},
        "update": {"save_many": 1, "shorten_many": 1, "waits": 0},
    }


def scored(engine: str, counted: bool) -> tuple[int, int, int]:
    """What scoring adds to the forwards and backwards of a batch: Python calls, operations; and the waits of a scoring."""
    steps = Steps(engine, "plain", steps=1)
    x, y = steps.batch

    def loss_fn(model: nn.Module, item: Any) -> Any:
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum" if counted else "mean")
        return (loss, torch.tensor(len(y))) if counted else loss

    def score(batches: int) -> tuple[Counts, Counts]:
        with python_calls() as calls:
            score_importance(steps.model, [None] * batches, loss_fn, head="head")
        with operations() as ops:
            score_importance(steps.model, [None] * batches, loss_fn, head="head")
        return calls, ops

    def plain(batches: int) -> tuple[Counts, Counts]:
        def run() -> None:
            for _ in range(batches):
                result = loss_fn(steps.model, None)
                (result[0] if counted else result).backward()
                for p in parameters:
                    p.grad = None

        with python_calls() as calls:
            run()
        with operations() as ops:
            run()
        return calls, ops

    steps.model.eval()
    parameters = list(steps.model.parameters())
    score(2)  # what is set up once
    plain(2)
    (few, few_ops), (many, many_ops) = score(2), score(6)
    (least, least_ops), (most, most_ops) = plain(2), plain(6)
    calls = (many.calls - few.calls - most.calls + least.calls) // 4
    operations_each = (many_ops.non_views - few_ops.non_views - most_ops.non_views + least_ops.non_views) / 4
    return calls, int(operations_each), many_ops.waits - (most_ops.waits - least_ops.waits) // 4 * 6


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp2", 1), ("fsdp2", 2)])
@pytest.mark.parametrize("counted", [False, True])
def test_scoring(engine: str, ranks: int, counted: bool) -> None:
    for calls, non_views, waits in run_ranks(ranks, scored, engine, counted):
        assert calls <= 300 and non_views <= 5 and waits <= 1, (calls, non_views, waits)


def same_bits() -> bool:
    """The steps that were counted are those of a model under no engine."""
    by_engine: list[dict[str, Tensor]] = []
    for engine in ("single", "fsdp2"):
        steps = Steps(engine, "update")
        by_engine.append({n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in steps.model.named_parameters()})
        steps.penalty.remove()
    one, two = by_engine
    return dist.get_world_size() == 1 and all(torch.equal(one[n], two[n]) for n in one)


def test_what_was_counted_is_right() -> None:
    assert run_ranks(1, same_bits) == [True]
