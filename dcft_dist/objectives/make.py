"""Builds the objective of a task from its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config.schema import Config
from .base import Objective
from .classification import MultiLabel, SingleLabel
from .custom import CustomObjective
from .language import CausalLanguage
from .regression import Regression
from .segmentation import Segmentation


def label_facts(config: Config, names: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """Collects what an objective needs to know of the training data.

    Args:
        config: kind of the task, and its class weights.
        names: names of the classes or findings, or of the predicted number.
        labels: training labels.

    Returns:
        Facts that JSON can store. Always `names`. For regression `mean`, `std` and `grades`: [lowest, highest] if the labels
        are grades, which are whole numbers with a range below 20; else None. With `class_weights = "balanced"` the
        `class_weights`.
    """
    task = config.task
    if task.kind == "regression":
        numbers = torch.tensor(labels, dtype=torch.float64)
        low, high = float(numbers.min()), float(numbers.max())
        graded = bool((numbers == numbers.round()).all()) and 0 < high - low < 20
        grades = [int(low), int(high)] if graded else None
        return {"names": list(names), "mean": float(numbers.mean()), "std": float(numbers.std()) or 1.0, "grades": grades}
    facts: dict[str, Any] = {"names": list(names)}
    if task.kind == "single_label" and task.class_weights == "balanced":
        counts = torch.bincount(torch.tensor(labels), minlength=len(names)).clamp(min=1)
        facts["class_weights"] = (len(labels) / (counts * len(names))).tolist()
    return facts


def make_objective(config: Config, facts: Mapping[str, Any]) -> Objective:
    """Builds the objective of a configuration.

    Args:
        config: `task.kind` chooses the objective. `single_label`: `SingleLabel`. `multi_label`: `MultiLabel`.
            `regression`: `Regression`. `causal_lm`: `CausalLanguage`. `segmentation`: `Segmentation`. With `task.loss` or
            `task.metrics`, a `CustomObjective` around it.
        facts: result of `label_facts`.

    Raises:
        ConfigError: `task.loss` or `task.metrics` lead to no function.
    """
    builtin = _builtin(config, facts)
    return CustomObjective(builtin, config) if config.task.loss or config.task.metrics else builtin


def _builtin(config: Config, facts: Mapping[str, Any]) -> Objective:
    task = config.task
    if task.kind == "causal_lm":
        return CausalLanguage()
    if task.kind == "segmentation":
        return Segmentation(facts["names"], config.data.patch, config.data.overlap, config.data.spacing)
    if task.kind == "multi_label":
        return MultiLabel(len(facts["names"]))
    if task.kind == "regression":
        return Regression(facts["mean"], facts["std"], tuple(facts["grades"]) if facts["grades"] else None)
    return SingleLabel(len(facts["names"]), facts.get("class_weights"), task.label_smoothing)
