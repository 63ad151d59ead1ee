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
    kind = adapted.config.task.kind
    for given, of in ((masks, "segmentation"), (tokens, "causal_lm")):
        if given is not None and kind != of:
            raise ConfigError(f"--{'masks' if of == 'segmentation' else 'tokens'} is for task.kind = '{of}', not '{kind}'")
    if kind == "segmentation":
        from .masks import write_masks

        return write_masks(adapted, split, masks)
    if kind == "causal_lm":
        from .answers import answers_of

        return answers_of(adapted, split, 128 if tokens is None else tokens)
    return predictions_of(adapted, split, evaluate_split(adapted, split)[0])


def given_split(adapted: TaskModel, labelled: bool) -> Split:
    """The examples that the overrides name, or the test split of a task that is not the user's.

    Raises:
        DataError: see `user_task`.
    """
    if adapted.config.task.name != "own":
        return load_task(adapted.config).test
    return other_split(adapted.config, adapted.facts["names"], labelled)


def evaluate_split(adapted: TaskModel, split: Split) -> tuple[Evaluation, Examples]:
    """Collective."""
    examples = read_examples(adapted, split)
    return adapted.evaluate(examples), examples


def report_of(adapted: TaskModel, split: Split, found: Evaluation, examples: Examples) -> dict[str, Any]:
    """Metrics with their intervals, as JSON. Collective."""
    groups = [split.groups[i] for i in found.indices]
    labels = torch.tensor([examples.labels[i] for i in found.indices])
    spread = intervals(adapted.objective, found.records, labels, groups, adapted.config.test_resamples)
    return {"examples": len(split), "groups": len(set(groups)), "metrics": found.metrics, "intervals": spread}


def predictions_of(adapted: TaskModel, split: Split, found: Evaluation) -> dict[str, list[Any]]:
    """Columns of a table: input, group, and what the model says."""
    columns = adapted.objective.predictions(found.records, adapted.facts["names"])
    if "predicted" in columns and adapted.config.task.kind == "single_label":
        columns["predicted"] = [adapted.facts["names"][i] for i in columns["predicted"]]
    return identify(split, found.indices.tolist()) | columns
