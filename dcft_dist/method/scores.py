"""Scores in memory, spread over ranks, and in a file: one safetensors file with a whole float32 tensor per weight."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
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
from ..tensor_file import TensorFile, is_altered


@dataclass(frozen=True)
class ScoreShard:
    """This rank's scores of one weight.

    Attributes:
        box: the cells of the weight that this rank owns.
        values: their scores, flat float32, in the box's row-major order.
    """

    box: Box
    values: Tensor


@dataclass(frozen=True)
class Scores:
    """Importance scores of every eligible weight, spread over the ranks; what `score_importance` returns.

    Pass them to `select_fundamental`, or write them to a file with `save_scores`.

    Attributes:
        criterion: the criterion of the scores, such as "fisher" (`score_importance` lists all).
        shapes: canonical name -> full shape of every eligible weight, in model order.
        shards: canonical name -> this rank's scores. Over all ranks the boxes cover each weight exactly once.
        head: patterns of the head.
        unscored: names of the weights that are neither eligible nor head.
        frozen: names of the weights that are not trained.
        num_weights: number of weights of the whole model, head included.
        num_batches: number of score batches used; 0 for "magnitude" and "random".
        loss: mean loss over the score batches; NaN for "magnitude" and "random".
        extra: further provenance, as JSON values; `select_fundamental` copies it into the set.
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
        """Number of eligible weights of the whole model."""
        return sum(prod(shape) for shape in self.shapes.values())


_FIELDS = ("criterion", "head", "unscored", "frozen", "num_weights", "num_batches", "loss", "extra")


def save_scores(scores: Scores, path: str | os.PathLike[str]) -> None:
    """Writes the scores of all ranks to one safetensors file, 4 bytes per eligible weight. Collective.

    Rank 0 writes a temporary file and renames it at the end. No rank needs memory for more than one whole tensor at a time.
    `load_scores` reads the file under any engine and any number of ranks. You can then select again, for example with
    another fraction, without scoring again.

    Args:
        scores: what `score_importance` returned.
        path: the file to write; an existing file is replaced.
    """
    about = {key: getattr(scores, key) for key in _FIELDS}
    about["loss"] = None if math.isnan(scores.loss) else scores.loss
    write_shards(path, "F32", scores.shapes, scores.shards, {"scores": json.dumps(about)})


def write_shards(
    path: str | os.PathLike[str],
    dtype: str,
    shapes: Mapping[str, tuple[int, ...]],
    shards: Mapping[str, ScoreShard],
    about: dict[str, str],
) -> None:
    """Writes one number for each eligible weight, from the shards of all ranks, to a safetensors file. Collective.

    Args:
        path: the file to write; an existing file is replaced.
        dtype: of the numbers, as safetensors calls it: `"F32"` or `"U8"`.
        shapes: name -> full shape of each eligible weight.
        shards: name -> this rank's numbers.
        about: the file's metadata.
    """
    writer: TensorFile | None = None
    size = {"F32": 4, "U8": 1}[dtype]
    with collectives.agreed(f"write {path}"):
        if collectives.rank() == 0:
            entries = {name: (dtype, shape, size * prod(shape)) for name, shape in shapes.items()}
            writer = TensorFile(Path(path), entries, about)
    for name, shape in shapes.items():
        values = whole_of(shards[name].box, shards[name].values, prod(shape), name).cpu()
        if writer is not None:
            writer.write(values.numpy().tobytes())
    with collectives.agreed(f"write {path}"):
        if writer is not None:
            writer.close()


def load_scores(path: str | os.PathLike[str], model: nn.Module) -> Scores:
    """Reads scores that `save_scores` wrote. Each rank reads what it owns. Collective.

    The engine and the number of ranks may differ from those that wrote the file.

    Args:
        path: the file; it must be readable on every rank.
        model: the model to select weights of, prepared in any supported way (plain, DDP, FSDP, DeepSpeed). Its weights
            must have the names and shapes of the scored ones.

    Returns:
        The scores.

    Raises:
        ScoreError: the file is missing, damaged or altered, or the model has other weights.
        EngineError: the model is wrapped in an unsupported way.
    """
    about, shapes, shards = read_shards(path, model, "scores")
    for key in ("head", "unscored", "frozen"):
        about[key] = tuple(about[key])
    about["loss"] = float("nan") if about["loss"] is None else about["loss"]
    return Scores(shapes=shapes, shards=shards, **about)


def read_shards(
    path: str | os.PathLike[str], model: nn.Module, what: str
) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, ScoreShard]]:
    """Reads a file of `write_shards`. Each rank reads what it owns. Collective.

    Args:
        path: the file; it must be readable on every rank.
        model: the model, under any engine.
        what: key of the metadata to return; it also names the file's content in messages.

    Returns:
        The metadata under that key, read as JSON; full shapes, and this rank's numbers, by name.

    Raises:
        ScoreError: the file is missing, damaged or altered, or the model has other weights.
    """
    engine = find_engine(model)
    full, local = engine.full_shapes(), {s.name: s for s in engine.shards()}
    with collectives.agreed(f"read {path}"):
        try:
            if collectives.rank() == 0 and is_altered(Path(path)):
                raise ScoreError(f"{path} was altered after it was written: score again, or restore the file")
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[what])
                names = list(file.keys())
                shapes = {n: tuple(file.get_slice(n).get_shape()) for n in full if n in set(names)}
                unknown = [n for n in names if n not in full or full[n] != shapes[n]]
                if unknown:
                    raise ScoreError(f"{path} has {what} of {unknown[0]}, which this model lacks or has in another shape")
                shards = {
                    n: ScoreShard(box, cells(file.get_slice(n), box).to(local[n].local.device))
                    for n in shapes
                    for box in [local[n].owned_box]
                }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ScoreError(f"{path} is missing, damaged, or not a file of {what}: {error}") from error
    return about, shapes, shards
