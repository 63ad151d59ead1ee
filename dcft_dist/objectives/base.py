"""What a model is trained for: its loss, what is kept of each example that is evaluated, and the metrics made of that.

What is kept of an example does not depend on the others, and metrics are made of all examples in their order. So they
are the same for every number of ranks, and can be made again of a resampled test set.
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
    """A metric's value, or its negative, so that the higher is the better."""
    return -value if name in LOWER_IS_BETTER else value


class Objective(ABC):
    """`num_outputs`: of the head. `best`: the metric that chooses the epoch, if the configuration says none. `width`: of
    records."""

    num_outputs: int
    best: str
    width: int

    def whole(self, call: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Outputs for a batch of whole examples in an evaluation. `call`: the model. Collective."""
        return call(batch)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return self.losses(outputs.float(), labels).mean()

    def check(self, outputs: Tensor) -> None:
        """
        Raises:
            ConfigError: outputs are not [size, num_outputs].
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.num_outputs:
            raise ConfigError(
                f"the model gives outputs of shape {list(outputs.shape)}, not [size, {self.num_outputs}]: say the number in "
                'model.args, such as num_classes = "num_outputs" (num_labels in transformers), or use model.features'
            )

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[size]: the loss of each example."""

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[size, width] of float64: what is kept of each example."""
        return outputs.double()

    @abstractmethod
    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        """Of records [size, width] and labels [size, ...] of all examples; what is not defined for them is left out."""

    def names(self, labels: Tensor) -> list[str]:
        """Of the metrics that examples with these labels would have."""
        return list(self.metrics(self._some_records(len(labels)), labels))

    def resampled(self, records: Tensor, labels: Tensor) -> Metrics:
        """The metrics of some of the examples; what cannot be computed of them is left out."""
        return self.metrics(records, labels)

    def _some_records(self, number: int) -> Tensor:
        return torch.rand(number, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    @abstractmethod
    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of a table of predictions; `names`: of classes or findings."""

    def chance(self) -> Metrics:
        """Loss, and metrics, of a model that knows nothing; {} if that depends on the data."""
        return {}


def intervals(
    objective: Objective, records: Tensor, labels: Tensor, groups: Sequence[str], resamples: int, seed: int = 0
) -> dict[str, list[float]] | None:
    """Metric -> [low, high], which hold 95 % of it over resampled groups of examples (patients; percentile bootstrap).

    None without resamples. Collective: each rank makes its part of them; the groups drawn do not depend on it.
    """
    if not resamples:
        return None
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    parts = [torch.tensor(part) for part in members.values()]
    names = list(objective.metrics(records, labels))
    found = torch.zeros(resamples, len(names), dtype=torch.float64)
    with collectives.agreed("intervals"):
        for number in range(collectives.rank(), resamples, collectives.world_size()):
            draw = torch.Generator().manual_seed((seed << 32) + number)
            chosen = torch.randint(len(parts), (len(parts),), generator=draw).tolist()
            index = torch.cat([parts[i] for i in chosen])
            values = objective.resampled(records[index], labels[index])
            found[number] = torch.tensor([values.get(name, float("nan")) for name in names])
    found = collectives.all_reduce(found, what="intervals")
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: column.nanquantile(ends).tolist() for name, column in zip(names, found.T, strict=True)}
