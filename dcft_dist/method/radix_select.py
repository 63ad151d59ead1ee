"""Finds the k-th highest score on a GPU without asking the host in between: radix selection.

A score's key is an integer of 32 bits that sorts as the score does. Three kernels make histograms of its digits (11, 11 and
10 bits), each over the keys that begin with the digits found so far. The histograms are summed over ranks, and torch finds
the next digit on the device. A fourth kernel packs the bits. The host waits twice: for the threshold, and for the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import collectives
from .bits import BLOCK, Packed, ScoreBlocks, num_bytes
from .kth_highest import NotFiniteError, Threshold
from .multipliers import is_fused

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits)
_BASE = 1 << 11


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

    def bits(self, names: list[str]) -> tuple[dict[str, Packed], list[int]]:
        """The bits of all scores that reach the threshold, and how many there are over all ranks. Waits once. Collective.

        Args:
            names: names of the weights, in the order of the scores.
        """
        sizes = [num_bytes(s.numel()) for s in self._scores.values()]
        octets = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        counts = torch.zeros(len(sizes), dtype=torch.int64, device=self._device)
        if self._blocks[2].numel():
            self._kernels.pack_above(self._blocks, self._places, self._key, octets, counts)
        counts = collectives.all_reduce(counts, what="selection: counts")
        both = torch.cat([counts.view(torch.uint8), octets]).cpu().numpy()  # one wait
        numbers, packed, end = both[: 8 * len(sizes)].view("int64").tolist(), {}, 8 * len(sizes)
        for name, size in zip(names, sizes, strict=True):
            packed[name], end = both[end : end + size], end + size
        return packed, numbers


def _score(key: int) -> float:
    """The score of a key."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])
