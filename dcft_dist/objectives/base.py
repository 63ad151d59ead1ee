"""The base class of objectives: the loss, the record of each evaluated example, and the metrics computed from records.

A record does not depend on other examples, and metrics are computed from the records of all examples in order. So metrics
are the same for any number of ranks, and can be computed again on a resampled test set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from ..errors import ConfigError

Metrics = dict[str, float]

LOWER_IS_BETTER = ("loss", "ece", "mae", "rmse", "perplexity", "hd95")


def oriented(name: str, value: float) -> float:
    """Returns the value of a metric, negated if lower is better, so that higher is always better.

    Args:
        name: name of the metric.
        value: value of the metric.
    """
    return -value if name in LOWER_IS_BETTER else value


class Objective(ABC):
    """The loss and the metrics of a kind of task.

    Attributes:
        num_outputs: number of outputs of the head.
        best: the metric that chooses the best epoch if the configuration names none.
        width: number of values in a record.
    """

    num_outputs: int
    best: str
    width: int

    def whole(self, call: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Returns the model's outputs for a batch of whole examples in an evaluation. Collective.

        Args:
            call: runs the model on a batch.
            batch: tensors [size, ...] by name.
        """
        return call(batch)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of a batch.

        Args:
            outputs: the model's outputs [size, ...].
            labels: labels [size, ...].
        """
        return self.losses(outputs.float(), labels).mean()

    def check(self, outputs: Tensor) -> None:
        """Checks the shape of the model's outputs.

        Raises:
            ConfigError: outputs are not [size, num_outputs].
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.num_outputs:
            raise ConfigError(
                f"the model returns outputs of shape {list(outputs.shape)}, not [size, {self.num_outputs}]: set the number "
                'in model.args, such as num_classes = "num_outputs" (num_labels in transformers), or use model.features'
            )

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each example, [size]."""

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the record of each example, [size, width] of float64."""
        return outputs.double()

    @abstractmethod
    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        """Computes the metrics of all examples; leaves out those that are not defined for them.

        Args:
            records: [size, width].
            labels: [size, ...].
        """

    def names(self, labels: Tensor) -> list[str]:
        """Returns the names of the metrics that are defined for examples with these labels."""
        return list(self.metrics(self._some_records(len(labels)), labels))

    def resampled(self, records: Tensor, labels: Tensor) -> Metrics:
        """Computes the metrics of a resample; leaves out those that cannot be computed for it."""
        return self.metrics(records, labels)

    def _some_records(self, number: int) -> Tensor:
        return torch.rand(number, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    @abstractmethod
    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Returns the columns of a table of predictions.

        Args:
            records: [size, width].
            names: names of the classes or findings.
        """

    def chance(self) -> Metrics:
        """Returns loss and metrics of a model that guesses; {} if they depend on the data."""
        return {}


def intervals(
    objective: Objective, records: Tensor, labels: Tensor, groups: Sequence[str], resamples: int, seed: int = 0
) -> dict[str, list[float]] | None:
    """Computes 95 % confidence intervals of the metrics by a percentile bootstrap over groups, such as patients. Collective.

    Each rank computes a part of the resamples. The groups drawn do not depend on the number of ranks.

    Args:
        objective: computes the metrics.
        records: [size, width].
        labels: [size, ...].
        groups: group of each example; groups are resampled as a whole.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Returns:
        [low, high] of each metric but `ece`; None if `resamples` is 0. Examples that are drawn twice make the calibration
        error of a resample larger, so its quantiles would lie above the error itself.
    """
    if not resamples:
        return None
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    indices_of_groups = [torch.tensor(indices) for indices in members.values()]
    names = [name for name in objective.metrics(records, labels) if name != "ece"]
    values = torch.zeros(resamples, len(names), dtype=torch.float64)
    with collectives.agreed("confidence intervals"):
        for number in range(collectives.rank(), resamples, collectives.world_size()):
            generator = torch.Generator().manual_seed((seed << 32) + number)
            drawn = torch.randint(len(indices_of_groups), (len(indices_of_groups),), generator=generator).tolist()
            indices = torch.cat([indices_of_groups[i] for i in drawn])
            metrics = objective.resampled(records[indices], labels[indices])
            values[number] = torch.tensor([metrics.get(name, float("nan")) for name in names])
    values = collectives.all_reduce(values, what="confidence intervals")
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: column.nanquantile(ends).tolist() for name, column in zip(names, values.T, strict=True)}
