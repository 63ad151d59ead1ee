"""Finds the k-th highest of values spread over ranks: exactly, in about one pass, with little memory.

The search works in rounds. A round draws a random sample of the candidate values. From the sample it takes two limits, which
almost certainly enclose the k-th highest value. One pass counts the values that reach each limit, and stores those between
the limits if they are few. The counts of all ranks then show exactly between which limits the k-th highest value lies.
Chance only decides the number of rounds: mostly one over all values, and one or two over the few stored ones. This is Floyd
and Rivest's SELECT (CACM 18(3), 1975), over ranks.
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
from .first_pass import ROOM, FirstPass

SAMPLE = 1 << 16  # sampled values per round, of all ranks together: 256 KiB in one collective


FIRST_SAMPLE = 1 << 17  # in the first pass over many values: a larger sample leaves fewer candidates


DRAWS = 1 << 20  # positions that a rank draws at most for its part of a sample


@dataclass(frozen=True)
class Threshold:
    """The k-th highest value.

    Attributes:
        value: the k-th highest value.
        above: number of values that are higher.
        ties: number of values that are equal to it, itself included.
    """

    value: float
    above: int
    ties: int


class NotFiniteError(Exception):
    """Some scores are not finite: raised on every rank."""


def kth_highest(arrays: Sequence[Tensor], k: int, first: FirstPass | None = None) -> Threshold:
    """Finds the k-th highest of the values of all ranks. Collective.

    Args:
        arrays: this rank's values, as any number of flat float32 tensors of any size. All values must be finite. 0.0 and
            -0.0 count as equal.
        k: from 1 to the number of values of all ranks.
        first: makes the first pass over the values, instead of `arrays`, if there is one; on every rank or on none.

    Raises:
        NotFiniteError: the first pass has found a value that is not finite, on any rank.
    """
    search = _Search(arrays, k, first)
    while search.inside > SAMPLE and search.high > _next(search.low):
        search.narrow()
    if search.inside > SAMPLE:
        return Threshold(search.low + 0.0, search.above, search.inside)
    candidates = np.sort(search.sample())
    value = candidates[len(candidates) - (k - search.above)]
    above, ties = int((candidates > value).sum()), int((candidates == value).sum())
    return Threshold(float(value) + 0.0, search.above + above, ties)


def comparable(values: Tensor) -> Any:
    """A numpy view of a CPU tensor, since numpy compares three times as fast as torch there; else the tensor itself."""
    return values.numpy() if values.device.type == "cpu" else values


def pieces(values: Tensor) -> Iterator[Any]:
    """Yields consecutive pieces of a flat tensor, made `comparable`, in a size that suits its device."""
    array, step = comparable(values), step_of(values.device)
    return (array[begin : begin + step] for begin in range(0, len(array), step))


def is_finite(values: Any) -> Any:
    """Elementwise test of a tensor or a numpy array for finite values."""
    return torch.isfinite(values) if isinstance(values, Tensor) else np.isfinite(values)


def how_many(mask: Any) -> Any:
    """Number of True values: an integer, or a tensor with one element, which does not wait for a GPU."""
    return mask.sum() if isinstance(mask, Tensor) else int(np.count_nonzero(mask))


class _Search:
    """The state of the search: the k-th highest value is in [low, high). Except for `held`, it is the same on every rank.

    Attributes:
        k: which value to find; 1 is the highest.
        low, high: the limits.
        above: number of values that are `high` or higher.
        held: this rank's values that can still be candidates; at first all.
        at_low, at_high: per rank, the number of its held values that are at least `low`, and at least `high`.
        exact: True if no rank holds values outside the limits.
    """

    def __init__(self, arrays: Sequence[Tensor], k: int, first: FirstPass | None) -> None:
        self._first = first
        self.k, self.low, self.high, self.above = k, -inf, inf, 0
        self.held = [a for a in arrays if a.numel()]
        own = sum(a.numel() for a in self.held)
        self.at_low = [n for (n,) in collectives.all_gather_ints([own], what="selection: number of scores")]
        self.at_high = [0] * len(self.at_low)
        self.exact = True
        self._random = np.random.default_rng(collectives.rank())

    @property
    def inside(self) -> int:
        """Number of candidates: values of all ranks in [low, high)."""
        return sum(self.at_low) - sum(self.at_high)

    def narrow(self) -> None:
        """Runs one round. The new interval lies within the old one and excludes at least one of its values. Collective."""
        limits, least, most = self._limits()
        first, self._first = self._first, None
        counts, between = first.count(limits, least, most) if first else self._count(limits, least, most)
        finite = first is None or first.finite
        rows = collectives.all_gather_ints([*counts, int(between is not None), int(finite)], what="selection: counts")
        if not all(row[-1] for row in rows):
            raise NotFiniteError
        table = [row[:-1] for row in rows]
        dropped = self.above - sum(self.at_high)  # values that reach `high` and that no rank holds any more
        lows, highs = [(self.low, self.at_low)], [(self.high, self.at_high)]
        for limit, *at in zip(limits, *(row[:-1] for row in table), strict=True):
            (lows if dropped + sum(at) >= self.k else highs).append((limit, at))
        (self.low, self.at_low), (self.high, self.at_high) = max(lows), min(highs)
        self.above = dropped + sum(self.at_high)
        as_expected = (self.low, self.high) == (least, most)
        self.exact = as_expected and all(row[-1] for row in table)
        if self.exact and between is not None:
            self.held = [between]
            self.at_low = [a - b for a, b in zip(self.at_low, self.at_high, strict=True)]
            self.at_high = [0] * len(self.at_low)

    def _limits(self) -> tuple[list[float], float, float]:
        """Limits to count at, ascending, and the two of them that should enclose the k-th highest value."""
        sample = np.sort(self.sample())[::-1]
        share = (self.k - self.above) / self.inside  # of the candidates that are at least the k-th highest
        center = share * len(sample)
        margin = 3 * sqrt(center * (1 - share)) + 1  # three standard deviations: one search in 400 takes a round more
        first, last = floor(center - margin), ceil(center + margin)
        if first < 0 and last >= len(sample) > 0:  # the sample is too small to estimate: any new limit helps
            first = last = min(int(center), len(sample) - 1)
        most = float(sample[first]) if first >= 0 else self.high
        least = float(sample[last]) if last < len(sample) else self.low
        limits = {least, most}
        for limit in (least, most):  # a frequent value, or one equal to the old limit, gets its own interval
            if limit == self.low or int((sample == limit).sum()) > 1:
                limits.add(_next(limit))
        if _next(least) in limits:
            least = min(_next(least), most)
        return sorted(limits), least, most

    def _count(self, limits: list[float], least: float, most: float) -> tuple[list[int], Tensor | None]:
        """Counts the held values that reach each limit.

        Returns:
            The counts, and the held values in [least, most), or None if there are more than `ROOM` of them.
        """
        counts, parts, room = [0] * len(limits), list[Tensor](), ROOM
        for piece in (piece for array in self.held for piece in pieces(array)):
            reached = [piece >= limit for limit in limits]
            counts = [n + how_many(mask) for n, mask in zip(counts, reached, strict=True)]
            if room >= 0:
                parts.append(torch.as_tensor(piece[reached[limits.index(least)] ^ reached[limits.index(most)]]))
                room -= len(parts[-1])
        between = torch.cat(parts) if parts else torch.zeros(0)
        return [int(n) for n in counts], between if room >= 0 else None

    def sample(self) -> NDArray[np.float32]:
        """Random candidates of all ranks, in proportion to their numbers; all candidates if at most `SAMPLE`. Collective."""
        own = [a - b for a, b in zip(self.at_low, self.at_high, strict=True)]
        wanted = SAMPLE if self._first is None else FIRST_SAMPLE
        sizes = own if self.inside <= SAMPLE else [ceil(min(wanted / self.inside, 1.0) * n) for n in own]
        me = collectives.rank()
        drawn = self._all() if self.inside <= SAMPLE else self._draw(sizes[me], own[me])
        mine = torch.full((sizes[me],), torch.nan)  # NaN fills up a rank that drew too few
        mine[: len(drawn)] = drawn
        bits = collectives.all_gather_uneven(mine.view(torch.int32), sizes, what="selection: sample")
        values: NDArray[np.float32] = bits.view(torch.float32).numpy()
        return values[~np.isnan(values)]

    def _all(self) -> Tensor:
        """All of this rank's candidates."""
        candidates = [p[(p >= self.low) & (p < self.high)] for array in self.held for p in pieces(array)]
        return torch.cat([torch.zeros(0), *(torch.as_tensor(p).cpu() for p in candidates)])

    def _draw(self, size: int, own: int) -> Tensor:
        """Draws `size` of this rank's `own` candidates at random; fewer if few of the held values are candidates."""
        ends = np.cumsum([0, *(len(array) for array in self.held)])
        draws = size if self.exact else min(DRAWS, ceil(1.5 * size * ends[-1] / max(own, 1)))
        draws = min(draws, ends[-1]) if size else 0
        # One position from each of `draws` equal stretches: ascending, so memory is read in order.
        positions = ((np.arange(draws) + self._random.random(draws)) * (ends[-1] / max(draws, 1))).astype(np.int64)
        parts = np.split(positions, np.searchsorted(positions, ends[1:-1]))
        taken = [_take(*arguments) for arguments in zip(self.held, parts, ends, strict=False) if len(arguments[1])]
        values = torch.cat([torch.zeros(0), *taken])
        if self.exact:
            return values
        values = values[(values >= self.low) & (values < self.high)]
        return values[torch.from_numpy(self._random.permutation(len(values))[:size])]


def _take(values: Tensor, positions: NDArray[np.int64], begin: int) -> Tensor:
    """Values on the CPU; `begin` is the position of the first element of `values`."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().take(positions - begin, mode="clip"))
    return values[torch.from_numpy(positions - begin).to(values.device)].cpu()


def _next(value: float) -> float:
    """The next higher float32; after 0 the smallest normal number if the process flushes denormal ones."""
    with np.errstate(all="ignore"):  # after the highest comes infinity, after 0 a denormal number
        after = float(np.nextafter(np.float32(value), np.float32(inf)))
    return after if after > value or value > 0 else float(np.finfo(np.float32).tiny)
