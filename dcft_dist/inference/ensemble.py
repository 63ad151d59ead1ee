"""Several finished runs as one model: the mean of their probabilities, such as those of the folds of a cross-validation.

Models of classes and numbers are loaded one after the other. Those of masks are all loaded, because the probabilities of all
voxels of all volumes would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.batches import Batch, Examples
from ..data.splits import Split, name_of
from ..distributed.world import World
from ..errors import ConfigError, listing
from ..train.task_model import Evaluation, TaskModel
from .load import load_adapted
from .predict import evaluate_split, given_split


def _of_classes(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).logsumexp(0)


def _of_findings(logits: Tensor) -> Tensor:
    return functional.logsigmoid(logits).logsumexp(0) - functional.logsigmoid(-logits).logsumexp(0)


# Kind of the task -> mean of records [models, size, width]. Of logits, those of the mean probability (up to a number for all
# classes): by logarithms, since a probability may round to 1.
_MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "single_label": _of_classes,
    "multi_label": _of_findings,
    "regression": lambda numbers: numbers.mean(0),
}


def evaluate_together(
    runs: Sequence[Path], overrides: Sequence[str], world: World, trust: bool, labelled: bool, mirrored: bool
) -> tuple[TaskModel, Split, Evaluation, Examples]:
    """Evaluates the mean of several runs on a split, or of mirrored inputs, one model after the other. Collective.

    Args:
        runs: folders of finished runs with the same task.
        overrides, trust: see `load_adapted`.
        world: the joined ranks.
        labelled: whether the examples have labels.
        mirrored: whether each model also sees images left to right, and volumes along each axis (test-time augmentation).

    Returns:
        The first run's model; the split; the evaluation of the mean; the split as inputs of that model.

    Raises:
        ConfigError: the runs have different kinds of tasks, classes or examples, or a kind of which no mean is taken; or
            inputs that cannot be mirrored.
        DcftError: see `load_adapted` and `evaluate_split`.
    """
    members, first, tested = list[Tensor](), dict[str, Any](), list[Split]()
    for run in reversed(runs):  # the first one is left: losses and grades are in its unit
        adapted = load_adapted(run, overrides, world, trust)
        kind = adapted.config.task.kind
        if kind not in _MEANS:
            raise ConfigError(f"{run}: no mean of several predictions for task.kind = '{kind}'")
        first = first or _meaning(adapted)
        _require_same(first, adapted, run, runs[-1])
        split = given_split(adapted, labelled)
        _require_same_examples(tested, split, run, runs[-1])
        found, examples = evaluate_split(adapted, split)
        seen = [found, *(adapted.evaluate(other) for other in _mirrored(examples))] if mirrored else [found]
        members += [one.records for one in seen]
    records = _MEANS[kind](torch.stack(members))
    labels = torch.tensor([examples.labels[i] for i in found.indices.tolist()])
    found = replace(found, records=records, metrics=adapted.objective.metrics(records, labels))
    return adapted, split, found, examples


def _meaning(adapted: TaskModel) -> dict[str, Any]:
    """What several runs must have in common: their outputs, and for masks how volumes are read."""
    task, data = adapted.config.task, adapted.config.data
    found = {"task.kind": task.kind, "the classes": adapted.facts["names"]}
    if task.kind == "segmentation":
        found |= {f"data.{name}": getattr(data, name) for name in ("input", "spacing", "window")}
    return found


def _require_same(first: dict[str, Any], adapted: TaskModel, run: Path, first_run: Path) -> None:
    other = _meaning(adapted)
    if differ := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
        raise ConfigError(f"{run} differs from {first_run} in {listing(differ)}")


def _require_same_examples(tested: list[Split], split: Split, run: Path, first_run: Path) -> None:
    """Notes the split of the first run; checks that those of other runs have the same examples."""
    if not tested:
        tested.append(split)
    first, number = tested[0], len(split)
    names = [[name_of(source, str(i)) for i, source in enumerate(found.inputs)] for found in (first, split)]
    same = first.groups == split.groups and names[0] == names[1] and str(first.labels) == str(split.labels)
    if len(first) != number or not same:
        raise ConfigError(
            f"{run} and {first_run} have other examples or labels, of which no mean can be taken: their settings in [task] "
            "and [data] differ"
        )


@dataclass(frozen=True)
class MeanOfMasks(TaskModel):
    """Models of segmentation as one: the logarithm of the mean of their probabilities.

    Attributes:
        members: the models.
        ways: each model also sees images mirrored along these axes, counted from the last one; () is the image itself.
    """

    members: tuple[TaskModel, ...]
    ways: tuple[tuple[int, ...], ...]

    def whole(self, batch: Batch) -> Tensor:
        """Logarithms of probabilities [size, classes, *space] of whole volumes. Collective.

        Args:
            batch: contains `image` [size, channels, *space].
        """
        image, sums, smallest = batch["image"], torch.zeros(()), torch.finfo(torch.float32).tiny
        for member in self.members:
            member.model.eval()
            for way in self.ways:
                outputs = member.whole({**batch, "image": image.flip(way)}).float()
                sums = sums.to(outputs.device) + outputs.softmax(1).flip(way)
        return (sums / (len(self.members) * len(self.ways))).clamp(min=smallest).log()


def segment_together(
    runs: Sequence[Path], overrides: Sequence[str], world: World, trust: bool, mirrored: bool
) -> MeanOfMasks:
    """Loads several runs, or one that also sees mirrored volumes, as one model of segmentation. Collective.

    Args:
        runs, overrides, world, trust, mirrored: see `evaluate_together`.

    Raises:
        ConfigError: the runs have other classes, or read volumes in another way.
        DcftError: see `load_adapted`.
    """
    members = [load_adapted(run, overrides, world, trust) for run in runs]
    for run, member in zip(runs, members, strict=True):
        _require_same(_meaning(members[0]), member, run, runs[0])
    ways = ((), *_ways(len(members[0].config.data.patch))) if mirrored else ((),)
    return MeanOfMasks(**vars(members[0]), members=tuple(members), ways=ways)


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
    if dimensions not in ({2}, {3}):
        raise ConfigError("--flips is for images and volumes")
    return [_Mirrored(examples, way) for way in _ways(*dimensions)]


def _ways(dimensions: int) -> list[tuple[int, ...]]:
    """The sets of axes to mirror: left to right for images; every set for volumes."""
    axes = [-1] if dimensions == 2 else [-3, -2, -1]
    return [way for number in range(1, len(axes) + 1) for way in combinations(axes, number)]
