"""Batches made by the user's function (`data.collate`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, DataError, line_of, listing
from ..imports import find_function
from ..seeds import seed_of, seeded
from .batches import Processor
from .splits import Split, places_of
from .text import IGNORED

Collate = Callable[[list[Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Collated:
    """A split whose batches the user's function makes."""

    sources: list[Any]
    labels: list[Any]
    processor: CollateProcessor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        return self.processor.batch([self.sources[i] for i in indices], f"{draw}:{list(indices)}")


class CollateProcessor(Processor):
    """Makes inputs of a split by the user's function: a list of inputs -> the model's arguments by name, [size, ...] each.

    For `causal_lm` of pairs (input, answer); it gives `labels` [size, tokens] too, -100 where nothing is learned.
    Whatever generator it uses starts from (seed, epoch, examples of the batch).
    """

    def __init__(self, config: Config) -> None:
        self._path, self._seed = str(config.data.collate), config.seed
        self._collate: Collate = find_function(self._path, config.import_roots, "data.collate")
        self._tokens = config.task.kind == "causal_lm"

    def __call__(self, split: Split) -> Collated:
        if self._tokens:  # labels are tokens, which the user's function makes
            return Collated(list(zip(split.inputs, split.labels, strict=True)), [0] * len(split), self)
        return Collated(list(split.inputs), split.labels, self)

    def batch(self, sources: list[Any], draw: str) -> dict[str, Tensor]:
        """
        Raises:
            DataError: the user's function fails.
            ConfigError: it gives something else than tensors for as many examples.
        """
        try:
            with seeded(seed_of(self._seed, draw)):
                found = self._collate(sources)
        except Exception as error:
            names = listing([str(source)[:80] for source in sources], 2)
            raise DataError(f"data.collate: {self._path} fails on {names}: {line_of(error)}") from error
        good = isinstance(found, dict) and all(isinstance(v, Tensor) and len(v) == len(sources) for v in found.values())
        if not good or not found:
            raise ConfigError(f"data.collate: {self._path} gives no dictionary of tensors [{len(sources)}, ...]")
        if self._tokens != ("labels" in found):
            what = "has to give labels [size, tokens]" if self._tokens else "may not give labels"
            raise ConfigError(f"data.collate: {self._path} {what} for this task.kind")
        if self._tokens and (found["labels"].ndim != 2 or found["labels"].dtype != torch.int64):
            kind = f"{list(found['labels'].shape)} of {found['labels'].dtype}"
            raise ConfigError(f"data.collate: {self._path} gives labels {kind}, not [size, tokens] of torch.int64")
        if self._tokens and not bool((found["labels"][:, 1:] != IGNORED).any(1).all()):
            raise DataError(f"data.collate: {self._path} leaves nothing to learn of an example: its answer is cut off")
        return dict(found)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Makes a batch of each example alone, each rank its part.

        Raises:
            DataError: some cannot be made, or hold values that are no numbers; the first are named.
        """
        if self._tokens:
            splits = [Split(self(split).sources, split.labels, split.groups) for split in splits]
        found = places_of(splits)[rank::ranks]
        wrong = [text for where, source in found if (text := self._problem(where, source))]
        if wrong:
            raise DataError(f"{len(wrong)} of {len(found)} examples: {listing(wrong, 3)}")

    def _problem(self, where: str, source: Any) -> str | None:
        try:
            made = self.batch([source], where)
        except DataError as error:
            return f"{where}: {error}"
        broken = [key for key, value in made.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        return f"{where}: {listing(broken)} with values that are no numbers" if broken else None
