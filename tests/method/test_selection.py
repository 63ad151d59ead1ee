"""Selection is exact: against a brute-force sort, on hard scores, over shardings, with ties decided."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcft_dist import DcftError, FundamentalSet, Scores, select_fundamental
from dcft_dist.distributed import collectives
from dcft_dist.engines.box import Box
from dcft_dist.errors import ScoreError, SelectionError
from dcft_dist.method.kth_highest import SAMPLE
from dcft_dist.method.scores import ScoreShard

from ..nets import DEVICE
from ..ranks import run_ranks


def make_scores(tensors: dict[str, Tensor], rank: int = 0, ranks: int = 1, layout: str = "rows") -> Scores:
    """Scores of full tensors, of which this rank owns some rows, a flat slice, or some columns of each."""
    shards = {}
    for name, full in tensors.items():
        shape = tuple(full.shape)
        if layout == "flat" or full.ndim < 2:
            n = full.numel()
            box = Box.flat(n, n * rank // ranks, n * (rank + 1) // ranks - n * rank // ranks)
            values = full.reshape(-1)[box.slices()]
        else:
            dim = 0 if layout == "rows" else 1
            n = shape[dim]
            start, end = n * rank // ranks, n * (rank + 1) // ranks
            starts, sizes = [0] * full.ndim, list(shape)
            starts[dim], sizes[dim] = start, end - start
            box = Box(shape, tuple(starts), tuple(sizes))
            values = full[box.slices()]
        shards[name] = ScoreShard(box, values.reshape(-1).to(DEVICE, torch.float32, copy=True))
    return Scores("given", {n: tuple(t.shape) for n, t in tensors.items()}, shards, num_weights=10**6)


def brute_force(tensors: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k highest by Python's sort over (score, name in UTF-8 order, flat index)."""
    cells = [(-float(v), n.encode(), i) for n, t in tensors.items() for i, v in enumerate(t.float().reshape(-1).tolist())]
    chosen = {n: torch.zeros(t.numel(), dtype=torch.bool) for n, t in tensors.items()}
    for _, name, index in sorted(cells)[:k]:
        chosen[name.decode()][index] = True
    return {n: m.view(tensors[n].shape) for n, m in chosen.items()}


def assert_same(found: FundamentalSet, expected: dict[str, Tensor]) -> None:
    for name, mask in expected.items():
        assert torch.equal(found.mask(name), mask), name


SHAPES = {"b.weight": (3, 5), "é": (7,), "a": (2, 3, 4), "Z": (1, 1), "b.weighs": (4, 2)}


def hard_scores(kind: str, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=g)
        return {
            "random": x.abs(),
            "signed": x,
            "equal": torch.full(shape, 0.25),
            "denormal": (x.abs() * 1e-44),
            "zero_heavy": torch.where(x > 1, x, torch.zeros(())) * torch.where(x < 0, -1.0, 1.0),
            "few_values": x.round().abs(),
            "huge": x.abs() * 3e37,
        }[kind]  # fmt: skip

    return {name: one(shape) for name, shape in SHAPES.items()}


KINDS = ["random", "signed", "equal", "denormal", "zero_heavy", "few_values", "huge"]


@settings(max_examples=120, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), fraction=st.floats(0, 1))
def test_equals_brute_force(kind: str, seed: int, fraction: float) -> None:
    tensors = hard_scores(kind, seed)
    total = sum(t.numel() for t in tensors.values())
    found = select_fundamental(make_scores(tensors), fraction)
    assert found.num_selected == round(fraction * total)
    assert_same(found, brute_force(tensors, round(fraction * total)))
    if found.num_selected:
        lowest = min(float(t[found.mask(n)].min()) for n, t in tensors.items() if found.mask(n).any())
        assert found.threshold == lowest


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), fraction=st.floats(0, 1))
def test_per_tensor_equals_brute_force(kind: str, seed: int, fraction: float) -> None:
    tensors = hard_scores(kind, seed)
    found = select_fundamental(make_scores(tensors), fraction, scope="per_tensor")
    for name, tensor in tensors.items():
        assert_same(found, brute_force({name: tensor}, round(fraction * tensor.numel())))


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6), bounds=st.tuples(*[st.floats(0, 1)] * 3))
def test_floor_and_cap(kind: str, seed: int, bounds: tuple[float, float, float]) -> None:
    """Brute force: take each tensor's floor, then the best of what the caps allow."""
    floor, fraction, cap = sorted(bounds)
    tensors = hard_scores(kind, seed)
    total = round(fraction * sum(t.numel() for t in tensors.values()))
    low = {n: round(floor * t.numel()) for n, t in tensors.items()}
    high = {n: round(cap * t.numel()) for n, t in tensors.items()}
    if not sum(low.values()) <= total <= sum(high.values()):
        with pytest.raises(SelectionError, match="allow only"):
            select_fundamental(make_scores(tensors), fraction, floor=floor, cap=cap)
        return
    expected = {n: brute_force({n: t}, low[n])[n] for n, t in tensors.items()}
    allowed = {n: brute_force({n: t}, high[n])[n] for n, t in tensors.items()}
    cells = [
        (-float(t.float().reshape(-1)[i]), n.encode(), i)
        for n, t in tensors.items()
        for i in (allowed[n] & ~expected[n]).reshape(-1).nonzero().view(-1).tolist()
    ]
    for _, name, index in sorted(cells)[: total - sum(low.values())]:
        expected[name.decode()].view(-1)[index] = True
    assert_same(select_fundamental(make_scores(tensors), fraction, floor=floor, cap=cap), expected)


@pytest.mark.parametrize("fraction", [0.0, 1e-6, 0.1, 0.5, 1.0])
def test_k_is_exact_on_a_million_weights(fraction: float) -> None:
    """More than one chunk, heavy ties that straddle the k-th place in the middle of a tensor."""
    g = torch.Generator().manual_seed(0)
    tensors = {"w": (torch.rand(1100, 1000, generator=g) * 4).round(), "v": (torch.rand(3, 7, generator=g) * 4).round()}
    found = select_fundamental(make_scores(tensors), fraction)
    k = round(fraction * sum(t.numel() for t in tensors.values()))
    assert found.num_selected == k == sum(int(found.mask(n).sum()) for n in tensors)
    order = np.argsort(-torch.cat([tensors["v"].view(-1), tensors["w"].view(-1)]).numpy(), kind="stable")[:k]
    expected = np.zeros(1100 * 1000 + 21, dtype=bool)
    expected[order] = True
    assert np.array_equal(torch.cat([found.mask("v").view(-1), found.mask("w").view(-1)]).numpy(), expected)


def select_sharded(layout: str, path: str) -> Any:
    rank, ranks = collectives.rank(), collectives.world_size()
    out = {}
    for kind in KINDS:
        tensors = hard_scores(kind, seed=7)
        for scope, floor, cap in (("global", 0.0, 1.0), ("per_tensor", 0.0, 1.0), ("global", 0.2, 0.5)):
            scores = make_scores(tensors, rank, ranks, layout)
            found = select_fundamental(scores, 0.4, scope=scope, floor=floor, cap=cap)  # type: ignore[arg-type]
            found.save(f"{path}/{layout}.{ranks}.safetensors")
            assert found.jaccard(FundamentalSet.load(f"{path}/{layout}.{ranks}.safetensors")) == 1.0
            out[kind, scope, floor] = {n: found.mask(n) for n in tensors}
    return out


@pytest.mark.parametrize("layout", ["rows", "flat", "columns"])
def test_same_set_for_every_sharding(layout: str, tmp_path: Any) -> None:
    expected = run_ranks(1, select_sharded, "rows", str(tmp_path))[0]
    for ranks in (2, 4):
        for found in run_ranks(ranks, select_sharded, layout, str(tmp_path)):
            for case, masks in expected.items():
                for name, mask in masks.items():
                    assert torch.equal(found[case][name], mask), (ranks, case, name)


def count_collectives(kind: str, side: int) -> tuple[int, int]:
    rank, ranks = collectives.rank(), collectives.world_size()
    values = torch.full((side, side), 0.5) if kind == "equal" else torch.rand(side, side)
    with collectives.counted() as count:
        select_fundamental(make_scores({"w": values, "v": values[0]}, rank, ranks), 0.1)
    return count.calls, count.num_bytes


@pytest.mark.parametrize("kind", ["equal", "random"])
def test_traffic_does_not_grow_with_the_number_of_weights(kind: str) -> None:
    """Equal scores: the cut goes through them, and its place is searched for."""
    for side in (10, 400, 2000):
        ((calls, num_bytes),) = {*run_ranks(2, count_collectives, kind, side)}
        assert calls <= 16 and num_bytes <= 4 * 4 * SAMPLE, (side, calls, num_bytes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fraction": 1.5}, SelectionError, "fraction must lie between 0 and 1, not 1.5"),
        ({"fraction": float("nan")}, SelectionError, "fraction"),
        ({"floor": 0.6, "cap": 0.5}, SelectionError, "above cap"),
        ({"scope": "globl"}, SelectionError, "did you mean 'global'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[DcftError], message: str) -> None:
    with pytest.raises(error, match=message):
        select_fundamental(make_scores(hard_scores("random", 0)), **change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_must_be_finite(value: float) -> None:
    tensors = hard_scores("random", 0)
    tensors["a"].view(-1)[3] = value
    with pytest.raises(ScoreError, match=r"NaN or infinite in a \(1\)"):
        select_fundamental(make_scores(tensors))


def test_empty_scores() -> None:
    with pytest.raises(ScoreError, match="empty"):
        select_fundamental(Scores("given", {}, {}))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), data=st.data()
)  # fmt: skip
def test_box_indices(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True))
    box = Box(shape, start, size)
    grid = torch.arange(prod(shape)).view(shape)[box.slices()].reshape(-1)
    assert torch.equal(box.flat_index(0, box.numel), grid)
    if box.first is not None:
        assert torch.equal(grid, torch.arange(box.first, box.first + box.numel))
