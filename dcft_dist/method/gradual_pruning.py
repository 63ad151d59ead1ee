"""Scores of a model that has been trained on the task first, and is then taken back to where it was.

The public code of DCFT scores while it prunes: in rounds, the model is trained, scored, and the lowest weights are set to
zero and stay there, along a cubic schedule (Zhu and Gupta 2017), until the share that is wanted is left. Fine-tuning then
starts from the pre-trained weights. One round is a plain fine-tuning that is scored at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from ..engines.find import find_engine
from .fundamental_set import FundamentalSet
from .penalty import attach_penalty
from .scores import Scores
from .selection import select_fundamental


def scores_after_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rounds: int,
    fraction: float,
    train: Callable[[int], None],
    score: Callable[[], Scores],
) -> Scores:
    """Scores at the end of the last round; pruned weights have score 0 if the criterion multiplies by w. Collective.

    Args:
        model, optimizer: their weights are put back, and the optimizer's state is emptied.
        rounds: of training and scoring; between two of them all but the share `kept` of the eligible weights become zero.
        fraction: share that the schedule ends at.
        train: trains during a round, given its index.
        score: scores the model as it is.
    """
    engine = find_engine(model)
    start = [(shard, shard.local.detach().clone()) for shard in engine.shards()]
    chosen: FundamentalSet | None = None
    try:
        for turn in range(rounds):
            # Zeros stay: of pruned weights no part of a step is applied.
            sparse = (
                attach_penalty(model, chosen, 1.0, optimizer=optimizer, level="update", rest_factor=0.0) if chosen else None
            )
            with sparse or nullcontext():
                train(turn)
            scores = score()
            if turn + 1 < rounds:
                chosen = select_fundamental(scores, kept(fraction, turn, rounds))
                _zero_others(model, chosen)
        return scores
    finally:
        with torch.no_grad():
            for shard, values in start:
                shard.local.copy_(values)
        optimizer.state.clear()
        engine.publish()


def kept(fraction: float, turn: int, rounds: int) -> float:
    """Share of the eligible weights that is left after a round (the last one: `fraction`)."""
    return fraction + (1 - fraction) * (1 - (turn + 1) / rounds) ** 3


@torch.no_grad()
def _zero_others(model: nn.Module, chosen: FundamentalSet) -> None:
    engine = find_engine(model)
    for shard in engine.shards():
        if shard.name in chosen.info.shapes:
            mask = chosen.mask_in(shard.name, shard.box)
            shard.local.mul_(mask.view(shard.local.shape).to(shard.local.device))
    engine.publish()
