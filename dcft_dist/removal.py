"""The removal check: the paper's definition of a fundamental weight, tested against controls.

Sets of weights are set to zero and the validation loss is measured. Beside the highest-scored set there are random sets
(`random`), random sets with as many weights in each tensor (`random_tensor`), and in each tensor and magnitude bin
(`random_magnitude`), and the lowest-scored set (`lowest`). A magnitude bin is a quarter of an octave of |w|: the float's
exponent and the first two bits of its mantissa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import collectives
from .bits import cut, unpack
from .engines import find_engine
from .errors import ScoreError
from .fundamental import FundamentalSet
from .importance import Scores, ScoreShard, score_importance
from .selection import Chunk, Ranking, by_tensor, select_fundamental

Evaluate = Callable[[], Mapping[str, float]]
_BINS = 1024  # float32 >> 21, without the sign


def check_removal(
    model: nn.Module, scores: Scores, fractions: Sequence[float], evaluate: Evaluate, seed: int
) -> dict[str, Any]:
    """Validation metrics with each set removed. Collective.

    Args:
        model: the model that was scored; its weights are put back after each removal.
        scores: of `score_importance`, with the same sharding.
        fractions: shares of the eligible weights to remove.
        evaluate: returns the validation metrics of the model as it is, the same on every rank.
        seed: of the random sets.

    Returns:
        {"base": metrics, "removed": [{"set", "fraction", "num_removed", **metrics}]}.
    """
    rows = []
    for fraction in fractions:
        for kind, chosen in _sets(model, scores, fraction, seed).items():
            with removed(model, chosen):
                rows.append({"set": kind, "fraction": fraction, "num_removed": chosen.num_selected, **evaluate()})
    return {"base": dict(evaluate()), "removed": rows}


def _sets(model: nn.Module, scores: Scores, fraction: float, seed: int) -> dict[str, FundamentalSet]:
    top = select_fundamental(scores, fraction)
    noise = score_importance(
        model, None, None, head=scores.head, criterion="random", eligible=list(scores.shapes), seed=seed
    )
    upside_down = {n: ScoreShard(s.box, -s.values) for n, s in scores.shards.items()}
    return {
        "top": top,
        "random": select_fundamental(noise, fraction),
        "random_tensor": matched_per_tensor(noise, top),
        "random_magnitude": matched_per_magnitude(model, noise, top),
        "lowest": select_fundamental(replace(scores, shards=upside_down), fraction),
    }


def matched_per_tensor(noise: Scores, like: FundamentalSet) -> FundamentalSet:
    """A random set with as many weights in each tensor as `like`. `noise`: random scores. Collective."""
    cut_ = Ranking(noise).cut([like.info.counts[name] for name in noise.shapes], by_tensor)
    return _as_set(noise, like, lambda chunk: cut_.selects(chunk, by_tensor(chunk)))


def matched_per_magnitude(model: nn.Module, noise: Scores, like: FundamentalSet) -> FundamentalSet:
    """A random set with as many weights as `like` in each tensor and magnitude bin. Collective, tensor by tensor."""
    shards = {s.name: s for s in find_engine(model).shards()}
    pieces, counts = {}, {}
    for name, shape in noise.shapes.items():
        one = replace(noise, shapes={name: shape}, shards={name: noise.shards[name]})
        weights = shards[name].local.detach().reshape(-1)[slice(*shards[name].owned)]
        bins = weights.float().abs().view(torch.int32).to(torch.int64) >> 21
        mask = unpack(cut(like.packed(name), shards[name].owned_box), len(bins)).to(bins.device)
        ranking = Ranking(one)
        present = collectives.all_reduce(torch.bincount(bins, minlength=_BINS), what="magnitude bins")
        dense = torch.cumsum(present > 0, 0) - 1  # only bins that occur get a group
        groups = dense[bins]

        def group(chunk: Chunk, groups: Tensor = groups) -> Tensor:
            return groups[chunk.begin : chunk.end]

        def chosen(chunk: Chunk, mask: Tensor = mask) -> Tensor:
            return mask[chunk.begin : chunk.end]

        wanted = ranking.count(chosen, group, int(dense[-1]) + 1)
        limit = ranking.cut(wanted, group)
        piece, count = ranking.collect(lambda chunk, limit=limit, group=group: limit.selects(chunk, group(chunk)))  # type: ignore[misc]
        pieces.update(piece)
        counts.update(count)
    return FundamentalSet.from_pieces(replace(like.info, criterion="random", counts=counts, threshold=None), pieces)


def _as_set(noise: Scores, like: FundamentalSet, selects: Callable[[Chunk], Tensor]) -> FundamentalSet:
    pieces, counts = Ranking(noise).collect(selects)
    return FundamentalSet.from_pieces(replace(like.info, criterion="random", counts=counts, threshold=None), pieces)


@contextmanager
def removed(model: nn.Module, chosen: FundamentalSet) -> Iterator[None]:
    """The model with the chosen weights set to zero; the weights are put back bit by bit afterwards. Collective."""
    engine, kept = find_engine(model), []
    for shard in engine.shards():
        if shard.name in chosen.info.shapes:
            if not shard.local.is_contiguous():
                raise ScoreError(f"{shard.name} is not contiguous in memory: its weights cannot be removed one by one")
            flat = shard.local.detach().view(-1)
            index = unpack(cut(chosen.packed(shard.name), shard.box), flat.numel()).nonzero().view(-1).to(flat.device)
            kept.append((flat, index, flat[index]))
    try:
        for flat, index, _ in kept:
            flat[index] = 0.0
        engine.publish()
        yield
    finally:
        for flat, index, values in kept:
            flat[index] = values
        engine.publish()
