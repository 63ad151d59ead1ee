"""Levels of importance: to which of 256 quantiles of the whole model's scores a weight belongs. One byte for each weight.

The levels are exact, and the same for every number of ranks: a weight has the level floor(256 r / n), r being the number of
the n eligible weights with a lower composite rank (`selection`). All 255 cuts between levels are found at once, digit by
digit: a histogram of one digit, for each prefix that a cut has so far, is all-reduced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Shard
from ..engines.whole_tensors import whole_of
from ..errors import ScoreError
from .ranking import POSITION_BITS, POSITION_DIGITS, SCORE_DIGITS, Chunk, Ranking
from .scores import Scores, ScoreShard, read_shards, write_shards

LEVELS = 256


@dataclass(frozen=True)
class Levels:
    """The level of every eligible weight, spread over the ranks; what `levels_of` and `load_levels` return.

    Attributes:
        shapes: canonical name -> full shape of every eligible weight, in model order.
        shards: canonical name -> the cells that this rank owns, and their levels (uint8).
    """

    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, ScoreShard]

    def strengths(self) -> NDArray[np.float64]:
        """[256]: the strength of each level, (2 level + 1) / 256 divided by its mean over the eligible weights.

        So the mean over the eligible weights is 1, and the largest is about 2.
        """
        total = sum(prod(shape) for shape in self.shapes.values())
        strengths = (2 * np.arange(LEVELS) + 1) / LEVELS
        sizes = np.diff([-(-level * total // LEVELS) for level in range(LEVELS + 1)])
        return np.asarray(strengths / np.average(strengths, weights=sizes) if total else np.ones(LEVELS))

    def of(self, shards: dict[str, Shard]) -> dict[str, Tensor]:
        """The levels of all cells that this rank stores, also of those that other ranks own. Collective, weight by weight.

        Args:
            shards: the model's shards by name.

        Returns:
            Name -> uint8 tensor in the shape of the shard's `local`.
        """
        found = {}
        for name, shape in self.shapes.items():
            shard, own = shards[name], self.shards[name]
            if collectives.on_every_rank(shard.box.numel == own.box.numel):
                values = own.values
            else:  # each of several copies of a weight owns a part of it
                whole = whole_of(own.box, own.values, prod(shape), name)
                values = whole[shard.box.flat_index(0, shard.box.numel, whole.device)]
            found[name] = values.view(shard.local.shape)
        return found


def levels_of(scores: Scores) -> Levels:
    """Sorts the scores of all ranks into 256 levels of equal size. Collective.

    Args:
        scores: what `score_importance` or `load_scores` returned.

    Raises:
        ScoreError: some scores are NaN or infinite.
    """
    ranking = Ranking(scores)
    ranking.require_finite()
    total = scores.num_eligible
    above = [total - -(-level * total // LEVELS) for level in range(1, LEVELS)]  # cells of this level and of higher ones
    cuts = _Cuts(ranking, torch.tensor(above))
    levels: dict[str, list[Tensor]] = {name: [] for name in scores.shapes}
    for chunk in ranking.chunks():
        levels[chunk.name].append(cuts.below(chunk).to(torch.uint8))
    empty = torch.zeros(0, dtype=torch.uint8)
    shards = {
        name: ScoreShard(s.box, torch.cat([empty.to(s.values.device), *levels[name]])) for name, s in scores.shards.items()
    }
    return Levels(scores.shapes, shards)


class _Cuts:
    """Several cuts through the scores of the whole model, each between the `counts[j]` highest cells and all others.

    A cut is a score's key, and the lowest place among the cells with that key that is still above the cut.
    """

    def __init__(self, ranking: Ranking, counts: Tensor) -> None:
        """Finds the cuts. Collective.

        Args:
            ranking: the scores.
            counts: [cuts], int64, descending.
        """
        self._ranking = ranking
        keys, left, ties = torch.zeros_like(counts), counts, counts
        for shift, bits in SCORE_DIGITS:
            digit, left, ties = self._digit(keys, left, shift, bits, Chunk.key)
            keys = (keys << bits) | digit
        keys[counts == 0] = 1 << 32  # above every score
        self._tied = keys[(ties != left) & (counts > 0)].unique()  # keys with cells on both sides of a cut
        on_tie = torch.isin(keys, self._tied)
        places = torch.searchsorted(self._tied, keys[on_tie])  # number of the key, and then the digits of the place
        left = left[on_tie]
        for shift, bits in POSITION_DIGITS if len(places) else ():
            digit, left, _ = self._digit(places, left, shift, bits, self._place)
            places = (places << bits) | digit
        self._untied = keys[~on_tie].sort().values
        self._places = places.sort().values

    def below(self, chunk: Chunk) -> Tensor:
        """How many cuts each cell is above."""
        key = chunk.key()
        untied, tied, places = (t.to(key.device) for t in (self._untied, self._tied, self._places))
        number = torch.searchsorted(untied, key, right=True)
        if len(tied):
            above = torch.searchsorted(places >> POSITION_BITS, torch.searchsorted(tied, key))  # those with lower keys
            at = self._place(chunk)
            number += torch.where(at >= 0, torch.searchsorted(places, at, right=True), above)
        return number

    def _place(self, chunk: Chunk) -> Tensor:
        """The number of a cell's key among the tied ones, followed by its place; -1 for cells with other keys."""
        key = chunk.key()
        tied = self._tied.to(key.device)
        number = torch.searchsorted(tied, key).clamp_(max=max(len(tied) - 1, 0))
        return torch.where(tied[number] == key, (number << POSITION_BITS) | chunk.place(), -1)

    def _digit(
        self, prefixes: Tensor, left: Tensor, shift: int, bits: int, value_of: Callable[[Chunk], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next digit of each cut, how many cells with it are still to come, and how many have it. Collective."""
        known, slot = prefixes.unique(return_inverse=True)
        base = 1 << bits
        histogram = torch.zeros(len(known) * base, dtype=torch.int64)
        for chunk in self._ranking.chunks():
            value = value_of(chunk)
            here = known.to(value.device)
            prefix = value >> (shift + bits)
            number = torch.searchsorted(here, prefix).clamp_(max=len(here) - 1)
            match = here[number] == prefix
            cell = (number[match] << bits) | ((value[match] >> shift) & (base - 1))
            histogram += torch.bincount(cell, minlength=len(histogram)).cpu()
        rows = collectives.all_reduce(histogram, what="levels: histogram").view(len(known), base)[slot]
        from_top = rows.flip(1).cumsum(1).flip(1)
        digit = ((from_top >= left.unsqueeze(1)).sum(1) - 1).clamp_(min=0)
        with_digit = rows.gather(1, digit.unsqueeze(1)).squeeze(1)
        above = from_top.gather(1, digit.unsqueeze(1)).squeeze(1) - with_digit
        return digit, left - above, with_digit


# -- files -----------------------------------------------------------------------------------------------------------------


def save_levels(levels: Levels, path: str | os.PathLike[str]) -> None:
    """Writes the levels of all ranks to one safetensors file, one byte for each eligible weight. Collective.

    Args:
        levels: what `levels_of` returned.
        path: the file to write; an existing file is replaced.
    """
    write_shards(path, "U8", levels.shapes, levels.shards, {"levels": json.dumps(LEVELS)})


def load_levels(path: str | os.PathLike[str], model: nn.Module) -> Levels:
    """Reads levels that `save_levels` wrote. Each rank reads what it owns. Collective.

    Args:
        path: the file; it must be readable on every rank.
        model: the model, under any engine; its weights must have the names and shapes of the scored ones.

    Raises:
        ScoreError: the file is missing, damaged or altered, or the model has other weights.
    """
    number, shapes, shards = read_shards(path, model, "levels")
    if number != LEVELS:
        raise ScoreError(f"{path} has {number} levels, not {LEVELS}")
    return Levels(shapes, shards)
