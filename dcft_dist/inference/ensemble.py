"""Several finished runs as one model: the mean of their probabilities, such as those of the folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Examples
from ..data.splits import Split
from ..distributed.world import World
from ..errors import ConfigError
from ..train.task_model import Evaluation, TaskModel
from .load import load_adapted
from .predict import evaluate_split, given_split

# Kind of the task -> (record to what is averaged, and back).
_MEANS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "single_label": (lambda logits: logits.softmax(-1), torch.log),
    "multi_label": (torch.sigmoid, torch.logit),
    "regression": (lambda numbers: numbers, lambda numbers: numbers),
}


def evaluate_together(
    runs: Sequence[Path], overrides: Sequence[str], world: World, trust: bool, labelled: bool
) -> tuple[TaskModel, Split, Evaluation, Examples]:
    """Evaluates the mean of several runs on a split. One model after the other is in memory. Collective.

    Args:
        runs: folders of finished runs with the same task; one is enough.
        overrides, trust: see `load_adapted`.
        world: the joined ranks.
        labelled: whether the examples have labels.

    Returns:
        The last run's model; the split; the evaluation of the mean; the split as inputs of that model.

    Raises:
        ConfigError: the runs have different kinds of tasks or classes, or a kind of which no mean is taken.
        DcftError: see `load_adapted` and `evaluate_split`.
    """
    total: Tensor | None = None
    first: tuple[str, list[str]] | None = None  # kind and names of the first run
    for run in runs:
        adapted = load_adapted(run, overrides, world, trust)
        kind, names = adapted.config.task.kind, adapted.facts["names"]
        if len(runs) > 1 and kind not in _MEANS:
            raise ConfigError(f"{run}: no mean of several runs for task.kind = '{kind}'")
        first = first or (kind, names)
        if (kind, names) != first:
            raise ConfigError(f"{run} has another kind of task, or other classes, than {runs[0]}")
        split = given_split(adapted, labelled)
        found, examples = evaluate_split(adapted, split)
        if len(runs) > 1:
            share = _MEANS[kind][0](found.records) / len(runs)
            total = share if total is None else total + share
    if total is not None:
        records = _MEANS[kind][1](total)
        labels = torch.tensor([examples.labels[i] for i in found.indices.tolist()])
        found = replace(found, records=records, metrics=adapted.objective.metrics(records, labels))
    return adapted, split, found, examples
