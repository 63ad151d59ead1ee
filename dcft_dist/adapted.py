"""The adapted model of a finished run, put to use on other data: metrics and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .engines.wrap import Plan, Prepared, prepare, shards_weights
from .errors import ConfigError, RunError, listing
from .evaluate import Evaluation, evaluate
from .images import OwnImageProcessor
from .kinds import make_objective
from .meta import Materialiser
from .models import build_model
from .objective import Objective, intervals
from .own_data import other_split
from .pretrained import Pretrained
from .run_folder import RunFolder
from .schema import Config
from .splits import Split
from .tasks import load_task
from .weights import load_weights
from .world import World

# What may differ from the run: the data, and how they are gone through.
_FREE = ("--data.", "--engine", "--sharding.", "--import_roots", "--test_resamples")


@dataclass(frozen=True)
class Adapted:
    """A finished run's model, ready to be evaluated."""

    config: Config
    facts: dict[str, Any]
    objective: Objective
    pretrained: Pretrained
    prepared: Prepared
    world: World

    def evaluate(self, split: Split) -> Evaluation:
        """Collective."""
        processor = self.pretrained.processor
        if isinstance(processor, OwnImageProcessor) and self.config.data.check:
            processor.check([split], self.world.rank, self.world.world_size)
        outputs, computing = self.pretrained.outputs, self.prepared.computing
        return evaluate(self.prepared.model, outputs, processor(split), self.objective, self.world, computing)


def load_adapted(run: Path, overrides: Sequence[str], world: World) -> Adapted:
    """Reads the exported model of a run. Collective.

    Raises:
        RunError: there is no finished run with its model there.
        ConfigError: an override is of something else than the data and the engine.
    """
    folder = RunFolder(run)
    odd = [word for word in overrides if word.startswith("--") and not word.startswith(_FREE)]
    if odd:
        raise ConfigError(f"{listing(odd)}: a finished run takes other data, not other settings")
    config, facts = folder.finished(overrides)
    if not folder.model.is_dir():
        raise RunError(f"{run} has no model any more")
    objective = make_objective(config.task, facts)
    pretrained = build_model(config, objective.num_outputs)
    engine = config.engine if world.world_size > 1 else "single"
    plan = Plan(engine, world.device, pretrained.blocks, bf16=config.train.precision == "bf16")
    if not shards_weights(plan):
        Materialiser(world.device)(pretrained.module)
    prepared = prepare(pretrained.module, plan, _no_optimizer)
    for prefix, part in pretrained.parts.items():
        load_weights(prepared.model, folder.model / part, prefix=prefix)
    return Adapted(config, facts, objective, pretrained, prepared, world)


def _no_optimizer(weights: Sequence[tuple[str, nn.Parameter, bool]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter, _ in weights], lr=0.0)


def given_split(adapted: Adapted, overrides: Sequence[str], labelled: bool) -> Split:
    """The examples that the overrides name, or the test split of a task that is not the user's.

    Raises:
        ConfigError: the user's data are not said.
        DataError: see `own_task`.
    """
    if adapted.config.task.name != "own":
        return load_task(adapted.config).test
    if not any(word.startswith("--data.") for word in overrides):
        raise ConfigError("which data? Give them as in the configuration: --data.path new.csv")
    return other_split(adapted.config, adapted.facts["names"], labelled)


def report_of(adapted: Adapted, split: Split, found: Evaluation) -> dict[str, Any]:
    """Metrics with their intervals, as JSON."""
    groups = [split.groups[i] for i in found.indices]
    labels = torch.tensor([split.labels[i] for i in found.indices])
    resamples = adapted.config.test_resamples
    spread = intervals(adapted.objective, found.records, labels, groups, resamples) if resamples else None
    return {"examples": len(split), "groups": len(set(groups)), "metrics": found.metrics, "intervals": spread}


def predictions_of(adapted: Adapted, split: Split, found: Evaluation) -> dict[str, list[Any]]:
    """Columns of a table: input, group, and what the model says."""
    columns = adapted.objective.predictions(found.records, adapted.facts["names"])
    if "predicted" in columns and adapted.config.task.kind == "single_label":
        columns["predicted"] = [adapted.facts["names"][i] for i in columns["predicted"]]
    indices = found.indices.tolist()
    inputs = [str(split.inputs[i]) if isinstance(split.inputs[i], str | Path) else str(i) for i in indices]
    return {"input": inputs, "group": [split.groups[i] for i in indices], **columns}
