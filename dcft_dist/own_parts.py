"""The user's own loss, metrics and batches, by import path: `task.loss`, `task.metrics`, `data.collate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, DataError, line_of, listing
from .imports import find_object
from .language import IGNORED
from .objective import LOWER_IS_BETTER, Metrics, Objective
from .schema import Config
from .seeded import seed_of, seeded
from .splits import Split, places_of

Losses = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Tensor, Tensor], Metrics]
Collate = Callable[[list[Any]], dict[str, Tensor]]


class OwnObjective(Objective):
    """One of the kinds with the user's loss, or more metrics; all else is as the kind has it."""

    def __init__(self, kind: Objective, config: Config) -> None:
        """
        Raises:
            ConfigError: an import path leads to no function.
        """
        self._kind = kind
        self.num_outputs, self.best, self.width = kind.num_outputs, kind.best, kind.width
        self.whole, self.check, self.records = kind.whole, kind.check, kind.records  # type: ignore[method-assign]
        self.chance, self._loss, self._measures = kind.chance, None, list[tuple[str, Measure]]()  # type: ignore[method-assign]
        if config.task.loss:
            self._loss_path, self._loss = config.task.loss, _function(config.task.loss, config, "task.loss")
        self._asked = [config.train.metric] if config.train.metric else []
        self._measures = [(path, _function(path, config, "task.metrics")) for path in config.task.metrics]

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """
        Raises:
            ConfigError: the user's loss does not give one for each example.
        """
        if self._loss is None:
            return self._kind.losses(outputs, labels)
        found = self._loss(outputs, labels)
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:1]:
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"task.loss: {self._loss_path} gives {given} for {len(outputs)} examples, not [{len(outputs)}], "
                "the loss of each: reduction = 'none'"
            )
        return found

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        """
        Raises:
            ConfigError: the user's metrics are no numbers by name, or have names that there are already.
        """
        return self._with_more(records, labels, strict=True)

    def resampled(self, records: Tensor, labels: Tensor) -> Metrics:
        return self._with_more(records, labels, strict=False)

    def names(self, labels: Tensor) -> list[str]:
        """The user's functions are tried on made-up records; one that fails there is believed to give what is asked for."""
        found, records = self._kind.names(labels), self._some_records(len(labels))
        for _, measure in self._measures:
            try:
                found += map(str, measure(records, labels))
            except Exception:
                return [*found, *self._asked]
        return found

    def _with_more(self, records: Tensor, labels: Tensor, strict: bool) -> Metrics:
        found = dict(self._kind.metrics(records, labels))
        for path, measure in self._measures:
            try:
                more = {str(name): float(value) for name, value in measure(records, labels).items()}
            except Exception as error:
                if not strict:
                    continue
                raise ConfigError(f"task.metrics: {path} fails: {type(error).__name__}: {error}") from error
            if twice := sorted(more.keys() & found.keys()):
                raise ConfigError(f"task.metrics: {path} gives {listing(twice)}, which there is already")
            if lower := sorted(more.keys() & set(LOWER_IS_BETTER)):
                raise ConfigError(f"task.metrics: {path} gives {listing(lower)}, of which less is better: another name")
            found |= {name: value for name, value in more.items() if not math.isnan(value)}
        return found

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return self._kind.predictions(records, names)


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


class CollateProcessor:
    """Makes inputs of a split by the user's function: a list of inputs -> the model's arguments by name, [size, ...] each.

    For `causal_lm` of pairs (input, answer); it gives `labels` [size, tokens] too, -100 where nothing is learned.
    Whatever generator it uses starts from (seed, epoch, examples of the batch).
    """

    def __init__(self, config: Config) -> None:
        self._path, self._seed = str(config.data.collate), config.seed
        self._collate: Collate = _function(self._path, config, "data.collate")
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

    def save(self, folder: Path) -> None:
        return None


def _function(path: str, config: Config, what: str) -> Any:
    found = find_object(path, config.import_roots, what)
    if not callable(found):
        raise ConfigError(f"{what}: {path} is no function")
    return found
