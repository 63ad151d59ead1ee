"""Several finished runs as one model: the mean of their probabilities, such as those of the folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

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
    runs: Sequence[Path], overrides: Sequence[str], world: World, trust: bool, labelled: bool, mirrored: bool = False
) -> tuple[TaskModel, Split, Evaluation, Examples]:
    """Evaluates the mean of several runs on a split, or of mirrored inputs, one model after the other. Collective.

    Args:
        runs: folders of finished runs with the same task; one is enough.
        overrides, trust: see `load_adapted`.
        world: the joined ranks.
        labelled: whether the examples have labels.
        mirrored: whether each model also sees images left to right, and volumes along each axis (test-time augmentation).

    Returns:
        The last run's model; the split; the evaluation of the mean; the split as inputs of that model.

    Raises:
        ConfigError: the runs have different kinds of tasks or classes, or a kind of which no mean is taken; or inputs that
            cannot be mirrored.
        DcftError: see `load_adapted` and `evaluate_split`.
    """
    together, members = len(runs) > 1 or mirrored, list[Tensor]()
    first: tuple[str, list[str]] | None = None  # kind and names of the first run
    for run in runs:
        adapted = load_adapted(run, overrides, world, trust)
        kind, names = adapted.config.task.kind, adapted.facts["names"]
        if together and kind not in _MEANS:
            raise ConfigError(f"{run}: no mean of several predictions for task.kind = '{kind}'")
        first = first or (kind, names)
        if (kind, names) != first:
            raise ConfigError(f"{run} has another kind of task, or other classes, than {runs[0]}")
        split = given_split(adapted, labelled)
        found, examples = evaluate_split(adapted, split)
        if together:
            seen = [found, *(adapted.evaluate(other) for other in _mirrored(examples))] if mirrored else [found]
            members += [_MEANS[kind][0](one.records) for one in seen]
    if together:
        records = _MEANS[kind][1](torch.stack(members).mean(0))
        labels = torch.tensor([examples.labels[i] for i in found.indices.tolist()])
        found = replace(found, records=records, metrics=adapted.objective.metrics(records, labels))
    return adapted, split, found, examples


@dataclass(frozen=True)
class _Mirrored:
    """A split with inputs mirrored along some axes, counted from the last one."""

    examples: Examples
    axes: tuple[int, ...]

    @property
    def labels(self) -> list[Any]:
        return self.examples.labels

    def __len__(self) -> int:
        return len(self.examples)

    def length(self, index: int) -> int:
        return self.examples.length(index)

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        return {name: value.flip(self.axes) for name, value in self.examples.inputs(indices, draw).items()}


def _mirrored(examples: Examples) -> list[Examples]:
    """The split mirrored left to right for images, in every way for volumes.

    Raises:
        ConfigError: the inputs are neither images nor volumes.
    """
    dimensions = {value.ndim - 2 for value in examples.inputs([0]).values()}
    if not dimensions <= {2, 3}:
        raise ConfigError("--flips is for images and volumes")
    axes = [-1] if dimensions == {2} else [-3, -2, -1]
    ways = [way for number in range(1, len(axes) + 1) for way in combinations(axes, number)]
    return [_Mirrored(examples, way) for way in ways]
