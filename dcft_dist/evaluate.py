"""Metrics over all ranks. Padding samples never count, and the numbers do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import collectives
from .data import Batch, Examples, evaluation_batches
from .engines import find_engine
from .objective import Metrics, Objective
from .world import World


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and what they are made of: `records` [size, width] of the examples `indices` [size], in ascending order."""

    metrics: Metrics
    records: Tensor
    indices: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    outputs: Callable[[nn.Module, Batch], Tensor],
    examples: Examples,
    objective: Objective,
    world: World,
    computing: Callable[[], Any],
    size: int,
    limit: int | None = None,
) -> Evaluation:
    """Evaluates a split, or `limit` examples of it, in eval mode, and restores the mode. Collective.

    Args:
        outputs: of the model for a batch (`Pretrained.outputs`).
        computing: the context of a forward (`Prepared.computing`).
        size: examples in a forward of one rank.
    """
    mine: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for batch in evaluation_batches(examples, world.rank, world.world_size, size, world.device, limit):
            with computing():
                found = objective.whole(partial(outputs, model), batch)
            real = batch["real"]
            records = objective.records(found[real].float(), batch["labels"][real])
            mine.append(torch.cat([batch["index"][real].double().unsqueeze(1), records], 1).cpu())
    finally:
        model.train(training)
        find_engine(model).settle()
    rows = rows_of_all(torch.cat(mine))
    rows = rows[rows[:, 0].argsort()]
    indices, records = rows[:, 0].long(), rows[:, 1:]
    labels = torch.tensor([examples.labels[i] for i in indices.tolist()])
    return Evaluation(objective.metrics(records, labels), records, indices)


def rows_of_all(rows: Tensor) -> Tensor:
    """Rows [size, width] of all ranks; a rank may have none. Collective."""
    sizes = [n for (n,) in collectives.all_gather_ints([rows.numel()], what="count of evaluated examples")]
    return collectives.all_gather_uneven(rows.flatten(), sizes, what="evaluated examples").view(-1, rows.shape[1])
