"""Score, select and attach in two calls: what the callbacks for other libraries share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.names import Patterns
from ..errors import ScoreError
from ..method.fundamental_set import FundamentalSet
from ..method.importance import score_importance
from ..method.penalty import Penalty, attach_penalty
from ..method.penalty_checks import check_precision
from ..method.score_batches import LossFn, random_states_kept
from ..method.selection import select_fundamental

SET_FILE = "fundamental.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What to score, select and penalise.

    Attributes:
        head: names or patterns of the new task head, which is never scored; `()` for none.
        fraction: fraction of the eligible weights that become fundamental, in [0, 1].
        factor: multiplier of fundamental weights, in [0, 1]: 0 freezes them, 1 means no penalty.
        num_batches: micro-batches to score on, per rank.
        score: further arguments of `score_importance`, by name.
        select: further arguments of `select_fundamental`, by name.
        penalty: further arguments of `attach_penalty`, by name.
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
        """Scores `model` on the first `num_batches` batches, selects the set and saves it. Collective.

        Random states are restored afterwards, so training sees the same batches as without scoring.

        Args:
            model: the wrapped model.
            batches: returns an iterable of this rank's batches.
            loss_fn: as for `score_importance`.
            file: where to save the set.

        Returns:
            The set, read back from `file`.

        Raises:
            ScoreError: some rank has fewer than `num_batches` batches.
            PenaltyError: the weights are stored in half precision, so that no penalty could be attached afterwards.
        """
        check_precision(find_engine(model))
        with random_states_kept():
            items = list(itertools.islice(iter(batches()), self.num_batches))
            least = min(n for (n,) in collectives.all_gather_ints([len(items)], what="count of batches to score on"))
            if least < self.num_batches:
                raise ScoreError(f"there are only {least} batches per rank to score on: set num_batches to at most {least}")
            scores = score_importance(model, items, loss_fn, head=self.head, **self.score)
        select_fundamental(scores, self.fraction, **self.select).save(file)
        with collectives.agreed("load the fundamental set"):
            return FundamentalSet.load(file)

    def attach(self, model: nn.Module, fundamental: FundamentalSet, optimizer: torch.optim.Optimizer) -> Penalty:
        """Calls `attach_penalty` with `factor` and the options `penalty`. Collective."""
        return attach_penalty(model, fundamental, self.factor, optimizer=optimizer, **self.penalty)
