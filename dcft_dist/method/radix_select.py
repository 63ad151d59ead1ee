"""Finds the k-th highest score on a GPU without asking the host in between: radix selection.

A score's key is an integer of 32 bits that sorts as the score does. Three kernels make histograms of its digits (11, 11 and
10 bits), each over the keys that begin with the digits found so far. The histograms are summed over ranks, and torch finds
the next digit on the device. A fourth kernel packs the bits, and lists the scores that equal the threshold if not all of
them are selected: among a billion scores that is the rule. The host waits twice: for the threshold, and for the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distributed import collectives
from .bits import BLOCK, Packed, ScoreBlocks, num_bytes
from .kth_highest import NotFiniteError, Threshold
from .multipliers import is_fused

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits)
_BASE = 1 << 11


FEW = 1 << 16  # up to so many scores of all ranks that equal the threshold, their positions are gathered: 512 KiB


def by_kernels(scores: list[Tensor]) -> bool:
    """Whether these scores can be selected by kernels; the same on every rank if all have the same kind of device."""
    return bool(scores) and scores[0].is_cuda and is_fused(scores[0], scores[0])


class RadixSelect:
    """A selection over the scores of all ranks, which are on GPUs."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        """
        Args:
            scores: name -> flat float32 scores on this rank, all on one device.
        """
        from . import kernels  # late: needs Triton

        self._kernels: Any = kernels
        self._scores = dict(scores)
        self._device = next(iter(scores.values())).device
        self._key = torch.zeros(1, dtype=torch.int64, device=self._device)
        sizes = [s.numel() for s in scores.values()]
        self._blocks, self._places = self._tables(sizes)
        self._packed: dict[str, Packed] = {}  # bits of the scores that reach the threshold
        self._numbers: list[int] = []  # how many there are over all ranks, by weight
        self._ties: dict[str, NDArray[np.int64]] = {}

    def _tables(self, sizes: list[int]) -> tuple[ScoreBlocks, Tensor]:
        """What kernels need to find the scores; and where the octets of each block begin."""
        entries = np.repeat(np.arange(len(sizes)), [-(-size // BLOCK) for size in sizes])
        firsts = np.concatenate([np.arange(0, size, BLOCK) for size in sizes])
        octets = np.array([num_bytes(size) for size in sizes])
        places = (octets.cumsum() - octets)[entries] + firsts // 8
        rows = [list(map(Tensor.data_ptr, self._scores.values())), sizes, entries, firsts, places]
        flat = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(self._device)  # one copy
        *blocks, last = flat.split([len(row) for row in rows])
        return (blocks[0], blocks[1], blocks[2], blocks[3]), last

    def kth_highest(self, k: int) -> Threshold:
        """The k-th highest score of all ranks. Collective; waits for the device once.

        Args:
            k: from 1 to the number of scores of all ranks.

        Raises:
            NotFiniteError: some scores are not finite, on any rank.
        """
        remaining = torch.full((1,), k, dtype=torch.int64, device=self._device)
        key, odd = torch.zeros_like(remaining), remaining
        histograms = torch.zeros(len(_DIGITS), _BASE, dtype=torch.int64, device=self._device)
        for number, (shift, bits) in enumerate(_DIGITS):
            counts = histograms[number]
            if self._blocks[2].numel():
                self._kernels.count_digits(self._blocks, key, counts, shift, bits)
            counts = collectives.all_reduce(counts, what="selection: histogram")
            if number == 0:  # exponents of ones only: infinite and NaN
                odd = counts[:4].sum(0, keepdim=True) + counts[-4:].sum(0, keepdim=True)
            from_top = counts.flip(0).cumsum(0).flip(0)  # keys with this digit or a higher one
            digit = (from_top >= remaining).sum(0, keepdim=True) - 1
            ties = counts.gather(0, digit)
            remaining = remaining - (from_top.gather(0, digit) - ties)
            key = (key << bits) | digit
        self._key = key
        found, selected, equal, wrong = torch.cat([key, remaining, ties, odd]).tolist()
        if wrong:
            raise NotFiniteError
        return Threshold(_score(found), k - selected, equal)

    def pack(self, ties: int) -> None:
        """Packs the bits of all scores that reach the threshold. Waits for the device once. Collective.

        Args:
            ties: number of scores of all ranks that equal the threshold, if not all of them are selected; otherwise 0.
        """
        sizes = [num_bytes(s.numel()) for s in self._scores.values()]
        octets = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        counts = torch.zeros(len(sizes), dtype=torch.int64, device=self._device)
        listed = torch.zeros(1 + ties if ties else 0, dtype=torch.int64, device=self._device)
        if self._blocks[2].numel():
            self._kernels.pack_above(self._blocks, self._places, self._key, octets, counts, listed if ties else None)
        counts = collectives.all_reduce(counts, what="selection: counts")
        all_three = torch.cat([counts.view(torch.uint8), listed.view(torch.uint8), octets]).cpu().numpy()  # one wait
        numbers, found, packed = np.split(all_three, np.cumsum([8 * len(counts), 8 * len(listed)]))
        self._numbers = numbers.view("int64").tolist()
        positions = found.view("int64")
        places = np.sort(positions[1 : 1 + positions[0]]) if ties else positions
        ends = np.cumsum([0, *sizes])
        for name, begin, end in zip(self._scores, ends, ends[1:], strict=False):
            self._packed[name] = packed[begin:end]
            if ties:
                self._ties[name] = places[slice(*np.searchsorted(places, [8 * begin, 8 * end]))] - 8 * begin

    def places(self, name: str) -> NDArray[np.int64] | None:
        """Positions of this rank's scores that equal the threshold, ascending; None if `pack` has not listed them."""
        return self._ties.get(name)

    def bits(self, ties: Mapping[str, int]) -> tuple[dict[str, Packed], list[int]] | None:
        """This rank's bits of what is selected, and how many there are over all ranks, by weight. Collective.

        Args:
            ties: of the scores that equal the threshold, those among so many first ones of a weight are selected.

        Returns:
            None if `pack` was not called.
        """
        if not self._packed:
            return None
        if not self._ties:  # all of them are selected
            return self._packed, self._numbers
        dropped = {name: places[places >= ties[name]] for name, places in self._ties.items()}
        for name, places in dropped.items():
            np.bitwise_and.at(self._packed[name], places >> 3, (~(1 << (places & 7))).astype(np.uint8))
        fewer = collectives.reduce_numbers([len(places) for places in dropped.values()], what="selection: ties left out")
        return self._packed, [n - int(less) for n, less in zip(self._numbers, fewer, strict=True)]


def _score(key: int) -> float:
    """The score of a key."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])
