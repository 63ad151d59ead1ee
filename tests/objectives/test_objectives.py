"""Metrics against their definitions, objectives against one process, intervals by group and over ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config
from dcft_dist.errors import ConfigError
from dcft_dist.objectives.base import intervals, oriented
from dcft_dist.objectives.classification import MultiLabel, SingleLabel
from dcft_dist.objectives.language import CausalLanguage
from dcft_dist.objectives.make import label_facts, make_objective
from dcft_dist.objectives.regression import Regression
from dcft_dist.objectives.segmentation import Segmentation

from ..ranks import run_ranks


def auroc(scores: Tensor, there: Tensor) -> float:
    """Share of pairs in the right order, ties half."""
    pairs = list(itertools.product(scores[there == 1].tolist(), scores[there == 0].tolist()))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def average_precision(scores: Tensor, there: Tensor) -> float:
    """Mean over thresholds of the precision, weighted by the gain of recall."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        said = scores >= threshold
        recall = float(there[said].sum() / there.sum())
        area, before = area + (recall - before) * float(there[said].double().mean()), recall
    return area


def segmentation() -> Segmentation:
    return Segmentation(["none", "a"], [8, 8], 0.0)


def examples_of(objective: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, and outputs of a perfect and of a poor model."""
    if isinstance(objective, SingleLabel):
        labels = torch.arange(60) % 3
        sure = torch.nn.functional.one_hot(labels, 3) * 40.0
        return labels, sure, sure.roll(1, 1) * (torch.arange(60) % 2).unsqueeze(1)
    if isinstance(objective, MultiLabel):
        labels = torch.stack([torch.arange(40) % 2, torch.arange(40) % 3 % 2], 1).float()
        return labels, labels * 40 - 20, torch.randn(40, 2)
    if isinstance(objective, Regression):
        labels = torch.arange(40).float() % 4
        return labels, ((labels - 1) / 2).unsqueeze(1), torch.randn(40, 1)
    if isinstance(objective, CausalLanguage):
        labels = torch.randint(0, 7, (20, 6))
        sure = torch.nn.functional.one_hot(labels.roll(-1, 1), 7) * 40.0
        return labels, sure, torch.randn(20, 6, 7)
    labels = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    labels[:, :, 2:5, 2:5] = 1
    sure = torch.cat([1.0 - labels, labels * 1.0], 1) * 40
    return labels, sure, sure.roll(2, 2)


def test_single_label_metrics_by_their_definitions() -> None:
    torch.manual_seed(0)
    records, labels = torch.randn(60, 4).double().round(decimals=1), torch.randint(0, 3, (60,))  # nobody has class 3
    found = SingleLabel(4).metrics(records, labels)
    predicted, chances = records.argmax(-1), records.softmax(-1)
    recalls = [float((predicted[labels == c] == c).double().mean()) for c in range(3)]
    assert found["accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
    assert found["balanced_accuracy"] == pytest.approx(sum(recalls) / 3)
    wanted = [auroc(chances[:, c], (labels == c).long()) for c in range(3)]
    assert found["auroc"] == pytest.approx(sum(wanted) / 3, abs=1e-6)
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(records, labels)))
    sure = chances.max(-1).values
    bins, right = (sure * 15).long().clamp(max=14), (predicted == labels).double()
    gaps = [(right[bins == b].sum() - sure[bins == b].sum()).abs() for b in bins.unique()]
    assert found["ece"] == pytest.approx(float(sum(gaps)) / 60, abs=1e-6)
    assert "sensitivity_at_95_specificity" not in found
    f1 = []
    for c in range(3):  # the fourth does not occur
        hits, said, there = ((predicted == c) & (labels == c)).sum(), (predicted == c).sum(), (labels == c).sum()
        f1.append(float(2 * hits / (said + there)))
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3, abs=1e-6)
    assert found["auprc"] == pytest.approx(
        sum(average_precision(chances[:, c], (labels == c).long()) for c in range(3)) / 3, abs=1e-6
    )


@pytest.mark.parametrize(
    "objective", [SingleLabel(3), MultiLabel(2), Regression(1.0, 2.0, (0, 3)), CausalLanguage(), segmentation()]
)
def test_every_metric_says_that_a_perfect_model_is_the_better_one(objective: Any) -> None:
    """Whatever metric chooses the epoch."""
    torch.manual_seed(0)
    labels, perfect, poor = examples_of(objective)
    good, bad = (objective.metrics(objective.records(outputs, labels), labels) for outputs in (perfect, poor))
    assert set(good) == set(bad) and set(good) <= set(objective.names(labels))
    worse = [name for name in good if not oriented(name, good[name]) > oriented(name, bad[name])]
    assert not worse, (good, bad)


def test_two_classes_and_their_sensitivity() -> None:
    scores = torch.linspace(0, 1, 40).double()
    labels = torch.tensor([0] * 19 + [1] * 3 + [0] + [1] * 17)  # one of twenty negatives is above three of the positives
    found = SingleLabel(2).metrics(torch.stack([-scores, scores], 1), labels)
    assert found["auroc"] == pytest.approx(auroc(scores, labels), abs=1e-6)
    assert found["sensitivity_at_95_specificity"] == 1.0
    worse = torch.tensor([0] * 18 + [1] * 3 + [0] * 2 + [1] * 17)
    assert SingleLabel(2).metrics(torch.stack([-scores, scores], 1), worse)[
        "sensitivity_at_95_specificity"
    ] == pytest.approx(0.85)


def test_two_findings_both_count() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (50, 2)).double()
    labels[:5, 0] = float("nan")
    records = torch.stack([torch.randn(50).double(), labels[:, 1] * 4 - 2], 1)
    found, known = MultiLabel(2).metrics(records, labels), ~labels[:, 0].isnan()
    first = auroc(records[known, 0], labels[known, 0].long())
    assert found["auroc"] == pytest.approx((first + 1.0) / 2, abs=1e-6)
    records[:5, 0] = 99.0  # what is unknown changes nothing
    assert MultiLabel(2).metrics(records, labels) == found
    said = records.sigmoid() > 0.5
    f1, balanced, sensitivity = [], [], []
    for column in range(2):
        here = ~labels[:, column].isnan()
        truth, score = labels[here, column].numpy(), records[here, column].numpy()
        hit = said[here, column].numpy()
        f1.append(2 * (hit & (truth == 1)).sum() / (hit.sum() + truth.sum()))
        balanced.append((hit[truth == 1].mean() + (~hit)[truth == 0].mean()) / 2)
        limits = [c for c in np.append(np.unique(score), np.inf) if (score[truth == 0] < c).mean() >= 0.95]
        sensitivity.append(max((score[truth == 1] >= c).mean() for c in limits))
    assert found["macro_f1"] == pytest.approx(np.mean(f1)) and found["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    assert found["sensitivity_at_95_specificity"] == pytest.approx(np.mean(sensitivity)) and 0 < found["ece"] < 1


def changed(**task: str) -> Config:
    config = load_config("icd.toml")
    return config.model_copy(update={"task": config.task.model_copy(update=task)})


def test_regression_in_the_labels_own_units() -> None:
    task = changed(kind="regression")
    train = [0.0, 1.0, 2.0, 3.0, 4.0] * 4
    objective = make_objective(task, label_facts(task, ["grade"], train))
    labels = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    outputs = ((torch.tensor([0.0, 0.0, 2.0, 2.0, 4.0, 4.0]) - 2) / torch.tensor(train).double().std()).unsqueeze(1)
    found = objective.metrics(objective.records(outputs, labels), labels)
    assert found["mae"] == pytest.approx(4 / 6) and found["rmse"] == pytest.approx((4 / 6) ** 0.5)
    assert found["quadratic_kappa"] == pytest.approx(0.8)  # grades are those of the training data, 0 to 4
    assert float(objective.losses(outputs, labels).mean()) == pytest.approx(found["loss"], rel=1e-6)
    assert "quadratic_kappa" not in Regression(0, 1).metrics(outputs.double(), labels)
    assert label_facts(task, ["dose"], [0.0, 300000.0])["grades"] is None


def test_class_weights_are_one_on_the_average() -> None:
    task = changed(class_weights="balanced")
    labels = [0] * 30 + [1] * 6 + [2] * 4
    objective = make_objective(task, label_facts(task, ["a", "b", "c"], labels))
    outputs, wanted = torch.zeros(40, 3), torch.tensor(labels)
    losses = objective.losses(outputs, wanted)
    sums = [float(losses[wanted == c].sum()) for c in range(3)]
    assert sums == pytest.approx([sums[0]] * 3) and float(losses.mean()) == pytest.approx(float(torch.tensor(3.0).log()))


def intervals_here(resamples: int) -> Any:
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2000,))
    right = torch.rand(2000) < 0.8
    records = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).double()
    groups = [f"p{i}" for i in range(2000)]
    return intervals(SingleLabel(2), records, labels, groups, resamples)


def test_intervals_are_the_normal_ones_on_any_number_of_ranks() -> None:
    alone = run_ranks(1, intervals_here, 200)[0]
    assert run_ranks(3, intervals_here, 200) == [alone] * 3
    low, high = alone["accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * (0.8 * 0.2 / 2000) ** 0.5, rel=0.2)
    assert run_ranks(1, intervals_here, 0) == [None]


def grouped_here() -> Any:
    labels = torch.arange(400) % 2
    right = (torch.arange(400) // 40) % 2 == 0  # patients of 40 images, all right or all wrong
    records = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).double()
    return intervals(SingleLabel(2), records, labels, [f"p{i // 40}" for i in range(400)], 200)


def test_examples_of_a_group_count_together() -> None:
    low, high = run_ranks(1, grouped_here)[0]["accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * (0.25 / 10) ** 0.5, rel=0.2)


def test_outputs_of_another_width_are_named() -> None:
    with pytest.raises(ConfigError, match=r"outputs of shape \[4, 2\], not \[size, 3\].*num_labels"):
        SingleLabel(3).check(torch.zeros(4, 2))


def test_a_class_that_does_not_occur_counts_in_no_mean() -> None:
    """As in a resample of few groups: it counted as 0 in the F1, which pulled intervals down."""
    labels, logits = torch.tensor([0, 0, 1, 1]), torch.eye(3, dtype=torch.float64)[[0, 2, 1, 1]]
    found = SingleLabel(3).metrics(logits, labels)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2) and found["balanced_accuracy"] == pytest.approx(0.75)
