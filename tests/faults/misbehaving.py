"""Losses of a user that go wrong at the step after the one that the run has logged last, for `test_numbers`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor
from torch.nn import functional


def _now(outputs: Tensor) -> bool:
    """Whether this is the training step after the checkpoint of step 5."""
    run = Path(os.environ["MISBEHAVING_RUN"])
    training = json.loads((run / "progress.json").read_text())["phase"] == "train"
    return outputs.requires_grad and training and (run / "checkpoints/step_00000005").exists()


def loss_becomes_nan(outputs: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(outputs, labels, reduction="none")
    return losses * float("nan") if _now(outputs) else losses


def gradient_becomes_nan(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss itself stays as it is: 0 * sqrt(0) has no derivative."""
    losses = functional.cross_entropy(outputs, labels, reduction="none")
    return losses + (outputs * 0).sum(-1).abs().sqrt() * 0 if _now(outputs) else losses


def gradient_becomes_huge(outputs: Tensor, labels: Tensor) -> Tensor:
    """Adam's mean of the squares overflows, and the weights stay finite."""
    losses = functional.cross_entropy(outputs, labels, reduction="none")
    return losses + (outputs.sum(-1) - outputs.sum(-1).detach()) * 1e30 if _now(outputs) else losses
