"""One pass over scores on a CPU that does everything: checks, counts, keeps candidates with their places, and packs bits.

Memory is what a selection waits for, so each piece of the scores is read from it once and stays in the cache meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bits import STEP, Packed, num_bytes, popcount

ROOM = 1 << 22  # candidates that a rank keeps at most: 48 MiB with their places


@dataclass(frozen=True)
class _Kept:
    """The candidates of one weight.

    Attributes:
        octets: positions of the octets that have candidates, ascending.
        bits: positions of the candidates among all bits of these octets, ascending.
        scores: their scores.
    """

    octets: NDArray[np.int64]
    bits: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def places(self) -> NDArray[np.int64]:
        """Positions of the candidates among all scores of the weight."""
        places: NDArray[np.int64] = self.octets[self.bits >> 3] * 8 + (self.bits & 7)
        return places


class FirstPass:
    """The pass over one rank's scores. It is made by `count`; what it has kept is read by `places` and `bits`.

    Attributes:
        finite: whether all scores are finite.
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        """
        Args:
            scores: name -> flat float32 scores on the CPU.
        """
        self._scores = scores
        self.finite = True
        self._packed: dict[str, Packed] = {}  # bits of the scores that reach the upper limit
        self._above: dict[str, int] = {}  # how many these are
        self._kept: dict[str, _Kept] = {}
        self._room = ROOM
        self._limits = np.inf, -np.inf

    def count(self, limits: Sequence[float], least: float, most: float) -> tuple[list[int], Tensor | None]:
        """Makes the pass.

        Args:
            limits: which values to count at.
            least, most: two of them; scores in [least, most) are candidates.

        Returns:
            How many scores reach each limit, and the candidates, or None if they are too many.
        """
        self._limits = least, most
        counts = dict.fromkeys(limits, 0)
        others = [limit for limit in counts if limit not in (least, most)]
        reached = np.empty(STEP["cpu"], dtype=bool)
        lows = np.empty(num_bytes(max((len(scores) for scores in self._scores.values()), default=0)), dtype=np.uint8)
        for name, tensor in self._scores.items():
            scores = tensor.numpy()
            high, low = np.empty(num_bytes(len(scores)), dtype=np.uint8), lows[: num_bytes(len(scores))]
            for begin in range(0, len(scores), STEP["cpu"]):
                piece = scores[begin : begin + STEP["cpu"]]
                with np.errstate(all="ignore"):  # squares may overflow
                    suspect = not np.isfinite(np.dot(piece, piece))
                if suspect and not np.isfinite(piece).all():
                    self.finite = False
                octets = slice(begin // 8, num_bytes(begin + len(piece)))
                for limit, packed in ((most, high), (least, low)):
                    mask = np.greater_equal(piece, limit, out=reached[: len(piece)])
                    packed[octets] = np.packbits(mask, bitorder="little")
                for limit in others:
                    counts[limit] += int(np.count_nonzero(piece >= limit))
            self._packed[name], self._above[name] = high, popcount(high)
            counts[most] += self._above[name]
            number = self._keep(name, scores, np.bitwise_xor(low, high, out=low))
            if least != most:
                counts[least] += self._above[name] + number
        kept = [kept.scores for kept in self._kept.values()]
        candidates = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *kept])) if self._room >= 0 else None
        return [counts[limit] for limit in limits], candidates

    def _keep(self, name: str, scores: NDArray[np.float32], between: Packed) -> int:
        """Keeps the candidates of a weight, those with a bit in `between`, if there is room. Returns how many there are."""
        has_bits = between != 0
        if np.count_nonzero(has_bits) > self._room:
            self._room = -1
            return popcount(between)
        octets = np.flatnonzero(has_bits)
        flags = np.unpackbits(between[octets], bitorder="little").view(np.bool_)
        number = int(np.count_nonzero(flags))
        self._room -= number
        if self._room >= 0:
            bits = np.flatnonzero(flags)
            self._kept[name] = _Kept(octets, bits, scores[octets[bits >> 3] * 8 + (bits & 7)])
        return number

    def _has(self, value: float) -> bool:
        """Whether all scores that equal this one were kept."""
        least, most = self._limits
        return self._room >= 0 and least <= value < most

    def places(self, name: str, value: float) -> NDArray[np.int64] | None:
        """Positions of the scores that equal `value`, ascending; None if the pass did not keep them."""
        if not self._has(value):
            return None
        kept = self._kept[name]
        equal: NDArray[np.int64] = kept.places[kept.scores == value]
        return equal

    def bits(self, name: str, value: float, ties: int) -> tuple[Packed, int] | None:
        """Packed bits of the scores above `value`, and of those equal to it among the first `ties` scores of the weight.

        Call it once for each weight: it gives away the bits.

        Returns:
            The bits, and how many are set; None if the pass did not keep what is needed.
        """
        if not self._has(value):
            return None
        packed, kept = self._packed.pop(name), self._kept[name]
        chosen = kept.scores > value
        chosen |= (kept.scores == value) & (kept.places < ties)
        flags = np.zeros(8 * len(kept.octets), dtype=bool)
        flags[kept.bits] = chosen
        packed[kept.octets] |= np.packbits(flags, bitorder="little")
        return packed, self._above[name] + int(np.count_nonzero(chosen))
