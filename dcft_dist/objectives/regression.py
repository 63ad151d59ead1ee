"""The objective of regression, for numbers and ordered grades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Metrics, Objective


class Regression(Objective):
    """A number, or a grade: squared error, in units of the standard deviation of the training labels.

    Outputs are standardised predictions [size, 1], labels are numbers [size]. Records are predictions in the labels' unit.
    """

    best, num_outputs, width = "mae", 1, 1

    def __init__(self, mean: float = 0.0, std: float = 1.0, grades: tuple[int, int] | None = None) -> None:
        """Prepares the objective.

        Args:
            mean: mean of the training labels.
            std: standard deviation of the training labels.
            grades: lowest and highest grade, if the labels are grades. The metrics then include `quadratic_kappa`, the
                agreement of rounded predictions with the labels.
        """
        self._mean, self._std, self._grades = mean, std, grades

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - self.standardised(labels)).square()

    def standardised(self, labels: Tensor) -> Tensor:
        """The labels in the unit of the outputs."""
        return (labels - self._mean) / self._std

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.double() * self._std + self._mean

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        predicted, targets = records.squeeze(-1), labels.double()
        error, spread = predicted - targets, targets - targets.mean()
        metrics = {
            "loss": float((error / self._std).square().mean()),
            "mae": float(error.abs().mean()),
            "rmse": float(error.square().mean().sqrt()),
        }
        if float(spread.abs().max()) > 0:
            metrics["r2"] = float(1 - error.square().sum() / spread.square().sum())
            if self._grades:
                metrics["quadratic_kappa"] = _quadratic_kappa(predicted, targets, *self._grades)
        return metrics

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return {"predicted": records.squeeze(-1).tolist()}


def _quadratic_kappa(predicted: Tensor, targets: Tensor, low: int, high: int) -> float:
    from torchmetrics.functional import classification as tm

    rounded, grades = (values.nan_to_num().round().clamp(low, high).long() - low for values in (predicted, targets))
    return float(tm.multiclass_cohen_kappa(rounded, grades, num_classes=high - low + 1, weights="quadratic"))
