"""Exact top-k over scores that are spread over ranks, without gathering them.

Every weight has a composite rank: first its score, then its canonical position (names in UTF-8 order, then flat index;
earlier is higher). Composite ranks are all different, so "the k highest" is one set, whatever the sharding.

Over the whole model, that cut is found by `threshold.kth_highest` in about one pass; where equal scores straddle it, the
position by a search in the one weight where it lies. Where each weight or magnitude bin has a cut of its own (`per_tensor`,
floor and cap, the random controls), all cuts are found at once, digit by digit from the top (radix selection): each rank
histograms one digit of its own weights that match the digits found so far, the histograms are all-reduced, and the digit of
the k-th is read off. Three digits (11 + 11 + 10 bits) hold the score: IEEE-754 bit patterns, mapped so that they sort as
integers. Five more of 11 bits hold the position and are needed only where equal scores straddle the k-th place.
"""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

from torch import Tensor

from ..errors import ScoreError, SelectionError, did_you_mean, listing
from .fundamental_set import FundamentalSet, SetInfo
from .ranking import Chunk, GlobalCut, Keep, Ranking, by_tensor
from .scores import Scores

Scope = Literal["global", "per_tensor"]


def select_fundamental(
    scores: Scores, fraction: float = 0.10, *, scope: Scope = "global", floor: float = 0.0, cap: float = 1.0
) -> FundamentalSet:
    """The exact set of the highest scores: k = round(fraction x eligible) of them (Python's round). Collective.

    Args:
        scores: from `score_importance`.
        fraction: share of the eligible weights to select, in [0, 1].
        scope: `global`: the k highest of the whole model. `per_tensor`: round(fraction x numel) of each tensor.
        floor, cap: at least / at most round(floor x numel) / round(cap x numel) of each tensor.

    Ties are decided by parameter name in UTF-8 order, then flat index, so that the set has exactly k members and is the
    same for every number of ranks. Extra memory is one bit for each owned weight, and less than 64 MiB.

    Raises:
        SelectionError: a fraction out of range, or a floor and cap that cannot be met together with k.
        ScoreError: NaN or infinite scores (naming the parameters), or no scores at all.
    """
    _check(scores, fraction, scope, floor, cap)
    ranking = Ranking(scores)
    ranking.require_finite()
    sizes = [prod(shape) for shape in scores.shapes.values()]
    selects, line = _chooser(ranking, sizes, fraction, scope, floor, cap)
    bits, counts = ranking.collect(selects)
    threshold = None
    if line is not None and any(counts.values()):
        threshold = line.value
    info = SetInfo(
        shapes=dict(scores.shapes),
        counts=counts,
        fraction=float(fraction),
        criterion=scores.criterion,
        scope=scope,
        threshold=threshold,
        head=scores.head,
        unscored=scores.unscored,
        frozen=scores.frozen,
        num_weights=scores.num_weights,
        extra={"floor": floor, "cap": cap, **scores.extra},
    )
    return FundamentalSet.from_pieces(info, bits)


def _check(scores: Scores, fraction: float, scope: str, floor: float, cap: float) -> None:
    if not isinstance(scores, Scores):
        raise SelectionError(f"scores must be what score_importance returns, not {type(scores).__name__}")
    if scope not in get_args(Scope):
        raise SelectionError(f"unknown scope {scope!r}{did_you_mean(scope, get_args(Scope))}; use 'global' or 'per_tensor'")
    for what, value in (("fraction", fraction), ("floor", floor), ("cap", cap)):
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise SelectionError(f"{what} must lie between 0 and 1, not {value}")
    if floor > cap:
        raise SelectionError(f"floor {floor} is above cap {cap}")
    if scores.num_eligible == 0:
        raise ScoreError("the score set is empty: there is nothing to select from")


def _chooser(
    ranking: Ranking, sizes: list[int], fraction: float, scope: str, floor: float, cap: float
) -> tuple[Keep, GlobalCut | None]:
    """What decides whether a cell is selected, and the cut of the whole model where there is one."""
    low, high = [round(floor * n) for n in sizes], [round(cap * n) for n in sizes]
    if scope == "per_tensor":
        wanted = [round(fraction * n) for n in sizes]
        bad = [name for name, a, k, b in zip(ranking.names, low, wanted, high, strict=True) if not a <= k <= b]
        if bad:
            raise SelectionError(f"fraction {fraction} per tensor is outside floor {floor} and cap {cap} in {listing(bad)}")
        per_tensor = ranking.cut(wanted, by_tensor)
        return lambda chunk: per_tensor.selects(chunk, by_tensor(chunk)), None
    total = round(fraction * sum(sizes))
    if not sum(low) <= total <= sum(high):
        raise SelectionError(
            f"fraction {fraction} selects {total} weights, but floor {floor} and cap {cap} per tensor allow only "
            f"{sum(low)} to {sum(high)}"
        )
    if sum(low) == 0 and sum(high) == sum(sizes):
        line = ranking.line(total)
        return line.selects, line
    must, may = ranking.cut(low, by_tensor), ranking.cut(high, by_tensor)

    def contested(chunk: Chunk) -> Tensor:
        group = by_tensor(chunk)
        return may.selects(chunk, group) & ~must.selects(chunk, group)

    cut = ranking.cut([total - sum(low)], keep=contested)
    return lambda chunk: must.selects(chunk, by_tensor(chunk)) | (contested(chunk) & cut.selects(chunk)), None
