"""What reports call a metric, and which metrics they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..objectives.base import LOWER_IS_BETTER

_NAMES = {
    "accuracy": "accuracy",
    "label_accuracy": "accuracy of single findings",
    "balanced_accuracy": "balanced accuracy",
    "token_accuracy": "accuracy of tokens",
    "macro_f1": "macro-averaged F1",
    "auroc": "area under the ROC curve",
    "auprc": "area under the precision-recall curve",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "quadratic_kappa": "quadratic kappa",
    "hd95": "Hausdorff distance, 95th percentile",
    "dice": "Dice",
    "exact": "answers that are right in every token",
}


def name_of(metric: str) -> str:
    """A metric in words; its key if there are none for it.

    Args:
        metric: key of a metric, also of one class (`dice_tumour`).
    """
    for stem in ("dice", "hd95"):
        if metric.startswith(f"{stem}_"):
            return f"{_NAMES[stem]}, {metric.removeprefix(f'{stem}_')}"
    return _NAMES.get(metric, metric)


def unit_of(metric: str) -> str:
    """What the values of a metric are measured in: `share` (0 to 1), or the metric itself.

    Args:
        metric: key of a metric.
    """
    known = metric in _NAMES or metric.startswith("dice_")
    return "share" if known and metric not in {*LOWER_IS_BETTER, "quadratic_kappa"} - {"ece"} else metric


def shown_metrics(metrics: Mapping[str, float]) -> tuple[str, str]:
    """The names of the two metrics that reports show where there is room for two only.

    Args:
        metrics: of a validation or a test.
    """
    preferred = [name for name in ("accuracy", "macro_f1", "dice", "auroc", "mae", "token_accuracy") if name in metrics]
    rest = [name for name in metrics if name not in preferred]
    first, second, *_ = [*preferred, *rest, "loss"]
    return first, second


def chosen_by(summary: dict[str, Any]) -> str:
    """Key of the metric that has chosen the epoch of a run.

    Args:
        summary: of the run; one of an older version does not name it, and has the first of `shown_metrics`.
    """
    return str(summary.get("metric") or shown_metrics(summary["validation"])[0])
