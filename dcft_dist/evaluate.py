"""Loss, accuracy and macro-F1 of a classifier over all ranks; padding samples never count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import collectives
from .data import Batch
from .engines import find_engine

EVALUATION_BATCH = 64  # texts in a forward of one rank


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    computing: Callable[[], Any],
    predictions: dict[int, int] | None = None,
) -> dict[str, float]:
    """{"loss", "accuracy", "macro_f1"}: mean cross-entropy, micro accuracy and macro-F1, each in [0, 1]. Collective.

    Runs in eval mode and restores the mode. `batches`: this rank's, as many on every rank. `predictions`, if given, is
    filled on every rank with the predicted class of every example, by its index.
    """
    from torchmetrics import MetricCollection  # late: a second to import, for nothing in a run that only scores or stops
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    device = next(model.parameters()).device
    # torchmetrics sums the states of all ranks (true and false positives and negatives) when it computes.
    metrics = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
        }
    ).to(device)
    losses, number = [], 0
    mine: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            with computing():
                logits = model(batch).float()
            real = batch["real"]
            if real.any():
                metrics.update(logits[real], batch["labels"][real])
                losses.append(functional.cross_entropy(logits[real], batch["labels"][real], reduction="sum").double())
                number += int(real.sum())
                mine.append(torch.stack([batch["index"][real], logits[real].argmax(-1)], 1).cpu())
    finally:
        model.train(training)
        find_engine(model).settle()
    loss_sum, count = collectives.reduce_numbers([sum(losses), number], what="evaluation loss")
    if predictions is not None:
        rows = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *mine]).flatten()
        sizes = [n for (n,) in collectives.all_gather_ints([len(rows)], what="count of predictions")]
        everyone = collectives.all_gather_uneven(rows, sizes, what="predictions").view(-1, 2)
        predictions.update((int(i), int(c)) for i, c in everyone)
    values = metrics.compute()
    return {"loss": loss_sum / count, "accuracy": float(values["accuracy"]), "macro_f1": float(values["macro_f1"])}
