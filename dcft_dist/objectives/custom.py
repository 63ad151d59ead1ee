"""The user's own loss and metrics, named by import path in `task.loss` and `task.metrics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, listing
from ..imports import find_function
from .base import LOWER_IS_BETTER, Metrics, Objective
from .losses import Loss, named_loss

Measure = Callable[[Tensor, Tensor], Metrics]  # (records [size, width], labels [size, ...]) -> value by name
Call = Callable[[dict[str, Tensor]], Tensor]  # runs the model on a batch


class CustomObjective(Objective):
    """A built-in objective with the user's loss, or with the user's metrics in addition to the built-in ones.

    Everything else comes from the built-in objective.
    """

    def __init__(self, builtin: Objective, config: Config) -> None:
        """Imports the user's functions.

        Args:
            builtin: the built-in objective of the task's kind.
            config: names the functions in `task.loss` and `task.metrics`.

        Raises:
            ConfigError: an import path leads to no function.
        """
        self._builtin = builtin
        self.num_outputs, self.best, self.width = builtin.num_outputs, builtin.best, builtin.width
        roots = config.import_roots
        self._loss_path = config.task.loss
        self._loss = _loss(builtin, config) if config.task.loss else None
        self._measures: list[tuple[str, Measure]] = [
            (path, find_function(path, roots, "task.metrics")) for path in config.task.metrics
        ]
        self._chooses_epoch = [config.train.metric] if config.train.metric else []

    # -- from the built-in objective ---------------------------------------------------------------------------------

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

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels) if self._loss else self._builtin.loss(outputs, labels)

    # -- from the user -----------------------------------------------------------------------------------------------

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each example, [size].

        Raises:
            ConfigError: the user's loss does not return one value for each example.
        """
        if self._loss is None:
            return self._builtin.losses(outputs, labels)
        losses = self._loss(outputs, labels)
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            returned = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(
                f"task.loss: {self._loss_path} returns {returned} for {len(outputs)} examples, not [{len(outputs)}]: "
                "return the loss of each example, such as with reduction = 'none'"
            )
        return losses

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        """Computes the built-in metrics and the user's; leaves out those that are NaN.

        Raises:
            ConfigError: the user's function fails or does not return numbers by name. Or it returns a name that exists
                already, or a name for which lower is better.
        """
        return self._with_custom(records, labels, strict=True)

    def resampled(self, records: Tensor, labels: Tensor) -> Metrics:
        return self._with_custom(records, labels, strict=False)

    def names(self, labels: Tensor) -> list[str]:
        """Returns the names of the metrics, from a trial of the user's functions on random records.

        If a function fails on them, it is assumed to return the metric that chooses the epoch (`train.metric`).
        """
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
            if duplicates := sorted(custom.keys() & metrics.keys()):
                raise ConfigError(f"task.metrics: {path} returns {listing(duplicates)}, which exists already: rename it")
            if lower := sorted(custom.keys() & set(LOWER_IS_BETTER)):
                raise ConfigError(
                    f"task.metrics: {path} returns {listing(lower)}, a name for which lower is better: rename it"
                )
            metrics |= {name: value for name, value in custom.items() if not math.isnan(value)}
        return metrics


def _loss(builtin: Objective, config: Config) -> Loss:
    task = config.task
    if task.loss_by_name:
        return named_loss(task.kind, str(task.loss), task.loss_args, builtin)
    function: Loss = find_function(str(task.loss), config.import_roots, "task.loss")
    return function
