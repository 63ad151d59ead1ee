"""Scores in a file, to select from more than once: one safetensors file, whole float32 tensors under the weights' names."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.box import Box
from ..engines.find import find_engine
from ..engines.whole_tensors import cells, whole_of
from ..errors import ScoreError
from ..files import TensorFile, is_altered


@dataclass(frozen=True)
class ScoreShard:
    """Scores of the cells of one owned box: `values` is flat float32, in the box's row-major order."""

    box: Box
    values: Tensor


@dataclass(frozen=True)
class Scores:
    """Importance of every eligible weight, spread over the ranks.

    Attributes:
        criterion: the criterion that made them.
        shapes: full shape by canonical name, in model order, of the eligible weights.
        shards: this rank's scores by name; over all ranks the boxes cover each weight exactly once.
        head, unscored, frozen: head patterns; names that are neither eligible nor head; names that are not trained.
        num_weights: number of weights of the whole model, head included.
        num_batches: score batches used.
        loss: mean loss over the score batches (NaN for criteria that need none).
    """

    criterion: str
    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, ScoreShard]
    head: tuple[str, ...] = ()
    unscored: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    num_weights: int = 0
    num_batches: int = 0
    loss: float = float("nan")
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_eligible(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


_FIELDS = ("criterion", "head", "unscored", "frozen", "num_weights", "num_batches", "loss", "extra")


def save_scores(scores: Scores, path: str | os.PathLike[str]) -> None:
    """Writes the scores of all ranks to one file, 4 bytes a weight; no rank holds more than one whole tensor. Collective."""
    about = {key: getattr(scores, key) for key in _FIELDS}
    about["loss"] = None if math.isnan(scores.loss) else scores.loss
    writer: TensorFile | None = None
    with collectives.agreed(f"write {path}"):
        if collectives.rank() == 0:
            entries = {name: ("F32", shape, 4 * prod(shape)) for name, shape in scores.shapes.items()}
            writer = TensorFile(Path(path), entries, {"scores": json.dumps(about)})
    for name, shape in scores.shapes.items():
        shard = scores.shards[name]
        values = whole_of(shard.box, shard.values, prod(shape), name).cpu()
        if writer is not None:
            writer.write(values.numpy().tobytes())
    with collectives.agreed(f"write {path}"):
        if writer is not None:
            writer.close()


def load_scores(path: str | os.PathLike[str], model: nn.Module) -> Scores:
    """The scores for a model under any engine and number of ranks; each rank reads what it owns. Collective.

    Raises:
        ScoreError: the file is missing or damaged, or the model has other weights.
    """
    engine = find_engine(model)
    full, local = engine.full_shapes(), {s.name: s for s in engine.shards()}
    with collectives.agreed(f"read {path}"):
        try:
            if collectives.rank() == 0 and is_altered(Path(path)):
                raise ScoreError(f"{path} was altered after it was written")
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["scores"])
                names = list(file.keys())
                shapes = {n: tuple(file.get_slice(n).get_shape()) for n in full if n in set(names)}
                odd = [n for n in names if n not in full or full[n] != shapes[n]]
                if odd:
                    raise ScoreError(f"{path} has scores of {odd[0]}, which this model has not, or in another shape")
                shards = {
                    n: ScoreShard(box, cells(file.get_slice(n), box).to(local[n].local.device))
                    for n in shapes
                    for box in [local[n].owned_box]
                }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ScoreError(f"{path} is damaged, or no file of scores: {error}") from error
    for key in ("head", "unscored", "frozen"):
        about[key] = tuple(about[key])
    about["loss"] = float("nan") if about["loss"] is None else about["loss"]
    return Scores(shapes=shapes, shards=shards, **about)
