"""The objectives of classification and regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Metrics, Objective

Measure = Callable[[Tensor, Tensor], Tensor]  # of chances and labels 1 or 0 [size]


class SingleLabel(Objective):
    """One of several classes: cross-entropy. Labels [size] are class indices; records are logits."""

    best = "accuracy"

    def __init__(self, num_classes: int, class_weights: Sequence[float] | None = None) -> None:
        """`class_weights`: of the losses; 1 on the average over training examples, so that a batch's mean needs no other."""
        self.num_outputs = self.width = num_classes
        self._weights = None if class_weights is None else torch.tensor(class_weights)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        plain = functional.cross_entropy(outputs, labels, reduction="none")
        return plain if self._weights is None else plain * self._weights.to(plain.device)[labels]

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        from torchmetrics.functional import classification as tm  # late: a second to import

        predicted, chances = records.argmax(-1), records.softmax(-1)
        classes: Any = {"num_classes": self.num_outputs}
        recall = tm.multiclass_recall(predicted, labels, average="none", **classes)
        there = torch.bincount(labels, minlength=self.num_outputs) > 0
        first = int(self.num_outputs == 2)  # of two classes one column says all
        return {
            "loss": float(functional.cross_entropy(records, labels)),
            "accuracy": float(tm.multiclass_accuracy(predicted, labels, average="micro", **classes)),
            "macro_f1": float(tm.multiclass_f1_score(predicted, labels, average="macro", **classes)),
            "balanced_accuracy": float(recall[there].mean()),
            **_ranking(
                chances[:, first:], functional.one_hot(labels, self.num_outputs)[:, first:], _SINGLE if first else {}
            ),
            "ece": float(tm.multiclass_calibration_error(chances, labels, n_bins=15, **classes)),
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return {"predicted": records.argmax(-1).tolist(), **_shares(records.softmax(-1), names)}

    def chance(self) -> Metrics:
        return {"loss": float(torch.tensor(float(self.num_outputs)).log()), "accuracy": 1 / self.num_outputs}


class MultiLabel(Objective):
    """Several findings, each there or not: binary cross-entropy. Labels [size, findings] of 0, 1, or NaN for unknown."""

    best = "auroc"

    def __init__(self, num_findings: int) -> None:
        self.num_outputs = self.width = num_findings

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        each = functional.binary_cross_entropy_with_logits(outputs, labels.nan_to_num(), reduction="none")
        return (each * known).sum(-1) / self.num_outputs  # not over what is known: a batch's mean then needs no weights

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        known = ~labels.isnan()
        correct = ((records > 0) == (labels > 0.5))[known]
        there = torch.where(known, labels.nan_to_num(), -1).long()
        means = _ranking(records.sigmoid(), there, each=_SINGLE | _DECIDED)
        return {
            "loss": float(self.losses(records, labels.double()).mean()),
            "label_accuracy": float(correct.double().mean()),
            **means,
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return _shares(records.sigmoid(), names)


def _shares(chances: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
    return {
        f"p({name})": [float(f"{p:.6g}") for p in column] for name, column in zip(names, chances.T.tolist(), strict=True)
    }


def _ranking(chances: Tensor, there: Tensor, each: Mapping[str, Measure]) -> Metrics:
    """Means over columns that have both kinds: areas under the ROC and precision-recall curves, and `each`.

    `there`: 1, 0, or -1 for unknown.
    """
    from torchmetrics.functional import classification as tm

    measures: dict[str, Measure] = {"auroc": tm.binary_auroc, "auprc": tm.binary_average_precision, **each}
    found: dict[str, list[float]] = {}
    for column in range(chances.shape[1]):
        known = there[:, column] >= 0
        wanted = there[known, column]
        if 0 < int(wanted.sum()) < len(wanted):
            for name, measure in measures.items():
                found.setdefault(name, []).append(float(measure(chances[known, column], wanted)))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _sensitivity(chances: Tensor, wanted: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    found: Tensor = tm.binary_sensitivity_at_specificity(chances, wanted, min_specificity=0.95)[0]
    return found


def _balanced(chances: Tensor, wanted: Tensor) -> Tensor:
    said = chances > 0.5
    return (said[wanted == 1].double().mean() + (~said)[wanted == 0].double().mean()) / 2


def _f1(chances: Tensor, wanted: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    return tm.binary_f1_score(chances, wanted)


def _calibration(chances: Tensor, wanted: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    return tm.binary_calibration_error(chances, wanted, n_bins=15)


_SINGLE: dict[str, Measure] = {"sensitivity_at_95_specificity": _sensitivity}


_DECIDED: dict[str, Measure] = {"macro_f1": _f1, "balanced_accuracy": _balanced, "ece": _calibration}
