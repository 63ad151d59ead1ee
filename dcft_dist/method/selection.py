"""Selects the exact k highest scores, which are spread over ranks, without gathering them.

Every element of a weight has a composite rank: first its score, then its canonical position. Positions follow the parameter
names in UTF-8 order, then the flat index; an earlier element ranks higher. All composite ranks differ. The k highest are
therefore one unique set, for every sharding.

A cut through the whole model comes from `kth_highest`, in about one pass. If equal scores lie on both sides of the cut, a
search in one weight finds the position of the cut.

With scope "per_tensor", a floor or a cap, and for the random controls, each tensor or magnitude bin has its own cut. All
these cuts are found at once, digit by digit from the top (radix selection). Each rank makes a histogram of one digit, over
its elements that match the digits found so far. The histograms are all-reduced, and the sum gives the digit of the k-th
highest element. Three digits (11 + 11 + 10 bits) make up the score: its IEEE-754 bit pattern, mapped so that it sorts as an
integer. Five more digits of 11 bits make up the position. They are needed only if equal scores lie on both sides of a cut.
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
    """Selects the fundamental set: exactly the weights with the highest scores. Collective.

    If scores are equal, the parameter name that comes first in UTF-8 order wins, then the lower flat index. The set is
    therefore the same for every number of ranks. The extra memory is one bit per weight that the rank owns, and less than
    64 MiB.

    Args:
        scores: what `score_importance` or `load_scores` returned.
        fraction: share of the eligible weights to select, in [0, 1].
        scope: among which weights the scores are compared.

            - "global" (default): selects the k = round(fraction x eligible) highest scores of the whole model.
            - "per_tensor": selects the round(fraction x numel) highest scores of each tensor.
        floor: lowest share of each tensor that is selected, in [0, 1]: at least round(floor x numel) weights.
        cap: highest share of each tensor that is selected, in [0, 1]: at most round(cap x numel) weights. Floor and cap
            keep a global selection from emptying or filling a layer. All roundings are Python's `round`.

    Returns:
        The fundamental set. Each rank stores the bits of the weights that it owns.

    Raises:
        SelectionError: a share outside [0, 1], an unknown scope, or a floor and cap that do not allow the fraction.
        ScoreError: some scores are NaN or infinite (the message names the parameters), or there are no scores.
    """
    _check(scores, fraction, scope, floor, cap)
    ranking = Ranking(scores)
    sizes = [prod(shape) for shape in scores.shapes.values()]
    selects, line = _chooser(ranking, sizes, fraction, scope, floor, cap)
    bits, counts = ranking.collect(selects) if line is None else ranking.collect_line(line)
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
        raise SelectionError(
            f"scores must be a Scores object, not {type(scores).__name__}: pass the result of score_importance"
        )
    if scope not in get_args(Scope):
        raise SelectionError(f"unknown scope {scope!r}{did_you_mean(scope, get_args(Scope))}; use 'global' or 'per_tensor'")
    for name, value in (("fraction", fraction), ("floor", floor), ("cap", cap)):
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise SelectionError(f"{name} must lie between 0 and 1, not {value}")
    if floor > cap:
        raise SelectionError(f"floor {floor} is above cap {cap}")
    if scores.num_eligible == 0:
        raise ScoreError("the scores are empty: score at least one weight before the selection")


def _chooser(
    ranking: Ranking, sizes: list[int], fraction: float, scope: str, floor: float, cap: float
) -> tuple[Keep, GlobalCut | None]:
    """Returns the function that selects cells, and the cut through the whole model if there is a single one. Collective."""
    low, high = [round(floor * n) for n in sizes], [round(cap * n) for n in sizes]
    if scope == "per_tensor":
        counts = [round(fraction * n) for n in sizes]
        bad_names = [name for name, a, k, b in zip(ranking.names, low, counts, high, strict=True) if not a <= k <= b]
        if bad_names:
            raise SelectionError(
                f"fraction {fraction} per tensor is outside floor {floor} and cap {cap} in {listing(bad_names)}: choose a "
                "fraction between them"
            )
        ranking.require_finite()
        per_tensor = ranking.cut(counts, by_tensor)
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
    ranking.require_finite()
    must, may = ranking.cut(low, by_tensor), ranking.cut(high, by_tensor)

    def contested(chunk: Chunk) -> Tensor:
        """Cells that the cap allows and the floor does not already select."""
        group = by_tensor(chunk)
        return may.selects(chunk, group) & ~must.selects(chunk, group)

    cut = ranking.cut([total - sum(low)], keep=contested)
    return lambda chunk: must.selects(chunk, by_tensor(chunk)) | (contested(chunk) & cut.selects(chunk)), None
