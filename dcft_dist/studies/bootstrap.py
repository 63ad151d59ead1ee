"""Intervals for accuracies and their differences over seeds and groups of test examples.

Runs differ by seed, and examples of one group (a patient, a code category) are alike, so both are resampled with
replacement, independently: the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1:386), which is conservative.
Differences are paired: the same seeds and the same examples of both arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


_AT_ONCE = 500  # bounds the memory: that many counts for each group


@dataclass(frozen=True)
class Estimate:
    """A mean with the interval that holds 95 % of the resampled means."""

    mean: float
    low: float
    high: float
    num_seeds: int


def estimate(values: NDArray[np.float64], groups: Sequence[str], seed: int = 0) -> Estimate:
    """Mean over seeds and examples.

    Args:
        values: [seeds, examples]; right or wrong as 1 or 0, or the difference of two arms.
        groups: of each example.
    """
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(place.max()) + 1
    sums = np.stack([np.bincount(place, row, num_groups) for row in values])
    sizes = np.bincount(place, minlength=num_groups)
    draw = np.random.default_rng(seed)
    num_seeds, means = len(values), []
    for _ in range(RESAMPLES // _AT_ONCE):
        by_seed = draw.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _AT_ONCE)
        by_group = draw.multinomial(num_groups, np.full(num_groups, 1 / num_groups), _AT_ONCE)
        means.append(((by_seed @ sums) * by_group).sum(1) / (num_seeds * (by_group @ sizes)))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), num_seeds)


def contrast_verdict(difference: Estimate) -> str:
    """Supported: the interval lies above 0. Not supported: it lies within one point of 0, or not above 0. Else undecided."""
    if difference.low > 0:
        return "supported"
    if difference.high <= 0 or (difference.low >= -0.01 and difference.high <= 0.01):
        return "not supported"
    return "undecided"
