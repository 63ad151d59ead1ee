"""Batches made by the user's function (`data.collate`)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, DataError, listing
from ..imports import find_function
from ..seeds import seed_of, seeded
from .batches import Processor
from .packing import IGNORED
from .splits import Split, places_of

Collate = Callable[[list[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Collated:
    """A split with batches made by the user's function.

    Attributes:
        sources: input of each example as the user's function takes it; for `causal_lm` a pair (input, answer).
        labels: label of each example; placeholders for `causal_lm`.
        processor: calls the user's function.
    """

    sources: list[Any]
    labels: list[Any]
    processor: CollateProcessor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        """Returns 0: the length of an input is unknown."""
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns what the user's function makes of these examples; see `Examples.inputs`."""
        return self.processor.batch([self.sources[i] for i in indices], f"{draw}:{list(indices)}")


class CollateProcessor(Processor):
    """Makes batches with the user's function.

    The function takes a list of inputs and returns the model's arguments by name, tensors [size, ...]. For `causal_lm` it
    takes a list of pairs (input, answer) and also returns `labels` [size, tokens], -100 where nothing is learned. All random
    generators start from (seed, epoch, examples of the batch).
    """

    def __init__(self, config: Config) -> None:
        """Imports the function.

        Raises:
            ConfigError: `data.collate` leads to no function.
        """
        self._path, self._seed = str(config.data.collate), config.seed
        self._collate: Collate = find_function(self._path, config.import_roots, "data.collate")
        self._makes_labels = config.task.kind == "causal_lm"

    def __call__(self, split: Split) -> Collated:
        if self._makes_labels:
            return Collated(list(zip(split.inputs, split.labels, strict=True)), [0] * len(split), self)
        return Collated(list(split.inputs), split.labels, self)

    def batch(self, sources: list[Any], draw: str) -> dict[str, Tensor]:
        """Calls the user's function.

        Args:
            sources: inputs, or pairs (input, answer) for `causal_lm`.
            draw: name of the seed from which the random generators start.

        Returns:
            The model's arguments by name, tensors [size, ...]; with `labels` for `causal_lm`.

        Raises:
            DataError: the function fails, or leaves an example without an answer.
            ConfigError: the function does not return tensors for all examples, or `labels` do not fit the kind of task.
        """
        try:
            with seeded(seed_of(self._seed, draw)):
                batch = self._collate(sources)
        except Exception as error:
            # Neither the inputs nor the message, which may quote them: logs are read by more people than patients' data.
            what = f"{type(error).__name__} at {_place(error)}"
            raise DataError(f"data.collate: {self._path} fails on {len(sources)} examples ({draw}): {what}") from error
        fits = isinstance(batch, dict) and all(isinstance(v, Tensor) and len(v) == len(sources) for v in batch.values())
        if not fits or not batch:
            raise ConfigError(f"data.collate: {self._path} must return a dictionary of tensors [{len(sources)}, ...]")
        if self._makes_labels != ("labels" in batch):
            rule = "must return labels [size, tokens]" if self._makes_labels else "must not return labels"
            raise ConfigError(f"data.collate: {self._path} {rule} for this task.kind")
        if self._makes_labels and (batch["labels"].ndim != 2 or batch["labels"].dtype != torch.int64):
            kind = f"{list(batch['labels'].shape)} of {batch['labels'].dtype}"
            raise ConfigError(f"data.collate: {self._path} returned labels {kind}, not [size, tokens] of torch.int64")
        if self._makes_labels and not bool((batch["labels"][:, 1:] != IGNORED).any(1).all()):
            raise DataError(f"data.collate: {self._path} returned an example without labels to learn: its answer is cut off")
        return dict(batch)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Makes a batch of each example alone. Each rank checks its part.

        Raises:
            DataError: some batches cannot be made, or contain values that are NaN or infinite; the message names the first.
        """
        if self._makes_labels:
            splits = [Split(self(split).sources, split.labels, split.groups) for split in splits]
        examples = places_of(splits)[rank::ranks]
        problems = [text for where, source in examples if (text := self._problem(where, source))]
        if problems:
            raise DataError(f"{len(problems)} of {len(examples)} examples cannot be used: {listing(problems, 3)}")

    def describe(self, value: Any, label: Any) -> str:
        """Shape, type and range of each of the model's arguments."""
        batch = self.batch([(value, label) if self._makes_labels else value], "check")
        return ", ".join(f"{name} {list(v.shape)} from {v.min():g} to {v.max():g}" for name, v in batch.items())

    def _problem(self, where: str, source: Any) -> str | None:
        try:
            batch = self.batch([source], where)
        except DataError as error:
            return f"{where}: {error}"
        broken = [key for key, value in batch.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        return f"{where}: NaN or infinite values in {listing(broken)}" if broken else None


def _place(error: Exception) -> str:
    """File and line of the user's code at which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "an unknown place"
