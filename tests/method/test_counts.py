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

from dcft_dist import FundamentalSet, attach_penalty
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

    def __init__(self, engine: str, way: str) -> None:
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
            logging.getLogger("dcft_dist").setLevel(logging.ERROR)  # a gradient penalty under AdamW is warned of
            self.penalty = attach_penalty(self.model, chosen, optimizer=self.optimizer, level=level, where=where)  # type: ignore[arg-type]
        for _ in range(9):
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


def added(engine: str) -> dict[str, tuple[int, int, int, int]]:
    """What each way adds to a step: Python calls, waits, collectives of the package, lookups of shards and of the stepped."""
    found, plain = {}, Counts()
    for way in ("plain", *WAYS):
        steps = Steps(engine, way)
        lookups = [0]
        if way != "plain":
            kind = type(find_engine(steps.model))
            patch = pytest.MonkeyPatch()
            for name in ("shards", "stepped"):
                method = getattr(kind, name)
                patch.setattr(kind, name, lambda self, method=method: lookups.__setitem__(0, lookups[0] + 1) or method(self))
        with python_calls() as counts:
            steps()
        with operations() as ops:
            steps()
        if way == "plain":
            plain, waits = counts, ops.waits
        else:
            patch.undo()
            steps.penalty.remove()
            found[way] = (counts.calls - plain.calls, ops.waits - waits, counts.sent, lookups[0])
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
