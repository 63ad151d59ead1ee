"""Validation examples that a finished run's model gets wrong, the worst first, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.batches import Examples
from ..data.splits import Split, name_of
from ..data.tasks import load_task
from ..data.volumes import VolumeProcessor
from ..distributed.world import World
from ..errors import DataError
from ..files import read_json
from ..runs.folder import RunFolder
from ..train.task_model import TaskModel
from .load import load_adapted
from .predict import evaluate_split

_LONGEST = 600  # characters of a text that are shown


@dataclass(frozen=True)
class Mistake:
    """An example and what the model made of it.

    Attributes:
        verdict: what is right and what was predicted, in words.
        source: its text, or the path of its file.
        picture: [height, width, 3] in uint8; None if the input cannot be drawn.
    """

    verdict: str
    source: str
    picture: NDArray[Any] | None


# How wrong the examples are [size], 0 for those that are right; and the verdict on one.
_Ranked = tuple[Tensor, Callable[[int], str]]


def _of_classes(records: Tensor, labels: Tensor, names: Sequence[str]) -> _Ranked:
    sure, predicted = records.softmax(-1).max(-1)
    return (
        sure * (predicted != labels),
        lambda i: f"{names[int(labels[i])]}, predicted as {names[int(predicted[i])]} with probability {sure[i]:.2f}",
    )


def _of_findings(records: Tensor, labels: Tensor, names: Sequence[str]) -> _Ranked:
    probabilities = records.sigmoid()
    errors, findings = (probabilities - labels).abs().nan_to_num().max(-1)

    def verdict(i: int) -> str:
        finding = int(findings[i])
        state = "present" if labels[i, finding] == 1 else "absent"
        return f"{names[finding]} is {state}, predicted with probability {probabilities[i, finding]:.2f}"

    return errors * (errors > 0.5), verdict


def _of_numbers(records: Tensor, labels: Tensor, names: Sequence[str]) -> _Ranked:
    predicted = records[:, 0]
    return (predicted - labels).abs(), lambda i: f"{names[0]} {labels[i]:g}, predicted as {predicted[i]:.4g}"


def _of_answers(records: Tensor, labels: Tensor, names: Sequence[str]) -> _Ranked:
    losses, tokens, right = records.unbind(-1)
    return (
        losses / tokens * (right < tokens),
        lambda i: (
            f"{right[i]:g} of {tokens[i]:g} tokens of the answer are right, loss of a token {losses[i] / tokens[i]:.3g}"
        ),
    )


def _of_masks(records: Tensor, labels: Tensor, names: Sequence[str]) -> _Ranked:
    dice = records[:, 1 : len(names)]

    def verdict(i: int) -> str:
        present = [(name, float(value)) for name, value in zip(names[1:], dice[i], strict=True) if value == value]
        return ", ".join(f"Dice {name} {value:.2f}" for name, value in present)

    return (1 - dice.nanmean(-1)).nan_to_num(), verdict


_RANKED = {
    "single_label": _of_classes,
    "multi_label": _of_findings,
    "regression": _of_numbers,
    "causal_lm": _of_answers,
    "segmentation": _of_masks,
}


def mistakes(run: Path, number: int, world: World, trust: bool = False) -> list[Mistake]:
    """Evaluates the run's model on its validation data, and picks the examples that are most wrong. Collective.

    Test data are left alone: who has seen their mistakes would choose by them.

    Args:
        run: folder of a finished run.
        number: how many examples at most.
        world: the joined ranks.
        trust: whether the code that the run names may be imported.

    Raises:
        DataError: the data are no longer those of the run.
        DcftError: see `load_adapted` and `evaluate_split`.
    """
    adapted = load_adapted(run, (), world, trust, own_data=True)
    task = load_task(adapted.config)
    if task.checksum != read_json(RunFolder(run).summary)["data_checksum"]:
        raise DataError(f"{run}: its data have changed since, so its mistakes are not those of the report")
    found, examples = evaluate_split(adapted, task.validation)
    labels = torch.tensor([examples.labels[i] for i in found.indices.tolist()])
    wrong, verdict = _RANKED[adapted.config.task.kind](found.records, labels, task.class_names)
    worst = [i for i in wrong.argsort(descending=True, stable=True)[:number].tolist() if wrong[i] > 0]
    chosen = [int(found.indices[i]) for i in worst]
    return [
        Mistake(verdict(i), _source(task.validation, index), _picture(adapted, task.validation, examples, index))
        for i, index in zip(worst, chosen, strict=True)
    ]


def _source(split: Split, index: int) -> str:
    value, label = split.inputs[index], split.labels[index]
    text = name_of(value, f"example {index}")
    if not isinstance(value, str):  # the name of a file with that of its folder: the whole path may say more than one wants
        text = "/".join(Path(text).parts[-2:])
    if isinstance(label, str) and isinstance(value, str):  # an instruction
        text = f"{text}\n{label}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@torch.no_grad()
def _picture(adapted: TaskModel, split: Split, examples: Examples, index: int) -> NDArray[Any] | None:
    processor, value, label = adapted.pretrained.processor, split.inputs[index], split.labels[index]
    if not isinstance(processor, VolumeProcessor):
        return processor.picture(value, label)
    adapted.model.eval()
    image = examples.inputs([index])["image"].to(adapted.world.device)
    return processor.reader.drawn((value, label), adapted.whole({"image": image})[0].argmax(0).cpu().numpy())
