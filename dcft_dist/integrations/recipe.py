"""Score, select and attach in one go, for training loops that belong to someone else: the callbacks use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed import collectives
from ..engines.names import Patterns
from ..errors import ScoreError
from ..method.fundamental_set import FundamentalSet
from ..method.importance import score_importance
from ..method.penalty import Penalty, attach_penalty
from ..method.score_batches import LossFn, random_states_kept
from ..method.selection import select_fundamental

SET_FILE = "fundamental.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What to score, select and penalise.

    Attributes:
        head: patterns of the new task head (see `score_importance`).
        fraction: of the eligible weights, those that are fundamental.
        factor: multiplier of the fundamental weights.
        num_batches: micro-batches of each rank to score on.
        score, select, penalty: further options of `score_importance`, `select_fundamental` and `attach_penalty`, by name.
    """

    head: Patterns
    fraction: float = 0.10
    factor: float = 0.1
    num_batches: int = 32
    score: Mapping[str, Any] = field(default_factory=dict)
    select: Mapping[str, Any] = field(default_factory=dict)
    penalty: Mapping[str, Any] = field(default_factory=dict)

    def make_set(
        self, model: nn.Module, batches: Callable[[], Iterable[Any]], loss_fn: LossFn, file: str | Path
    ) -> FundamentalSet:
        """Scores `model` on the first `num_batches` of `batches()`, selects, saves the set to `file`. Collective.

        Random states are as before, so training sees the batches it would have seen.

        Raises:
            ScoreError: there are fewer batches on some rank.
        """
        with random_states_kept():
            items = list(itertools.islice(iter(batches()), self.num_batches))
            least = min(n for (n,) in collectives.all_gather_ints([len(items)], what="count of batches to score on"))
            if least < self.num_batches:
                raise ScoreError(f"there are only {least} batches a rank to score on: set num_batches to at most that")
            scores = score_importance(model, items, loss_fn, head=self.head, **self.score)
        select_fundamental(scores, self.fraction, **self.select).save(file)
        with collectives.agreed("load the fundamental set"):
            return FundamentalSet.load(file)

    def attach(self, model: nn.Module, fundamental: FundamentalSet, optimizer: torch.optim.Optimizer) -> Penalty:
        """`attach_penalty` with these choices. Collective."""
        return attach_penalty(model, fundamental, self.factor, optimizer=optimizer, **self.penalty)
