"""Intervals for accuracies and their differences over seeds and groups of test examples.

Runs differ by seed. Examples of one group (a patient, a code category) are alike. The bootstrap therefore resamples seeds
and groups, each with replacement and independently of the other. This is the pigeonhole bootstrap (Owen 2007, Annals of
Applied Statistics 1:386), which is conservative. Differences are paired: both arms have the same seeds and examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


_AT_ONCE = 500  # resamples drawn together; memory grows with this number times the number of groups


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: over seeds and examples.
        low: lower end of the interval, a quantile of the resampled means.
        high: upper end.
        num_seeds: how many seeds the mean is over.
    """

    mean: float
    low: float
    high: float
    num_seeds: int


def estimate(values: NDArray[np.float64], groups: Sequence[str], seed: int = 0, level: float = 0.95) -> Estimate:
    """Estimates the mean over seeds and examples, with its bootstrap interval.

    Args:
        values: [seeds, examples]; 1 for a right and 0 for a wrong prediction, or the difference of two arms.
        groups: [examples]; the name of each example's group.
        seed: of the resampling.
        level: of the interval.
    """
    _, group_indices = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(group_indices.max()) + 1
    sums = np.stack([np.bincount(group_indices, row, num_groups) for row in values])
    sizes = np.bincount(group_indices, minlength=num_groups)
    generator = np.random.default_rng(seed)
    num_seeds, means = len(values), []
    for _ in range(RESAMPLES // _AT_ONCE):
        seed_counts = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _AT_ONCE)
        group_counts = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), _AT_ONCE)
        means.append(((seed_counts @ sums) * group_counts).sum(1) / (num_seeds * (group_counts @ sizes)))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), num_seeds)


def contrast_verdict(difference: Estimate) -> str:
    """Decides what the interval of a difference in accuracy says about the contrast.

    Args:
        difference: of two accuracies between 0 and 1, so that one point is 0.01.

    Returns:
        `"supported"`: the whole interval lies above 0.
        `"not supported"`: no part of the interval lies above 0, or all of it lies within one point of 0.
        `"undecided"`: neither of these.
    """
    if difference.low > 0:
        return "supported"
    if difference.high <= 0 or (difference.low >= -0.01 and difference.high <= 0.01):
        return "not supported"
    return "undecided"
