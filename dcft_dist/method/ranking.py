"""Finds exact cuts through scores that are spread over ranks, without gathering the scores.

`selection` explains the composite rank of a weight and how the cuts are found. A cell is one element of a weight. The
position of a cell (canonical position) counts the elements of all weights, in UTF-8 order of the names, then by flat index.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distributed import collectives
from ..engines.box import Box
from ..errors import ScoreError, listing
from .bits import CHUNK, Packed, num_bytes, pack, popcount, step_of
from .first_pass import FirstPass
from .kth_highest import SAMPLE, NotFiniteError, Threshold, comparable, how_many, is_finite, kth_highest, pieces
from .radix_select import FEW, RadixSelect, by_kernels
from .scores import Scores, ScoreShard

Keep = Callable[["Chunk"], Tensor]  # boolean mask of the cells of a chunk that take part


Group = Callable[["Chunk"], Tensor]  # the group of each cell of a chunk (int64)


FAN = 64  # positions tried at once if the cut goes through equal scores


SCORE_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the digits of the 32-bit score key


POSITION_BITS = 55


POSITION_DIGITS = ((44, 11), (33, 11), (22, 11), (11, 11), (0, 11))


@dataclass(frozen=True)
class Chunk:
    """Consecutive cells of one score shard.

    Attributes:
        tensor: number of the weight, in model order.
        name: canonical name of the weight.
        begin, end: range of the shard's cells.
        shard: this rank's scores of the weight.
        base: canonical position of the weight's first element.
    """

    tensor: int
    name: str
    begin: int
    end: int
    shard: ScoreShard
    base: int

    @property
    def values(self) -> Tensor:
        """Scores of the cells, flat float32."""
        return self.shard.values[self.begin : self.end]

    def key(self) -> Tensor:
        """Scores as integers in [0, 2^32) with the same order; -0.0 and 0.0 get the same integer."""
        bits = (self.values + 0.0).view(torch.int32).to(torch.int64)
        return torch.where(bits >= 0, bits + (1 << 31), ~bits & 0x7FFFFFFF)

    def place(self) -> Tensor:
        """Canonical positions, counted backwards: an earlier cell has the larger value."""
        index = self.shard.box.flat_index(self.begin, self.end, self.shard.values.device)
        return (1 << POSITION_BITS) - 1 - (index + self.base)


@dataclass(frozen=True)
class Cut:
    """Selects, in each group, the cells with a (key, place) of at least that of the group's lowest selected cell.

    Attributes:
        key: per group the lowest selected score key (`Chunk.key`).
        place: per group the lowest selected place (`Chunk.place`) among cells with that key; 0 selects all of them.
    """

    key: Tensor
    place: Tensor

    def selects(self, chunk: Chunk, group: Tensor | None = None) -> Tensor:
        """Boolean mask of the selected cells; `group` is the group of each cell (None: group 0)."""
        key = chunk.key()
        limit, lowest_place = (self.key[0], self.place[0]) if group is None else (self.key[group], self.place[group])
        chosen = key >= limit
        if bool((lowest_place > 0).any()):
            chosen &= (key > limit) | (chunk.place() >= lowest_place)
        return chosen


@dataclass(frozen=True)
class GlobalCut:
    """The cut through the whole model.

    Selects the scores above `value`, and the scores equal to `value` at canonical positions before `end`.
    """

    value: float
    end: int

    def selects(self, chunk: Chunk) -> Tensor:
        """Boolean mask of the selected cells."""
        ties = min(max(chunk.shard.box.num_before(self.end - chunk.base) - chunk.begin, 0), chunk.end - chunk.begin)
        values = comparable(chunk.values)
        if ties == len(values):
            return torch.as_tensor(values >= self.value)
        chosen = values > self.value
        chosen[:ties] |= values[:ties] == self.value
        return torch.as_tensor(chosen)


class Ties:
    """The cells of one shard that have a certain score.

    Attributes:
        number: how many there are.
    """

    def __init__(self, values: Tensor, value: float, places: NDArray[np.int64] | None) -> None:
        """
        Args:
            values: the scores.
            value: the score.
            places: their positions, ascending, if they are known; None: the scores are read.
        """
        self._values, self._value, self._places = values, value, places
        in_pieces = [int(how_many(v == value)) for v in pieces(values)] if places is None else []
        self._in_pieces = in_pieces
        self.number = sum(in_pieces) if places is None else len(places)

    def before(self, cells: int) -> int:
        """Number of them among the first `cells` cells."""
        if self._places is not None:
            return int(np.searchsorted(self._places, cells))
        step = step_of(self._values.device)
        whole = cells // step
        rest = sum(how_many(v == self._value) for v in pieces(self._values[whole * step : cells]))
        return sum(self._in_pieces[:whole]) + int(rest)

    def cells(self) -> NDArray[np.int64]:
        """Their positions, ascending."""
        if self._places is not None:
            return self._places
        step, found = step_of(self._values.device), [np.zeros(0, np.int64)]
        for i, count in enumerate(self._in_pieces):
            if count:
                piece = self._values[i * step : (i + 1) * step]
                found.append(((piece == self._value).nonzero().view(-1) + i * step).cpu().numpy())
        return np.concatenate(found)


def by_tensor(chunk: Chunk) -> Tensor:
    """A `Group` with one group per weight."""
    return torch.full((chunk.end - chunk.begin,), chunk.tensor, dtype=torch.int64, device=chunk.shard.values.device)


class Ranking:
    """The composite ranks of all scores: access to this rank's cells in chunks, and collective selection."""

    def __init__(self, scores: Scores) -> None:
        self.names = list(scores.shapes)
        self._shards = scores.shards
        self._base: dict[str, int] = {}
        position = 0
        for name in sorted(self.names, key=lambda n: n.encode()):
            self._base[name] = position
            position += prod(scores.shapes[name])
        self._total = position
        self._first: FirstPass | None = None
        self._radix: RadixSelect | None = None
        self._device = next((s.values.device for s in scores.shards.values()), torch.device("cpu"))

    def chunks(self) -> Iterator[Chunk]:
        """This rank's cells, in model order."""
        for tensor, name in enumerate(self.names):
            shard = self._shards[name]
            for begin in range(0, shard.box.numel, CHUNK):
                yield Chunk(tensor, name, begin, min(begin + CHUNK, shard.box.numel), shard, self._base[name])

    def require_finite(self) -> None:
        """Checks that all scores are finite. Collective.

        Raises:
            ScoreError: some scores are NaN or infinite.
        """
        values = [self._shards[name].values for name in self.names]
        finite = [sum(how_many(is_finite(part)) for part in pieces(v)) for v in values]
        bad = torch.tensor([v.numel() - int(n) for v, n in zip(values, finite, strict=True)], dtype=torch.int64)
        bad = collectives.all_reduce(bad, what="selection: finite scores")
        if bad.any():
            bad_names = [f"{name} ({n})" for name, n in zip(self.names, bad.tolist(), strict=True) if n]
            raise ScoreError(
                f"scores are NaN or infinite in {listing(bad_names)}: lower the learning rate or check the data"
            )

    def line(self, k: int) -> GlobalCut:
        """The cut that selects exactly the k highest scores of the whole model. Collective.

        Raises:
            ScoreError: some scores are NaN or infinite.
        """
        if k == 0:
            self.require_finite()
            return GlobalCut(torch.inf, 0)
        values = {name: self._shards[name].values for name in self.names}
        try:
            kth = self._kth_highest(values, k)
        except NotFiniteError:
            self.require_finite()  # says where
            raise
        selected = k - kth.above  # of the cells equal to the k-th highest
        if self._radix is not None and (selected == kth.ties or kth.ties <= FEW):
            self._radix.pack(0 if selected == kth.ties else kth.ties)
        return GlobalCut(kth.value, self._total if selected == kth.ties else self._end(kth.value, selected, kth.ties))

    def _kth_highest(self, values: dict[str, Tensor], k: int) -> Threshold:
        if by_kernels(list(values.values())):
            self._radix = RadixSelect(values)
            return self._radix.kth_highest(k)
        if self._total <= SAMPLE or self._device.type != "cpu":
            self.require_finite()
            return kth_highest(list(values.values()), k)
        self._first = FirstPass(values)
        return kth_highest(list(values.values()), k, self._first)

    def _end(self, value: float, selected: int, total: int) -> int:
        """Position that has exactly `selected` of the `total` cells with this score before it. Collective."""
        ties = {name: self._ties(name, value) for name in self.names}
        if total <= FEW:
            return int(np.partition(self._positions(ties), selected - 1)[selected - 1]) + 1
        table = torch.tensor([ties[name].number for name in self._base], dtype=torch.int64)
        sums = collectives.all_reduce(table, what="selection: ties").cumsum(0).tolist()
        at = bisect_left(sums, selected)
        name, selected = list(self._base)[at], selected - (sums[at - 1] if at else 0)
        box = self._shards[name].box
        low, high = 0, prod(box.grid)  # fewer than `selected` ties before `low`, at least as many before `high`
        while high - low > 1:
            indices = sorted({low + (high - low) * i // FAN for i in range(1, FAN)} - {low})
            table = torch.tensor([ties[name].before(box.num_before(flat)) for flat in indices], dtype=torch.int64)
            at = bisect_left(collectives.all_reduce(table, what="selection: position of a tie").tolist(), selected)
            low, high = [low, *indices][at], [*indices, high][at]
        return self._base[name] + high

    def _ties(self, name: str, value: float) -> Ties:
        """The cells of a weight with this score, on this rank."""
        kept = self._first.places(name, value) if self._first is not None else None
        kept = self._radix.places(name) if self._radix is not None else kept
        return Ties(self._shards[name].values, value, kept)

    def _positions(self, ties: dict[str, Ties]) -> NDArray[np.int64]:
        """Positions of the cells with this score, of all ranks. Collective."""
        own = [self._shards[n].box.flat_indices(found.cells()) + self._base[n] for n, found in ties.items() if found.number]
        mine = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *own]))
        sizes = [n for (n,) in collectives.all_gather_ints([len(mine)], what="selection: ties")]
        positions: NDArray[np.int64] = collectives.all_gather_uneven(
            mine, sizes, what="selection: positions of ties"
        ).numpy()
        return positions

    def cut(self, counts: Sequence[int], group: Group | None = None, keep: Keep | None = None) -> Cut:
        """The cut that selects exactly `counts[g]` cells in each group g. Collective.

        Args:
            counts: number of cells to select in each group, at most the number of cells of the group.
            group: returns the group of each cell; None puts all cells into group 0.
            keep: returns which cells take part; None for all.
        """
        remaining = torch.tensor(list(counts), dtype=torch.int64, device=self._device)
        empty = remaining == 0
        key, ties = torch.zeros_like(remaining), torch.zeros_like(remaining)
        for shift, bits in SCORE_DIGITS:
            digit, remaining, ties = self._digit(key, None, shift, bits, remaining, group, keep)
            key = (key << bits) | digit
        place = torch.zeros_like(key)
        if bool(((ties != remaining) & ~empty).any()):
            for shift, bits in POSITION_DIGITS:
                digit, remaining, _ = self._digit(key, place, shift, bits, remaining, group, keep)
                place = (place << bits) | digit
        key[empty] = 1 << 32  # above every score
        return Cut(key, place)

    def _digit(
        self,
        key: Tensor,
        place: Tensor | None,
        shift: int,
        bits: int,
        remaining: Tensor,
        group: Group | None,
        keep: Keep | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds the next digit of the cut in each group, of the key or, if `place` is set, of the place. Collective.

        Returns:
            The digit, the number of cells with this digit that are still to select, and the number of cells with it.
        """
        base = 1 << bits
        histogram = torch.zeros(len(key) * base, dtype=torch.int64, device=self._device)
        for chunk in self.chunks():
            value = chunk.key() if place is None else chunk.place()
            groups = group(chunk) if group else None
            prefix = key if place is None else place
            expected = prefix[0] if groups is None else prefix[groups]
            match = (value >> (shift + bits)) == expected
            if place is not None:
                match &= chunk.key() == (key[0] if groups is None else key[groups])
            if keep is not None:
                match &= keep(chunk)
            slot = (value >> shift) & (base - 1)
            if groups is not None:
                slot += groups * base
            histogram += torch.bincount(slot[match], minlength=len(histogram))
        histogram = collectives.all_reduce(histogram, what="selection: histogram").view(len(key), base)
        from_top = histogram.flip(1).cumsum(1).flip(1)  # cells with this digit or a higher one
        digit = ((from_top >= remaining.unsqueeze(1)).sum(1) - 1).clamp_(min=0)
        with_digit = histogram.gather(1, digit.unsqueeze(1)).squeeze(1)
        above = from_top.gather(1, digit.unsqueeze(1)).squeeze(1) - with_digit
        return digit, remaining - above, with_digit

    def count(self, keep: Keep, group: Group, num_groups: int) -> list[int]:
        """Number of cells of each group, over all ranks, for which `keep` is True. Collective."""
        counts = torch.zeros(num_groups, dtype=torch.int64, device=self._device)
        for chunk in self.chunks():
            counts += torch.bincount(group(chunk)[keep(chunk)], minlength=num_groups)
        return [int(n) for n in collectives.all_reduce(counts, what="selection: counts").tolist()]

    def collect(self, selects: Keep) -> tuple[dict[str, tuple[Box, Packed]], dict[str, int]]:
        """Packs the selection of this rank, and counts it over all ranks. Collective.

        Args:
            selects: returns the boolean mask of the selected cells of a chunk.

        Returns:
            By name: this rank's owned box and its packed bits; and the number of selected cells over all ranks.
        """
        packed = {name: np.empty(num_bytes(self._shards[name].box.numel), dtype=np.uint8) for name in self.names}
        for chunk in self.chunks():  # chunks start at multiples of 8
            packed[chunk.name][chunk.begin // 8 : num_bytes(chunk.end)] = pack(selects(chunk))
        return self._with_counts({name: (bits, popcount(bits)) for name, bits in packed.items()})

    def collect_line(self, line: GlobalCut) -> tuple[dict[str, tuple[Box, Packed]], dict[str, int]]:
        """`collect` for the cut that `line` has found, without another pass over the scores if it can be. Collective."""
        boxes = {name: self._shards[name].box for name in self.names}
        ties = {name: box.num_before(line.end - self._base[name]) for name, box in boxes.items()}
        if self._radix is not None and (known := self._radix.bits(ties)) is not None:
            octets, numbers = known
            return {name: (boxes[name], octets[name]) for name in self.names}, dict(zip(self.names, numbers, strict=True))
        if self._first is not None:
            kept = {name: self._first.bits(name, line.value, ties[name]) for name in self.names}
            found = {name: bits for name, bits in kept.items() if bits is not None}
            if len(found) == len(self.names):
                return self._with_counts(found)
        return self.collect(line.selects)

    def _with_counts(self, packed: dict[str, tuple[Packed, int]]) -> tuple[dict[str, tuple[Box, Packed]], dict[str, int]]:
        """This rank's bits with their boxes, and how many are set over all ranks; by name. Collective."""
        counts = torch.tensor([packed[name][1] for name in self.names], dtype=torch.int64)
        counts = collectives.all_reduce(counts, what="selection: counts")
        bits = {name: (self._shards[name].box, packed[name][0]) for name in self.names}
        return bits, dict(zip(self.names, [int(n) for n in counts.tolist()], strict=True))
