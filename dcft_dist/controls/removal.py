"""The removal check: the paper's definition of a fundamental weight, tested against controls.

Sets of weights are set to zero and the validation loss is measured: the highest-scored set, and its controls (`controls`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..engines.find import find_engine
from ..errors import ScoreError
from ..method.fundamental_set import FundamentalSet
from ..method.scores import Scores
from ..method.selection import select_fundamental
from .control_sets import KINDS, control_set

Evaluate = Callable[[], Mapping[str, float]]


AUTO = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


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
        top = select_fundamental(scores, fraction)
        for kind in KINDS:
            chosen = control_set(model, scores, top, kind, seed)
            with removed(model, chosen):
                rows.append({"set": kind, "fraction": fraction, "num_removed": chosen.num_selected, **evaluate()})
    return {"base": dict(evaluate()), "removed": rows}


def choose_fraction(
    model: nn.Module, scores: Scores, evaluate: Evaluate, seed: int, fractions: Sequence[float] = AUTO
) -> tuple[float, list[dict[str, Any]]]:
    """The share of weights that matter most beyond their tensors and magnitudes. Collective.

    Among `fractions` the one at which removing the highest scores raises the validation loss most over removing a random set
    that is matched to them per tensor and magnitude bin: with fewer, weights that matter are left out; with more, any set as
    large does as much damage. Also returns the curve: {"fraction", "top", "random_magnitude": validation losses, "gap"}.
    """
    curve = []
    for fraction in fractions:
        top = select_fundamental(scores, fraction)
        row: dict[str, Any] = {"fraction": fraction}
        for kind in ("top", "random_magnitude"):
            with removed(model, control_set(model, scores, top, kind, seed)):
                row[kind] = evaluate()["loss"]
        curve.append({**row, "gap": row["top"] - row["random_magnitude"]})
    return max(curve, key=lambda row: row["gap"])["fraction"], curve


@contextmanager
def removed(model: nn.Module, chosen: FundamentalSet) -> Iterator[None]:
    """The model with the chosen weights set to zero; the weights are put back bit by bit afterwards. Collective."""
    engine, kept = find_engine(model), []
    for shard in engine.shards():
        if shard.name in chosen.info.shapes:
            if not shard.local.is_contiguous():
                raise ScoreError(f"{shard.name} is not contiguous in memory: its weights cannot be removed one by one")
            flat = shard.local.detach().view(-1)
            index = chosen.mask_in(shard.name, shard.box).nonzero().view(-1).to(flat.device)
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
