"""Control sets: sets with as many weights as a fundamental set, but chosen in another way.

A magnitude bin is a quarter of an octave of |w|: the exponent of the float and the first two bits of its mantissa.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.whole_tensors import whole_of, whole_weight
from ..errors import SelectionError, did_you_mean
from ..method.fundamental_set import FundamentalSet
from ..method.importance import score_importance
from ..method.levels import Levels
from ..method.ranking import Chunk, Ranking, by_tensor
from ..method.scores import Scores, ScoreShard
from ..method.selection import select_fundamental

KINDS = ("top", "random", "random_tensor", "random_magnitude", "lowest")


_BINS = 1024  # values of (float32 bits >> 21), without the sign


def control_set(model: nn.Module, scores: Scores, top: FundamentalSet, kind: str, seed: int) -> FundamentalSet:
    """Returns a control set with as many weights as `top`. Collective.

    Args:
        model: the model that was scored.
        scores: the scores that `top` was selected from.
        top: the fundamental set.
        kind: which set.

            - "top": `top` itself.
            - "random": random eligible weights.
            - "random_tensor": random, with as many weights in each tensor as `top`.
            - "random_magnitude": random, with as many weights in each tensor and magnitude bin as `top`.
            - "lowest": the weights with the lowest scores.
        seed: seed of the random sets.

    Raises:
        SelectionError: no control set has this name.
    """
    if kind not in KINDS:
        raise SelectionError(f"unknown control set {kind!r}{did_you_mean(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    if kind == "top":
        return top
    fraction = top.num_selected / top.num_eligible
    if kind == "lowest":
        negated = {n: ScoreShard(s.box, -s.values) for n, s in scores.shards.items()}
        return select_fundamental(replace(scores, shards=negated), fraction)
    noise = score_importance(
        model, None, None, head=scores.head, criterion="random", eligible=list(scores.shapes), seed=seed
    )
    if kind == "random":
        return select_fundamental(noise, fraction)
    if kind == "random_tensor":
        return matched_per_tensor(noise, top)
    return matched_per_magnitude(model, noise, top)


def matched_per_tensor(noise: Scores, like: FundamentalSet) -> FundamentalSet:
    """A random set with as many weights in each tensor as `like`. Collective.

    Args:
        noise: random scores of the eligible weights.
        like: the set to match.
    """
    limit = Ranking(noise).cut([like.info.counts[name] for name in noise.shapes], by_tensor)
    return _as_set(noise, like, lambda chunk: limit.selects(chunk, by_tensor(chunk)))


def matched_per_magnitude(model: nn.Module, noise: Scores, like: FundamentalSet) -> FundamentalSet:
    """A random set with as many weights as `like` in each tensor and magnitude bin. Collective, tensor by tensor.

    Args:
        model: the model that was scored; its weights give the magnitudes.
        noise: random scores of the eligible weights.
        like: the set to match.
    """
    shards = {s.name: s for s in find_engine(model).shards()}
    pieces, counts = {}, {}
    for name, shape in noise.shapes.items():
        tensor_noise = replace(noise, shapes={name: shape}, shards={name: noise.shards[name]})
        weights = shards[name].local.detach().reshape(-1)[slice(*shards[name].owned)]
        bins = _magnitude_bins(weights)
        mask = like.mask_in(name, shards[name].owned_box).to(bins.device)
        ranking = Ranking(tensor_noise)
        present = collectives.all_reduce(torch.bincount(bins, minlength=_BINS), what="magnitude bins")
        group_of_bin = torch.cumsum(present > 0, 0) - 1  # only bins that occur get a group
        groups = group_of_bin[bins]

        def group(chunk: Chunk, groups: Tensor = groups) -> Tensor:
            return groups[chunk.begin : chunk.end]

        def chosen(chunk: Chunk, mask: Tensor = mask) -> Tensor:
            return mask[chunk.begin : chunk.end]

        group_counts = ranking.count(chosen, group, int(group_of_bin[-1]) + 1)
        limit = ranking.cut(group_counts, group)
        piece, count = ranking.collect(lambda chunk, limit=limit, group=group: limit.selects(chunk, group(chunk)))  # type: ignore[misc]
        pieces.update(piece)
        counts.update(count)
    return FundamentalSet.from_pieces(replace(like.info, criterion="random", counts=counts, threshold=None), pieces)


@torch.no_grad()
def permuted_levels(model: nn.Module, levels: Levels, seed: int) -> Levels:
    """The same levels, permuted among the weights of each tensor and magnitude bin. Collective, tensor by tensor.

    Each rank needs about forty bytes for each weight of the largest tensor. The result does not depend on the number of
    ranks.

    Args:
        model: the model that was scored; its weights give the magnitudes.
        levels: what `levels_of` returned.
        seed: seed of the permutation.
    """
    shards, permuted = {s.name: s for s in find_engine(model).shards()}, {}
    for number, (name, shape) in enumerate(levels.shapes.items()):
        shard, own = shards[name], levels.shards[name]
        weights = whole_weight(shard, shard.local.detach().float())
        before = whole_of(own.box, own.values, prod(shape), name).cpu()
        bins = _magnitude_bins(weights).cpu()
        draw = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        random = torch.randint(0, 1 << 40, bins.shape, generator=draw).add_(bins << 40)
        drawn = before[random.argsort()]  # by bin, in random order within each
        after = torch.empty_like(before)
        after[bins.argsort(stable=True)] = drawn
        index = own.box.flat_index(0, own.box.numel)
        permuted[name] = ScoreShard(own.box, after[index].to(own.values.device))
    return Levels(levels.shapes, permuted)


def _magnitude_bins(weights: Tensor) -> Tensor:
    return weights.float().abs().view(torch.int32).to(torch.int64) >> 21


def _as_set(noise: Scores, like: FundamentalSet, selects: Callable[[Chunk], Tensor]) -> FundamentalSet:
    pieces, counts = Ranking(noise).collect(selects)
    return FundamentalSet.from_pieces(replace(like.info, criterion="random", counts=counts, threshold=None), pieces)
