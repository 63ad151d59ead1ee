"""The user's loss and metrics, by import path: `task.loss` and `task.metrics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, listing
from ..imports import find_function
from .base import LOWER_IS_BETTER, Metrics, Objective

Measure = Callable[[Tensor, Tensor], Metrics]  # records [size, width], labels [size, ...] -> value by name
Call = Callable[[dict[str, Tensor]], Tensor]


class CustomObjective(Objective):
    """A built-in objective with the user's loss, or with further metrics. Everything else is that objective's."""

    def __init__(self, builtin: Objective, config: Config) -> None:
        """
        Raises:
            ConfigError: an import path leads to nothing that can be called.
        """
        self._builtin = builtin
        self.num_outputs, self.best, self.width = builtin.num_outputs, builtin.best, builtin.width
        roots = config.import_roots
        self._loss_path = config.task.loss
        self._loss = find_function(config.task.loss, roots, "task.loss") if config.task.loss else None
        self._measures: list[tuple[str, Measure]] = [
            (path, find_function(path, roots, "task.metrics")) for path in config.task.metrics
        ]
        self._chooses_epoch = [config.train.metric] if config.train.metric else []

    # -- the built-in objective's ------------------------------------------------------------------------------------

    def whole(self, call: Call, batch: dict[str, Tensor]) -> Tensor:
        return self._builtin.whole(call, batch)

    def check(self, outputs: Tensor) -> None:
        self._builtin.check(outputs)

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self._builtin.records(outputs, labels)

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        return self._builtin.predictions(records, names)

    def chance(self) -> Metrics:
        return self._builtin.chance()

    # -- the user's --------------------------------------------------------------------------------------------------

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """
        Raises:
            ConfigError: the user's loss does not return one value for each example.
        """
        if self._loss is None:
            return self._builtin.losses(outputs, labels)
        losses = self._loss(outputs, labels)
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            returned = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(
                f"task.loss: {self._loss_path} gives {returned} for {len(outputs)} examples, not [{len(outputs)}], "
                "the loss of each: reduction = 'none'"
            )
        return losses

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        """
        Raises:
            ConfigError: the user's metrics are no numbers by name, or have names that exist already.
        """
        return self._with_custom(records, labels, strict=True)

    def resampled(self, records: Tensor, labels: Tensor) -> Metrics:
        return self._with_custom(records, labels, strict=False)

    def names(self, labels: Tensor) -> list[str]:
        """Tries the user's functions on made-up records. If one fails there, the metric that chooses the epoch is taken
        to be one of its own."""
        names, records = self._builtin.names(labels), self._some_records(len(labels))
        for _, measure in self._measures:
            try:
                names += map(str, measure(records, labels))
            except Exception:
                return [*names, *self._chooses_epoch]
        return names

    def _with_custom(self, records: Tensor, labels: Tensor, strict: bool) -> Metrics:
        metrics = dict(self._builtin.metrics(records, labels))
        for path, measure in self._measures:
            try:
                custom = {str(name): float(value) for name, value in measure(records, labels).items()}
            except Exception as error:
                if not strict:
                    continue
                raise ConfigError(f"task.metrics: {path} fails: {type(error).__name__}: {error}") from error
            if twice := sorted(custom.keys() & metrics.keys()):
                raise ConfigError(f"task.metrics: {path} gives {listing(twice)}, which there is already")
            if lower := sorted(custom.keys() & set(LOWER_IS_BETTER)):
                raise ConfigError(f"task.metrics: {path} gives {listing(lower)}, of which less is better: another name")
            metrics |= {name: value for name, value in custom.items() if not math.isnan(value)}
        return metrics
