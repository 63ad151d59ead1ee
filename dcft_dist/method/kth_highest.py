"""The k-th highest of values that are spread over ranks: exact, in about one pass, with little memory.

A round draws a random sample of the values in question and reads off it two limits that the k-th lies between with near
certainty. One pass counts the values that reach each limit, and keeps those between them if they are few. The counts of all
ranks then say, exactly, between which limits the k-th is. Chance only decides how soon this ends (Floyd and Rivest's SELECT,
CACM 18(3), 1975, over ranks): mostly after one round over all values and one or two over the few that were kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distributed import collectives
from .bits import step_of

SAMPLE = 1 << 16  # values that a round looks at, of all ranks together: 256 KiB in one collective


ROOM = 1 << 22  # values that a rank keeps at most: 16 MiB, twice that for a moment


DRAWS = 1 << 20  # positions that a rank looks at to find its part of a sample


@dataclass(frozen=True)
class Threshold:
    """The k-th highest value, how many are higher, and how many are equal to it (itself included)."""

    value: float
    above: int
    ties: int


def kth_highest(arrays: Sequence[Tensor], k: int) -> Threshold:
    """The k-th highest of all ranks' values, which are finite; 0.0 and -0.0 are one value. Collective.

    Args:
        arrays: this rank's values: flat float32 tensors, any number, of any size.
        k: from 1 to the number of values of all ranks.
    """
    search = _Search(arrays, k)
    while search.inside > SAMPLE and search.high > _next(search.low):
        search.narrow()
    if search.inside > SAMPLE:
        return Threshold(search.low + 0.0, search.above, search.inside)
    found = np.sort(search.sample())
    value = found[len(found) - (k - search.above)]
    return Threshold(float(value) + 0.0, search.above + int((found > value).sum()), int((found == value).sum()))


def comparable(values: Tensor) -> Any:
    """The same memory: a numpy array on the CPU, where numpy compares three times as fast as torch; else the tensor."""
    return values.numpy() if values.device.type == "cpu" else values


def pieces(values: Tensor) -> Iterator[Any]:
    """A flat tensor, `comparable`, in steps that suit its device."""
    held, step = comparable(values), step_of(values.device)
    return (held[begin : begin + step] for begin in range(0, len(held), step))


def is_finite(values: Any) -> Any:
    return torch.isfinite(values) if isinstance(values, Tensor) else np.isfinite(values)


def how_many(mask: Any) -> Any:
    """An integer, or what will be one: a GPU is not waited for."""
    return mask.sum() if isinstance(mask, Tensor) else int(np.count_nonzero(mask))


class _Search:
    """The k-th highest value is in [low, high), and `above` values reach `high`: the same on every rank.

    `held` are the values of this rank that are looked at, `at_low` and `at_high` how many of each rank's held values reach
    the limits. `exact`: no rank holds others than those between the limits.
    """

    def __init__(self, arrays: Sequence[Tensor], k: int) -> None:
        self.k, self.low, self.high, self.above = k, -inf, inf, 0
        self.held = [a for a in arrays if a.numel()]
        own = sum(a.numel() for a in self.held)
        self.at_low = [n for (n,) in collectives.all_gather_ints([own], what="selection: number of scores")]
        self.at_high = [0] * len(self.at_low)
        self.exact = True
        self._random = np.random.default_rng(collectives.rank())

    @property
    def inside(self) -> int:
        return sum(self.at_low) - sum(self.at_high)

    def narrow(self) -> None:
        """One round. The new interval is a part of the old one: some value of the old one is outside it."""
        limits, least, most = self._limits()
        counts, kept = self._count(limits, least, most)
        table = collectives.all_gather_ints([*counts, int(kept is not None)], what="selection: counts")
        gone = self.above - sum(self.at_high)  # values that reach `high` and that no rank holds any more
        lows, highs = [(self.low, self.at_low)], [(self.high, self.at_high)]
        for limit, *at in zip(limits, *(row[:-1] for row in table), strict=True):
            (lows if gone + sum(at) >= self.k else highs).append((limit, at))
        (self.low, self.at_low), (self.high, self.at_high) = max(lows), min(highs)
        self.above = gone + sum(self.at_high)
        inner = (self.low, self.high) == (least, most)
        self.exact = inner and all(row[-1] for row in table)
        if self.exact and kept is not None:
            self.held = [kept]
            self.at_low = [a - b for a, b in zip(self.at_low, self.at_high, strict=True)]
            self.at_high = [0] * len(self.at_low)

    def _limits(self) -> tuple[list[float], float, float]:
        """Limits to count at, ascending, and the two between which the k-th value should be."""
        sample = np.sort(self.sample())[::-1]
        share = (self.k - self.above) / self.inside  # of the values in question that are as high
        place = share * len(sample)
        margin = 4 * sqrt(place * (1 - share)) + 1  # four standard deviations
        first, last = floor(place - margin), ceil(place + margin)
        if first < 0 and last >= len(sample) > 0:  # too few to say much: any new limit is a step
            first = last = min(int(place), len(sample) - 1)
        most = float(sample[first]) if first >= 0 else self.high
        least = float(sample[last]) if last < len(sample) else self.low
        limits = {least, most}
        for limit in (least, most):  # a value that is frequent, or that is no new limit, gets an interval of its own
            if limit == self.low or int((sample == limit).sum()) > 1:
                limits.add(_next(limit))
        if _next(least) in limits:
            least = min(_next(least), most)
        return sorted(limits), least, most

    def _count(self, limits: list[float], least: float, most: float) -> tuple[list[int], Tensor | None]:
        """How many held values reach each limit, and those between `least` and `most`, or None if that are too many."""
        counts, kept, room = [0] * len(limits), list[Tensor](), ROOM
        for piece in (piece for array in self.held for piece in pieces(array)):
            reached = [piece >= limit for limit in limits]
            counts = [n + how_many(mask) for n, mask in zip(counts, reached, strict=True)]
            if room >= 0:
                kept.append(torch.as_tensor(piece[reached[limits.index(least)] ^ reached[limits.index(most)]]))
                room -= len(kept[-1])
        between = torch.cat(kept) if kept else torch.zeros(0)
        return [int(n) for n in counts], between if room >= 0 else None

    def sample(self) -> NDArray[np.float32]:
        """Values between the limits, of all ranks by their shares: all if they are at most SAMPLE. Collective."""
        own = [a - b for a, b in zip(self.at_low, self.at_high, strict=True)]
        sizes = own if self.inside <= SAMPLE else [ceil(SAMPLE * n / self.inside) for n in own]
        me = collectives.rank()
        found = self._all() if self.inside <= SAMPLE else self._draw(sizes[me], own[me])
        mine = torch.full((sizes[me],), torch.nan)
        mine[: len(found)] = found
        bits = collectives.all_gather_uneven(mine.view(torch.int32), sizes, what="selection: sample")
        values: NDArray[np.float32] = bits.view(torch.float32).numpy()
        return values[~np.isnan(values)]

    def _all(self) -> Tensor:
        pieces_ = [p[(p >= self.low) & (p < self.high)] for array in self.held for p in pieces(array)]
        return torch.cat([torch.zeros(0), *(torch.as_tensor(p).cpu() for p in pieces_)])

    def _draw(self, size: int, own: int) -> Tensor:
        """`size` random ones of this rank's `own` held values between the limits; fewer if few of those held are."""
        ends = np.cumsum([0, *(len(array) for array in self.held)])
        draws = size if self.exact else min(DRAWS, ceil(1.5 * size * ends[-1] / max(own, 1)))
        places = np.sort(self._random.integers(max(ends[-1], 1), size=draws if size else 0))
        parts = np.split(places, np.searchsorted(places, ends[1:-1]))
        found = [_take(*what) for what in zip(self.held, parts, ends, strict=False) if len(what[1])]
        among = torch.cat([torch.zeros(0), *found])
        among = among[(among >= self.low) & (among < self.high)]
        return among[torch.from_numpy(self._random.permutation(len(among))[:size])]


def _take(values: Tensor, places: NDArray[np.int64], begin: int) -> Tensor:
    return values[torch.from_numpy(places - begin).to(values.device)].cpu()


def _next(value: float) -> float:
    """The next higher float32."""
    with np.errstate(over="ignore", under="ignore"):  # after the highest comes infinity, after 0 a denormal number
        return float(np.nextafter(np.float32(value), np.float32(inf)))
