"""A wrapped model with the objective of its task: outputs, losses and metrics, during a run and after it.

Padding samples never count, and metrics do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..data.batches import Batch, Examples, evaluation_batches
from ..data.splits import Split, file_of
from ..distributed import collectives
from ..distributed.world import World
from ..engines.find import find_engine
from ..engines.prepared import Prepared
from ..errors import DivergedError
from ..models.build import build_model
from ..models.pretrained import Pretrained
from ..objectives.base import Metrics, Objective
from ..objectives.make import make_objective


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split, and the records of its examples that the metrics are computed from.

    Attributes:
        metrics: metric -> value.
        records: [size, width] in float64; what the objective keeps of each example.
        indices: [size], ascending; the example of each record.
        broken: examples for which an output of the model is NaN, ascending.
    """

    metrics: Metrics
    records: Tensor
    indices: Tensor
    broken: list[int]

    def require_numbers(self, split: Split, what: str) -> None:
        """Checks that the model has given numbers for every example.

        Args:
            split: the examples.
            what: name of the split, for the message.

        Raises:
            DivergedError: it has not; the message names the first example.
        """
        if self.broken:
            first, total = self.broken[0], len(self.indices)
            place = file_of(split.inputs[first])
            where = "the weights" if len(self.broken) == total else "the inputs, or in the weights"
            raise DivergedError(
                f"the model's output is NaN for {len(self.broken)} of {total} {what} examples, first for example {first} "
                f"{place}: there is a NaN in {where}"
            )


@dataclass(frozen=True)
class TaskModel:
    """A model under an engine, with the objective of its task.

    Attributes:
        config: configuration of the run.
        world: the joined ranks.
        facts: what the objective needs to know of the training labels (`objectives.make.label_facts`).
        objective: loss and metrics of the task.
        pretrained: the unwrapped model with its head.
        prepared: the wrapped model with its optimizer.
    """

    config: Config
    world: World
    facts: dict[str, Any]
    objective: Objective
    pretrained: Pretrained
    prepared: Prepared

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        model: nn.Module = self.prepared.model
        return model

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's outputs for a batch: [size, num_outputs], or another shape that the objective takes.

        Args:
            model: the wrapped model, or the unwrapped one.
            batch: inputs by name, with `labels`, `index` and `real`.

        Raises:
            ConfigError: the objective does not take outputs of this shape.
        """
        outputs = self.pretrained.outputs(model, batch)
        self.objective.check(outputs)
        return outputs

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar.

        Args:
            model: the wrapped model, or the unwrapped one.
            batch: inputs by name, with `labels`, `index` and `real`.
        """
        with self.prepared.computing():
            outputs = self.outputs(model, batch)
        return self.objective.loss(outputs, batch["labels"])

    def whole(self, batch: Batch) -> Tensor:
        """The model's outputs for whole examples, as an evaluation takes them. Collective.

        Args:
            batch: inputs by name, with `labels`, `index` and `real`.
        """
        with self.prepared.computing():
            return self.objective.whole(partial(self.outputs, self.model), batch)

    @torch.no_grad()
    def evaluate(self, examples: Examples, limit: int | None = None) -> Evaluation:
        """Evaluates a split in eval mode, then restores the model's mode. Collective.

        Args:
            examples: the split as inputs of the model.
            limit: evaluate only this many examples, evenly spaced; None: all.
        """
        model, world, size = self.model, self.world, self.config.evaluation_batch
        local: list[Tensor] = []
        training = model.training
        model.eval()
        try:
            for batch in evaluation_batches(examples, world.data_rank, world.data_ranks, size, world.device, limit):
                outputs = self.whole(batch)
                real = batch["real"]
                records = self.objective.records(outputs[real].float(), batch["labels"][real])
                broken = outputs[real].isnan().reshape(int(real.sum()), outputs[0].numel()).any(1)
                columns = torch.stack([batch["index"][real].double(), broken.double()], 1)
                local.append(torch.cat([columns, records], 1).cpu())
        finally:
            model.train(training)
            find_engine(model).settle()
        mine = torch.cat(local)
        rows = gather_rows(mine if world.rank % world.together == 0 else mine[:0])
        rows = rows[rows[:, 0].argsort()]
        indices, broken, records = rows[:, 0].long(), rows[:, 1].bool(), rows[:, 2:]
        labels = torch.tensor([examples.labels[i] for i in indices.tolist()])
        return Evaluation(self.objective.metrics(records, labels), records, indices, indices[broken].tolist())


def build_for_task(config: Config, facts: Mapping[str, Any]) -> tuple[Objective, Pretrained]:
    """The objective of a configuration, and its model with a head of the right size, not wrapped yet.

    Args:
        config: configuration of the run.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.

    Raises:
        DcftError: see `build_model`.
    """
    objective = make_objective(config, facts)
    return objective, build_model(config, objective.num_outputs)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order: [sum of sizes, width]. Collective.

    Args:
        rows: this rank's rows, [size, width]; the size may be 0.
    """
    sizes = [n for (n,) in collectives.all_gather_ints([rows.numel()], what="count of evaluated examples")]
    return collectives.all_gather_uneven(rows.flatten(), sizes, what="evaluated examples").view(-1, rows.shape[1])
