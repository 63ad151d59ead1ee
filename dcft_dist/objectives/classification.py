"""The objectives of classification: one of several classes (`SingleLabel`), or several findings (`MultiLabel`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Metrics, Objective

Measure = Callable[[Tensor, Tensor], Tensor]  # (probabilities [size], labels 1 or 0 [size]) -> value


class SingleLabel(Objective):
    """One of several classes: cross-entropy.

    Outputs are logits [size, classes], records are the logits. Labels [size] are class indices; in training they may be
    shares [size, classes], of mixed examples.
    """

    best = "accuracy"

    def __init__(self, num_classes: int, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0) -> None:
        """Prepares the objective.

        Args:
            num_classes: number of classes.
            class_weights: weight of each class in the loss. Their average over the training examples is 1, so that the mean
                over a batch needs no further weights. None: all classes weigh 1.
            label_smoothing: share of a label that `losses` spreads evenly over all classes; metrics have none.
        """
        self.num_outputs = self.width = num_classes
        self._weights = None if class_weights is None else torch.tensor(class_weights)
        self._smoothing = label_smoothing

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weights = None if self._weights is None else self._weights.to(outputs)
        return functional.cross_entropy(outputs, labels, weights, reduction="none", label_smoothing=self._smoothing)

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        from torchmetrics.functional import classification as tm  # imported here, because it takes a second

        predicted, probabilities = records.argmax(-1), records.softmax(-1)
        classes: Any = {"num_classes": self.num_outputs}
        recall = tm.multiclass_recall(predicted, labels, average="none", **classes)
        present = torch.bincount(labels, minlength=self.num_outputs) > 0
        first = int(self.num_outputs == 2)  # the second of two columns says everything
        return {
            "loss": float(functional.cross_entropy(records, labels)),
            "accuracy": float(tm.multiclass_accuracy(predicted, labels, average="micro", **classes)),
            "macro_f1": float(tm.multiclass_f1_score(predicted, labels, average="none", **classes)[present].mean()),
            "balanced_accuracy": float(recall[present].mean()),
            **_ranking(
                probabilities[:, first:], functional.one_hot(labels, self.num_outputs)[:, first:], _SINGLE if first else {}
            ),
            "ece": float(tm.multiclass_calibration_error(probabilities, labels, n_bins=15, **classes)),
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return {"predicted": records.argmax(-1).tolist(), **_probability_columns(records.softmax(-1), names)}

    def chance(self) -> Metrics:
        return {"loss": float(torch.tensor(float(self.num_outputs)).log()), "accuracy": 1 / self.num_outputs}


class MultiLabel(Objective):
    """Several findings, each present or absent: binary cross-entropy.

    Outputs are logits [size, findings], records are the logits. Labels [size, findings] are 0, 1, or NaN for unknown.
    """

    best = "auroc"

    def __init__(self, num_findings: int) -> None:
        """Prepares the objective.

        Args:
            num_findings: number of findings.
        """
        self.num_outputs = self.width = num_findings

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        known = ~labels.isnan()
        each = functional.binary_cross_entropy_with_logits(outputs, labels.nan_to_num(), reduction="none")
        # Divided by all findings, not by the known ones, so that the mean over a batch needs no weights.
        return (each * known).sum(-1) / self.num_outputs

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        known = ~labels.isnan()
        correct = ((records > 0) == (labels > 0.5))[known]
        targets = torch.where(known, labels.nan_to_num(), -1).long()
        means = _ranking(records.sigmoid(), targets, each=_SINGLE | _DECIDED)
        return {
            "loss": float(self.losses(records, labels.double()).mean()),
            "label_accuracy": float(correct.double().mean()),
            **means,
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return _probability_columns(records.sigmoid(), names)


def _probability_columns(probabilities: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
    return {
        f"p({name})": [float(f"{p:.6g}") for p in column]
        for name, column in zip(names, probabilities.T.tolist(), strict=True)
    }


def _ranking(probabilities: Tensor, targets: Tensor, each: Mapping[str, Measure]) -> Metrics:
    """Averages measures over the columns that have positive and negative examples.

    The measures are the areas under the ROC and precision-recall curves, and those of `each`.

    Args:
        probabilities: [size, columns].
        targets: [size, columns] of 1, 0, or -1 for unknown.
        each: further measures by name.
    """
    from torchmetrics.functional import classification as tm

    measures: dict[str, Measure] = {"auroc": tm.binary_auroc, "auprc": tm.binary_average_precision, **each}
    values_of: dict[str, list[float]] = {}
    for column in range(probabilities.shape[1]):
        known = targets[:, column] >= 0
        labels = targets[known, column]
        if 0 < int(labels.sum()) < len(labels):
            for name, measure in measures.items():
                value = float(measure(probabilities[known, column], labels))
                values_of.setdefault(name, []).append(min(max(value, 0.0), 1.0))  # torchmetrics rounds areas to 1.0000001
    return {name: sum(values) / len(values) for name, values in values_of.items()}


def _sensitivity(probabilities: Tensor, labels: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    sensitivity: Tensor = tm.binary_sensitivity_at_specificity(probabilities, labels, min_specificity=0.95)[0]
    return sensitivity


def _balanced(probabilities: Tensor, labels: Tensor) -> Tensor:
    predicted = probabilities > 0.5
    return (predicted[labels == 1].double().mean() + (~predicted)[labels == 0].double().mean()) / 2


def _f1(probabilities: Tensor, labels: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    return tm.binary_f1_score(probabilities, labels)


def _calibration(probabilities: Tensor, labels: Tensor) -> Tensor:
    from torchmetrics.functional import classification as tm

    return tm.binary_calibration_error(probabilities, labels, n_bins=15)


# For two classes and for findings: measures that depend on the ranking alone.
_SINGLE: dict[str, Measure] = {"sensitivity_at_95_specificity": _sensitivity}

# For findings: measures at the threshold 0.5, and calibration.
_DECIDED: dict[str, Measure] = {"macro_f1": _f1, "balanced_accuracy": _balanced, "ece": _calibration}
