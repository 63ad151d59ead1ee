"""Scores a model after training it on the task, and then restores its weights.

The public code of DCFT scores during gradual pruning. Each round trains the model, scores it, and sets the lowest weights to
zero. Those weights stay zero. The share of remaining weights follows a cubic schedule (Zhu and Gupta 2017) down to the
requested fraction. Fine-tuning then starts from the pre-trained weights. With one round, nothing is pruned: the model is
fine-tuned as usual and scored at the end.
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
    """Trains, scores and prunes in rounds, and returns the scores of the last round. Collective.

    Pruned weights have score 0 if the criterion multiplies by the weight.

    Args:
        model: prepared for training; its weights are restored at the end.
        optimizer: steps the model's weights; its state is emptied at the end.
        rounds: number of rounds of training and scoring. After each round but the last, only the share
            `kept(fraction, turn, rounds)` of the eligible weights, with the highest scores, remains; the others become zero.
        fraction: share of the eligible weights at which the schedule ends, in [0, 1].
        train: trains the model for one round; its argument is the index of the round, from 0.
        score: scores the model with its current weights.
    """
    engine = find_engine(model)
    start = [(shard, shard.local.detach().clone()) for shard in engine.shards()]
    chosen: FundamentalSet | None = None
    try:
        for turn in range(rounds):
            # Pruned weights stay zero: rest_factor 0 discards their steps.
            pruned = (
                attach_penalty(model, chosen, 1.0, optimizer=optimizer, level="update", rest_factor=0.0) if chosen else None
            )
            with pruned or nullcontext():
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
    """Share of the eligible weights that remains after a round; `fraction` after the last one.

    Args:
        fraction: share at which the schedule ends.
        turn: index of the round, from 0.
        rounds: number of rounds.
    """
    return fraction + (1 - fraction) * (1 - (turn + 1) / rounds) ** 3


@torch.no_grad()
def _zero_others(model: nn.Module, chosen: FundamentalSet) -> None:
    engine = find_engine(model)
    for shard in engine.shards():
        if shard.name in chosen.info.shapes:
            mask = chosen.mask_in(shard.name, shard.box)
            shard.local.mul_(mask.view(shard.local.shape).to(shard.local.device))
    engine.publish()
