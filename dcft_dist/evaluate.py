"""Loss, accuracy and macro-F1 of a classifier over all ranks; padding samples never count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import collectives
from .data import Batch
from .engines import find_engine

EVALUATION_BATCH = 64  # texts in a forward of one rank


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], num_classes: int, computing: Callable[[], Any]) -> dict[str, float]:
    """{"loss", "accuracy", "macro_f1"}: mean cross-entropy, micro accuracy and macro-F1, each in [0, 1]. Collective.

    Runs in eval mode and restores the mode. `batches`: this rank's, as many on every rank.
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
    finally:
        model.train(training)
        find_engine(model).settle()
    loss_sum, count = collectives.reduce_numbers([sum(losses), number], what="evaluation loss")
    values = metrics.compute()
    return {"loss": loss_sum / count, "accuracy": float(values["accuracy"]), "macro_f1": float(values["macro_f1"])}
