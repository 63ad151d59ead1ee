"""The k-th highest value over ranks: against sorting, where the sample is good, and where it is of no use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcft_dist.distributed import collectives
from dcft_dist.engines.box import Box
from dcft_dist.method import first_pass
from dcft_dist.method import kth_highest as kth_highest_module
from dcft_dist.method.bits import STEP, pack
from dcft_dist.method.first_pass import FirstPass
from dcft_dist.method.kth_highest import SAMPLE, Threshold, _Search, kth_highest

from ..ranks import run_ranks

N = 500_000


def values_of(kind: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=g)
    return {
        "normal": x,
        "skewed": torch.exp(12 * x.clamp(-6, 6)),
        "denormal": x.abs() * 1e-42,
        "zero_heavy": torch.where(x > 1, x, torch.zeros(())) * torch.where(x < 0, -1.0, 1.0),
        "few_values": (x * 2).round(),
        "equal": torch.full((N,), 0.25),
        "sorted": x.sort().values,
        "one_high": torch.cat([torch.zeros(N - 1), torch.ones(1)]),
        "columns": torch.arange(N) % 1024 * 1.0,
        "huge": x * 5e37,
    }[kind]  # fmt: skip


KINDS = ["normal", "skewed", "denormal", "zero_heavy", "few_values", "equal", "sorted", "one_high", "columns", "huge"]
PLACES = [1, 2, 17, N // 10, N // 2, N - 1, N]


def brute_force(values: Tensor, k: int) -> Threshold:
    ordered = np.sort(values.numpy())[::-1]
    return Threshold(float(ordered[k - 1]), int((ordered > ordered[k - 1]).sum()), int((ordered == ordered[k - 1]).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting(kind: str) -> None:
    values = values_of(kind)
    for k in PLACES:
        assert kth_highest(list(values.split(100_001)), k) == brute_force(values, k), k


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_with_hardly_any_sample_and_room(numbers: list[float], data: st.DataObject) -> None:
    """The sample misleads, what is kept does not fit: only the speed suffers."""
    values = torch.tensor(numbers, dtype=torch.float32)
    k = data.draw(st.integers(1, len(numbers)))
    room = data.draw(st.integers(0, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kth_highest_module, "SAMPLE", 3)
        patch.setattr(kth_highest_module, "ROOM", room)
        patch.setitem(STEP, "cpu", 4)
        assert kth_highest([values[: len(values) // 3], values[len(values) // 3 :]], k) == brute_force(values, k)


def test_edges_of_float32() -> None:
    top, low = float(np.finfo(np.float32).max), -float(np.finfo(np.float32).max)
    values = torch.tensor([top, low, 0.0, -0.0] * 30_000)
    with np.errstate(all="raise"):
        assert kth_highest([values], 1) == Threshold(top, 0, 30_000)
        assert kth_highest([values], 120_000) == Threshold(low, 90_000, 30_000)
        assert str(kth_highest([values], 40_000)) == str(Threshold(0.0, 30_000, 60_000)), "not -0.0"


def of_ranks(kind: str, shares: list[int]) -> list[Threshold]:
    """Rank r holds `shares[r]` parts of the values."""
    ends = np.cumsum([0, *shares]) * N // sum(shares)
    mine = values_of(kind)[ends[collectives.rank()] : ends[collectives.rank() + 1]]
    found = []
    with collectives.counted() as count:
        for k in PLACES:
            found.append(kth_highest([mine], k))
    assert count.calls <= 10 * len(PLACES) and count.num_bytes <= len(PLACES) * 5 * 4 * SAMPLE
    return found


@pytest.mark.parametrize("shares", [[1, 1], [0, 1], [5, 0, 1, 1]])
def test_same_for_every_number_of_ranks(shares: list[int]) -> None:
    for kind in ("normal", "sorted", "zero_heavy", "one_high"):
        expected = [brute_force(values_of(kind), k) for k in PLACES]
        for found in run_ranks(len(shares), of_ranks, kind, shares):
            assert found == expected, kind


def test_passes_over_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for a sample that leads to the mark, and its kept values are few."""
    sizes: list[int] = []
    count = _Search._count

    def watched(self: _Search, *arguments: object) -> object:
        sizes.append(sum(a.numel() for a in self.held))
        return count(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_Search, "_count", watched)
    kth_highest([values_of("normal").repeat(10) + torch.rand(10 * N)], N)
    assert sizes[0] == 10 * N and sum(sizes[1:]) < N / 2


@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple), data=st.data())
def test_cells_of_a_box_before_a_flat_index(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True))
    box = Box(shape, start, size)
    index = torch.arange(int(np.prod(shape))).view(shape)[box.slices()].reshape(-1)
    for flat in range(-2, int(np.prod(shape)) + 3):
        assert box.num_before(flat) == int((index < flat).sum())


# -- the first pass on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 1003, (1 << 18) - 1, (1 << 18) + 9])
def test_the_first_pass_does_what_separate_passes_do(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = {
        "a": torch.randn(size, generator=generator),
        "b": torch.randn(5, generator=generator).round(),
        "c": torch.zeros(0),
    }
    scores["a"][::7] = 0.5
    first, values = FirstPass(scores), torch.cat(list(scores.values()))
    limits = [-1.0, 0.25, 0.5, 0.75]
    counts, kept = first.count(limits, 0.25, 0.75)
    assert counts == [int((values >= limit).sum()) for limit in limits] and kept is not None and first.finite
    assert torch.equal(kept, values[(values >= 0.25) & (values < 0.75)])
    for name, part in scores.items():
        places = first.places(name, 0.5)
        assert places is not None and places.tolist() == (part == 0.5).nonzero().view(-1).tolist()
        assert first.bits(name, 0.75, 0) is None and first.bits(name, 0.2, 0) is None, "outside the limits"
    for ties in (0, 3, size):
        first = FirstPass(scores)
        first.count(limits, 0.25, 0.75)
        for name, part in scores.items():
            expected = part > 0.5
            expected[:ties] |= part[:ties] == 0.5
            bits = first.bits(name, 0.5, ties)
            assert bits is not None and np.array_equal(bits[0], pack(expected)) and bits[1] == int(expected.sum())


@pytest.mark.parametrize(("value", "finite"), [(torch.nan, False), (torch.inf, False), (-torch.inf, False), (3e38, True)])
def test_the_first_pass_finds_what_is_not_finite(value: float, finite: bool) -> None:
    scores = torch.zeros(1000)
    scores[77] = value
    first = FirstPass({"a": scores})
    first.count([0.5, 1.0], 0.5, 1.0)
    assert first.finite == finite


@pytest.mark.parametrize("room", [3, 10])
def test_the_first_pass_gives_up_what_it_has_no_room_for(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten places have room for the octets of 50 candidates, but not for the candidates."""
    monkeypatch.setattr(first_pass, "ROOM", room)
    first = FirstPass({"a": torch.linspace(0, 1, 100)})
    counts, kept = first.count([0.25, 0.75], 0.25, 0.75)
    assert counts == [75, 25] and kept is None and first.bits("a", 0.5, 0) is None and first.places("a", 0.5) is None


def test_large_scores_do_not_warn() -> None:
    """Their squares overflow."""
    with np.errstate(all="raise"):
        first = FirstPass({"a": torch.full((1000,), 1e30)})
        first.count([0.5, 1.0], 0.5, 1.0)
    assert first.finite


def test_a_process_that_flushes_denormal_numbers() -> None:
    assert torch.set_flush_denormal(True)
    try:
        found = kth_highest([torch.zeros(300_000)], 270_000)
    finally:
        torch.set_flush_denormal(False)
    assert found == Threshold(0.0, 0, 300_000)
