"""What the penalty costs the host in a step: Python calls, launches, lookups. On the structure of a ViT-L, after nine steps.

On a GPU a step is late because the host is, so these counts are what a step may cost there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcft_dist import Scores, select_fundamental
from dcft_dist.compat.pytorch import fake_ranks
from dcft_dist.engines.box import Box
from dcft_dist.method import kernels, ranking, shard_table
from dcft_dist.method.multipliers import Multipliers
from dcft_dist.method.scores import ScoreShard

from ..counts import WAYS, Steps, added, noted, operations, python_calls, scored
from ..ranks import run_ranks
from .kernel_cases import scores_of

GROUPS = 25  # 24 blocks and the root


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


@pytest.mark.parametrize(
    ("engine", "ranks", "layers"), [("single", 1, 24), ("ddp", 2, 24), ("fsdp1", 2, 24), ("zero2", 2, 24), ("zero3", 2, 4)]
)
def test_other_engines(engine: str, ranks: int, layers: int) -> None:
    """ZeRO-3 is slow: on it a sixth of the blocks, and of the limit."""
    for found in run_ranks(ranks, added, engine, layers):
        for way, (calls, *others) in found.items():
            assert calls <= 25 * layers, (engine, way, calls)
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
        steps = Steps("fsdp2", way, 9 if way == "update" else 2)
        launched.update(dict.fromkeys(launched, 0))
        with operations() as ops:
            steps()
        found[way] = {name: n for name, n in launched.items() if n}
        with python_calls() as counts:
            steps()
        found[way]["calls"] = counts.calls
        found[way]["waits"] = ops.waits
        steps.penalty.remove()
    steps = Steps("fsdp2", "plain", 2)
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


@pytest.mark.parametrize(
    ("engine", "ranks", "counted"), [("single", 1, True), ("fsdp2", 1, False), ("fsdp2", 2, False), ("fsdp2", 2, True)]
)
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


@contextmanager
def kernels_by_numpy(scores: Scores) -> Iterator[dict[str, int]]:
    """The selection by kernels, which numpy stands in for; yields how often each is launched."""
    keys = [_keys(shard.values.numpy()) for shard in scores.shards.values()]
    launched = {"count_digits": 0, "pack_above": 0}

    def count_digits(blocks: Any, prefix: Tensor, counts: Tensor, shift: int, bits: int) -> None:
        launched["count_digits"] += 1
        for key in keys:
            match = key[key >> (shift + bits) == int(prefix.numpy()[0])] if shift + bits < 32 else key
            counts.numpy()[:] += np.bincount((match >> shift) & ((1 << bits) - 1), minlength=len(counts))

    def pack_above(*arguments: Any) -> None:
        _blocks, _places, key, octets, counts, ties = arguments
        launched["pack_above"] += 1
        chosen = [part >= int(key.numpy()[0]) for part in keys]
        octets.numpy()[:] = np.concatenate([np.packbits(part, bitorder="little") for part in chosen])
        counts.numpy()[:] = [part.sum() for part in chosen]
        if ties is not None:
            begins = np.cumsum([0, *(8 * -(-len(part) // 8) for part in keys)])
            equal = [b + np.flatnonzero(part == int(key.numpy()[0])) for b, part in zip(begins, keys, strict=False)]
            found = np.concatenate(equal)[::-1]
            ties.numpy()[: 1 + len(found)] = [len(found), *found]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "count_digits", count_digits)
        patch.setattr(kernels, "pack_above", pack_above)
        patch.setattr(ranking, "by_kernels", bool)
        yield launched


def _keys(scores: Any) -> Any:
    bits = np.where(scores == 0, np.float32(0), scores).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31 == 0, bits | 0x80000000, ~bits & 0xFFFFFFFF)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [100, 1_000_000])
def test_selection_on_a_gpu(size: int, tied: bool) -> None:
    """Operations, waits and large launches; tied: only some of the scores that equal the threshold are selected."""
    fraction, scores = 0.01 if tied else 0.1, scores_of((size, 3, size // 2), torch.device("cpu"))
    if tied:
        for shard in scores.shards.values():
            shard.values[::50] = 9.0
    waits: list[str] = []
    with kernels_by_numpy(scores) as launched, pytest.MonkeyPatch.context() as patch, operations() as ops:
        for name in ("tolist", "cpu", "item"):
            patch.setattr(Tensor, name, noted(getattr(Tensor, name), waits, "radix_select.py"))
        chosen = select_fundamental(scores, fraction)
    assert ops.non_views <= 60 and len(waits) <= 2, (ops.non_views, waits)
    assert launched == {"count_digits": 3, "pack_above": 1}
    expected = select_fundamental(scores, fraction)
    assert all(torch.equal(chosen.mask(n), expected.mask(n)) for n in expected.names)


def spread_ties() -> list[bool]:
    """Selections by kernels of scores with many ties, spread over the ranks by columns and by flat ranges."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = torch.randint(0, 30, (64, 12), generator=torch.Generator().manual_seed(0)).float()
    boxes = {
        "columns": Box((64, 12), (0, 12 // ranks * rank), (64, 12 // ranks)),
        "flat": Box.flat(768, 768 // ranks * rank, 768 // ranks),
    }
    shards = {n: ScoreShard(b, whole.view(-1)[b.flat_index(0, b.numel)].clone()) for n, b in boxes.items()}
    scores = Scores("given", {"columns": (64, 12), "flat": (768,)}, shards)
    same = []
    for fraction in (0.01, 0.1, 0.5, 0.77, 1.0):
        with kernels_by_numpy(scores) as launched:
            chosen = select_fundamental(scores, fraction)
        expected = select_fundamental(scores, fraction)
        same.append(launched["pack_above"] == 1 and chosen.info.counts == expected.info.counts)
        same += [torch.equal(chosen.mask(n), expected.mask(n)) for n in expected.names]
    return same


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ties_on_gpus_are_cut_at_the_same_place(ranks: int) -> None:
    assert all(all(same) for same in run_ranks(ranks, spread_ties))
