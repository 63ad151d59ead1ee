"""Metrics and predictions of a finished run's model on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data.batches import Examples
from ..data.splits import Split
from ..data.tasks import load_task
from ..data.user_task import other_split
from ..errors import ConfigError
from ..objectives.base import intervals
from ..train.task_model import Evaluation, TaskModel
from .load import identify, read_examples


def predictions(adapted: TaskModel, split: Split, masks: Path | None, tokens: int | None) -> dict[str, list[Any]]:
    """Predictions for a split: masks for `segmentation`, answers for `causal_lm`, otherwise a value per output. Collective.

    Args:
        adapted: the finished run's model.
        split: the examples.
        masks: folder for masks; for `task.kind = "segmentation"` only.
        tokens: largest number of tokens in an answer, 128 by default; for `task.kind = "causal_lm"` only.

    Returns:
        Columns of a table: input, group, and the predictions.

    Raises:
        ConfigError: `masks` or `tokens` does not belong to the kind of the task; or see `write_masks`, `answers_of`.
        DataError: an input cannot be read.
    """
    kind = adapted.config.task.kind
    for value, option, required_kind in ((masks, "--masks", "segmentation"), (tokens, "--tokens", "causal_lm")):
        if value is not None and kind != required_kind:
            raise ConfigError(f"{option} is for task.kind = '{required_kind}', not '{kind}'")
    if kind == "segmentation":
        from .masks import write_masks

        return write_masks(adapted, split, masks)
    if kind == "causal_lm":
        from .answers import answers_of

        return answers_of(adapted, split, 128 if tokens is None else tokens)
    return predictions_of(adapted, split, evaluate_split(adapted, split)[0])


def given_split(adapted: TaskModel, labelled: bool) -> Split:
    """The examples to use: those that the overrides name, or the test split of a task that brings its own data.

    Args:
        adapted: the finished run's model.
        labelled: True: the examples must have labels.

    Raises:
        DataError: the data cannot be read; see `data.user_task`.
    """
    if adapted.config.task.name != "own":
        return load_task(adapted.config).test
    return other_split(adapted.config, adapted.facts["names"], labelled)


def evaluate_split(adapted: TaskModel, split: Split) -> tuple[Evaluation, Examples]:
    """Evaluates a split. Collective.

    Args:
        adapted: the finished run's model.
        split: the labelled examples.

    Returns:
        The evaluation, and the split as inputs of the model.

    Raises:
        DivergedError: an output is NaN.
    """
    examples = read_examples(adapted, split)
    found = adapted.evaluate(examples)
    found.require_numbers(split, "given")
    return found, examples


def report_of(adapted: TaskModel, split: Split, found: Evaluation, examples: Examples) -> dict[str, Any]:
    """Metrics and their 95 % intervals, as JSON: examples, groups, metrics, intervals. Collective.

    Args:
        adapted: the finished run's model.
        split: the labelled examples.
        found: the evaluation of the split.
        examples: the split as inputs of the model.
    """
    groups = [split.groups[i] for i in found.indices]
    labels = torch.tensor([examples.labels[i] for i in found.indices])
    metric_intervals = intervals(adapted.objective, found.records, labels, groups, adapted.config.test_resamples)
    return {"examples": len(split), "groups": len(set(groups)), "metrics": found.metrics, "intervals": metric_intervals}


def predictions_of(adapted: TaskModel, split: Split, found: Evaluation) -> dict[str, list[Any]]:
    """Columns of a table: input, group, and the objective's columns of predictions.

    Args:
        adapted: the finished run's model.
        split: the examples.
        found: the evaluation of the split.
    """
    columns = adapted.objective.predictions(found.records, adapted.facts["names"])
    if "predicted" in columns and adapted.config.task.kind == "single_label":
        columns["predicted"] = [adapted.facts["names"][i] for i in columns["predicted"]]
    return identify(split, found.indices.tolist()) | columns
