"""The removal check: tests the paper's definition of a fundamental weight against controls.

It sets the weights of a set to zero and measures the validation loss: for the highest-scored set, and for its control sets
(`control_set`).
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
    """Measures the validation metrics with each set removed. Collective.

    Args:
        model: the model that was scored; its weights are restored after each removal.
        scores: what `score_importance` returned, with the same sharding.
        fractions: shares of the eligible weights to remove, each in [0, 1].
        evaluate: returns the validation metrics of the model with its current weights, the same on every rank.
        seed: seed of the random sets.

    Returns:
        {"base": metrics, "removed": [{"set", "fraction", "num_removed", **metrics}]}, with one row per fraction and kind of
        set (`KINDS`).
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
    """Chooses the share of weights to select, by removal. Collective.

    For each fraction, two sets are removed in turn: the highest scores, and a random set matched to them per tensor and
    magnitude bin. The gap is the difference of the two validation losses. The fraction with the largest gap wins. A smaller
    one leaves out weights that matter. With a larger one, any set of that size does as much damage.

    Args:
        model: the model that was scored; its weights are restored after each removal.
        scores: what `score_importance` returned, with the same sharding.
        evaluate: returns validation metrics with the key "loss", the same on every rank.
        seed: seed of the random sets.
        fractions: candidates, each in [0, 1].

    Returns:
        The chosen fraction, and the curve: {"fraction", "top", "random_magnitude", "gap"} per fraction, the last three being
        validation losses and their difference.
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
    """Sets the chosen weights to zero for the block, and restores them exactly afterwards. Collective.

    Args:
        model: a model under any engine.
        chosen: the weights to remove.

    Raises:
        ScoreError: a weight is not contiguous in memory.
    """
    engine, old_values = find_engine(model), []
    for shard in engine.shards():
        if shard.name in chosen.info.shapes:
            if not shard.local.is_contiguous():
                raise ScoreError(f"{shard.name} is not contiguous in memory: make it contiguous to remove single weights")
            flat = shard.local.detach().view(-1)
            index = chosen.mask_in(shard.name, shard.box).nonzero().view(-1).to(flat.device)
            old_values.append((flat, index, flat[index]))
    try:
        for flat, index, _ in old_values:
            flat[index] = 0.0
        engine.publish()
        yield
    finally:
        for flat, index, values in old_values:
            flat[index] = values
        engine.publish()
