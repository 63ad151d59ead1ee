"""The objective of regression and of ordered grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Metrics, Objective


class Regression(Objective):
    """A number, or a grade: squared error in standard deviations of the training labels. Records are predictions."""

    best, num_outputs, width = "mae", 1, 1

    def __init__(self, mean: float = 0.0, std: float = 1.0, grades: tuple[int, int] | None = None) -> None:
        """`grades`: lowest and highest of labels that are grades; the agreement of rounded predictions is measured then."""
        self._mean, self._std, self._grades = mean, std, grades

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - (labels - self._mean) / self._std).square()

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.double() * self._std + self._mean

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        found, wanted = records.squeeze(-1), labels.double()
        error, spread = found - wanted, wanted - wanted.mean()
        metrics = {
            "loss": float((error / self._std).square().mean()),
            "mae": float(error.abs().mean()),
            "rmse": float(error.square().mean().sqrt()),
        }
        if float(spread.abs().max()) > 0:
            metrics["r2"] = float(1 - error.square().sum() / spread.square().sum())
            if self._grades:
                metrics["quadratic_kappa"] = _quadratic_kappa(found, wanted, *self._grades)
        return metrics

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return {"predicted": records.squeeze(-1).tolist()}


def _quadratic_kappa(found: Tensor, wanted: Tensor, low: int, high: int) -> float:
    from torchmetrics.functional import classification as tm

    rounded, wanted = (values.nan_to_num().round().clamp(low, high).long() - low for values in (found, wanted))
    return float(tm.multiclass_cohen_kappa(rounded, wanted, num_classes=high - low + 1, weights="quadratic"))
