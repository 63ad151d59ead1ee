"""Counts what a block of code costs the host: Python calls, dispatcher operations, launches, waits, collectives.

Counts are exact, where times are not. `VitLike` has the structure on which they are stated.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dcft_dist import FundamentalSet, attach_penalty, score_importance
from dcft_dist.compat.deepspeed import import_deepspeed
from dcft_dist.distributed import collectives
from dcft_dist.engines.find import find_engine

# Operations that only describe memory anew.
VIEWS = {"view", "_unsafe_view", "reshape", "slice", "select", "split", "split_with_sizes", "chunk", "detach", "alias"}
VIEWS |= {"as_strided", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "unbind", "_reshape_alias"}


@dataclass
class Counts:
    """What a block has cost.

    Attributes:
        calls: Python calls of all threads (`sys.setprofile`, event "call").
        operations: dispatcher operations by name, without `VIEWS`.
        views: the others.
        waits: reads of a value, for which a GPU would be waited for.
        sent: collectives of the package.
        where: function -> Python calls.
    """

    calls: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    views: int = 0
    waits: int = 0
    sent: int = 0
    where: Counter[str] = field(default_factory=Counter)

    @property
    def non_views(self) -> int:
        return self.operations.total()


@contextmanager
def python_calls(detailed: bool = False) -> Iterator[Counts]:
    """Counts Python calls and the package's collectives. `detailed`: also by function."""
    counts, before = Counts(), sys.getprofile()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            counts.calls += 1
            if detailed:
                code = frame.f_code
                counts.where[f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}"] += 1

    with collectives.counted() as sent:
        threading.setprofile_all_threads(watch) if hasattr(threading, "setprofile_all_threads") else threading.setprofile(
            watch
        )
        sys.setprofile(watch)
        try:
            yield counts
        finally:
            sys.setprofile(before)
            threading.setprofile(None)
    counts.sent = sent.calls


@contextmanager
def operations() -> Iterator[Counts]:
    """Counts dispatcher operations and reads of values."""
    counts = Counts()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "item", "is_nonzero"):
                counts.waits += 1
            if name in VIEWS:
                counts.views += 1
            else:
                counts.operations[name] += 1
            return func(*args, **(kwargs or {}))

    with Mode():
        yield counts


class Layer(nn.Module):
    """A block with the tensors of a vision transformer's: six matrices and their biases, two norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = torch.softmax(self.query(y) @ self.key(y).transpose(-1, -2), -1) @ self.value(y)
        x = x + self.out(y)
        return x + self.down(torch.nn.functional.gelu(self.up(self.after(x))))


class VitLike(nn.Module):
    """[batch, 12] -> [batch, 3]: 145 eligible of 392 tensors with 24 blocks, as a ViT-L has."""

    def __init__(self, layers: int = 24, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.place, self.first = nn.Parameter(torch.zeros(1, 2, width)), nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).unsqueeze(1)
        y = torch.cat([self.first.expand(len(y), -1, -1), y], 1) + self.place
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])


WAYS = {"before": ("gradient", "before"), "after": ("gradient", "after"), "update": ("update", "before")}


class Steps:
    """A model under an engine, and steps of it."""

    def __init__(self, engine: str, way: str, steps: int = 9, layers: int = 24) -> None:
        torch.manual_seed(0)
        net, generator = VitLike(layers), torch.Generator().manual_seed(0)
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


def noted(method: Any, calls: list[str], by: str = "") -> Any:
    """The method, which also notes that it was called; `by`: only if it was called by this file."""

    def call(self: Any) -> Any:
        if sys._getframe(1).f_code.co_filename.endswith(by):
            calls.append(method.__name__)
        return method(self)

    return call


def added(engine: str, layers: int = 24) -> dict[str, tuple[int, int, int, int]]:
    """What each way adds to a step: Python calls, waits, collectives of the package, calls of `shards` and `stepped`."""
    found, plain = {}, Counts()
    for way in ("plain", *WAYS):
        steps = Steps(engine, way, 9 if way == "update" else 2, layers)  # until no check of the optimizer is due
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
    score(1)  # what is set up once
    plain(1)
    (one, one_ops), (two, two_ops) = score(1), score(2)
    (plain_one, plain_one_ops), (plain_two, plain_two_ops) = plain(1), plain(2)
    calls = two.calls - one.calls - (plain_two.calls - plain_one.calls)
    operations_each = two_ops.non_views - one_ops.non_views - (plain_two_ops.non_views - plain_one_ops.non_views)
    return calls, operations_each, two_ops.waits - 2 * (plain_two_ops.waits - plain_one_ops.waits)
