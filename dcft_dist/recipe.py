"""Score, select and attach in one go, for training loops that belong to someone else: the callbacks use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from . import collectives
from .errors import ScoreError
from .fundamental import FundamentalSet
from .importance import Criterion, LossFn, random_states_kept, score_importance
from .names import Patterns
from .penalty import Penalty, attach_penalty
from .penalty_checks import Level, Where
from .selection import select_fundamental

SET_FILE = "fundamental.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The choices of `score_importance`, `select_fundamental` and `attach_penalty`, with their defaults.

    Attributes:
        num_batches: micro-batches of each rank to score on.
        For all others see those three functions.
    """

    head: Patterns
    fraction: float = 0.10
    factor: float = 0.1
    num_batches: int = 32
    criterion: Criterion = "taylor_squared"
    eligible: Patterns | None = None
    accumulation: int = 1
    scope: Literal["global", "per_tensor"] = "global"
    floor: float = 0.0
    cap: float = 1.0
    level: Level = "auto"
    where: Where = "before"
    rest_factor: float = 1.0
    unscored_factor: float = 1.0

    def make_set(
        self, model: nn.Module, batches: Callable[[], Iterable[Any]], loss_fn: LossFn, file: str | Path
    ) -> FundamentalSet:
        """Scores `model` on the first `num_batches` of `batches()`, selects, and saves the set to `file`. Collective.

        Random states are as before, so that training sees the batches it would have seen.

        Raises:
            ScoreError: there are fewer batches on some rank.
        """
        with random_states_kept():
            items = list(itertools.islice(iter(batches()), self.num_batches))
            least = min(n for (n,) in collectives.all_gather_ints([len(items)], what="count of batches to score on"))
            if least < self.num_batches:
                raise ScoreError(f"there are only {least} batches a rank to score on: set num_batches to at most that")
            scores = score_importance(
                model,
                items,
                loss_fn,
                head=self.head,
                criterion=self.criterion,
                eligible=self.eligible,
                accumulation=self.accumulation,
            )
        chosen = select_fundamental(scores, self.fraction, scope=self.scope, floor=self.floor, cap=self.cap)
        chosen.save(file)
        return FundamentalSet.load(file)

    def attach(self, model: nn.Module, fundamental: FundamentalSet, optimizer: torch.optim.Optimizer) -> Penalty:
        """`attach_penalty` with these choices. Collective."""
        return attach_penalty(
            model,
            fundamental,
            self.factor,
            optimizer=optimizer,
            level=self.level,
            where=self.where,
            rest_factor=self.rest_factor,
            unscored_factor=self.unscored_factor,
        )
