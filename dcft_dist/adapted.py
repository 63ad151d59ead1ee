"""The adapted model of a finished run, put to use on other data: metrics and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import collectives
from .data import Examples
from .engines.wrap import Plan, Prepared, prepare
from .errors import ConfigError, RunError, listing
from .evaluate import Evaluation, evaluate
from .kinds import make_objective
from .models import build_model
from .objective import Objective, intervals
from .own_data import other_split
from .pretrained import Pretrained
from .run_folder import RunFolder
from .schema import Config
from .splits import Split, name_of
from .tasks import load_task
from .weights import load_weights
from .world import World

# What may differ from the run: the data, and how they are gone through.
_SOURCES = ("data.path", "data.train", "data.validation", "data.test", "data.build")
_FREE = ("--data.", "--engine", "--sharding.", "--import_roots", "--test_resamples", "--train.evaluation_batch")


@dataclass(frozen=True)
class Adapted:
    """A finished run's model, ready to be evaluated."""

    config: Config
    facts: dict[str, Any]
    objective: Objective
    pretrained: Pretrained
    prepared: Prepared
    world: World

    def evaluate(self, split: Split) -> tuple[Evaluation, Examples]:
        """Collective."""
        examples = self.read(split)
        outputs, computing, size = self.pretrained.outputs, self.prepared.computing, self.config.evaluation_batch
        model = self.prepared.model
        return evaluate(model, outputs, examples, self.objective, self.world, computing, size), examples

    def read(self, split: Split) -> Examples:
        """The examples as the model takes them, once they are checked. Collective."""
        processor = self.pretrained.processor
        with collectives.agreed("read the data"):
            if self.config.data.check:
                processor.check([split], self.world.rank, self.world.world_size)
            return processor(split)


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
    given = [key for key in _SOURCES if any(word.split("=")[0] == f"--{key}" for word in overrides)]
    config, facts = folder.finished()
    if any(word.startswith("--data.") for word in overrides) and config.task.name != "own":
        raise ConfigError(f"{run} is of the task {config.task.name}: it has its own data")
    if given:  # of the run's own data nothing may be left over
        config, facts = folder.finished(overrides, _SOURCES)
    elif config.task.name == "own":
        raise ConfigError(f"which data? Give one of {', '.join(f'--{key}' for key in _SOURCES)}, as in the configuration")
    else:
        config, facts = folder.finished(overrides)
    if not folder.model.is_dir():
        raise RunError(f"{run} has no model any more")
    objective = make_objective(config, facts)
    pretrained = build_model(config, objective.num_outputs)
    engine = config.engine if world.world_size > 1 else "single"
    stage, bf16 = config.sharding.zero_stage, config.train.precision == "bf16"
    plan = Plan(engine, world.device, pretrained.blocks, bf16=bf16, zero_stage=stage)
    prepared = prepare(pretrained.module, plan, _no_optimizer)
    for prefix, part in pretrained.parts.items():
        load_weights(prepared.model, folder.model / part.folder, prefix=prefix, stem=part.stem)
    return Adapted(config, facts, objective, pretrained, prepared, world)


def _no_optimizer(weights: Sequence[tuple[str, nn.Parameter, bool]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter, _ in weights], lr=0.0)


def given_split(adapted: Adapted, labelled: bool) -> Split:
    """The examples that the overrides name, or the test split of a task that is not the user's.

    Raises:
        DataError: see `own_task`.
    """
    if adapted.config.task.name != "own":
        return load_task(adapted.config).test
    return other_split(adapted.config, adapted.facts["names"], labelled)


def report_of(adapted: Adapted, split: Split, found: Evaluation, examples: Examples) -> dict[str, Any]:
    """Metrics with their intervals, as JSON. Collective."""
    groups = [split.groups[i] for i in found.indices]
    labels = torch.tensor([examples.labels[i] for i in found.indices])
    spread = intervals(adapted.objective, found.records, labels, groups, adapted.config.test_resamples)
    return {"examples": len(split), "groups": len(set(groups)), "metrics": found.metrics, "intervals": spread}


def predictions_of(adapted: Adapted, split: Split, found: Evaluation) -> dict[str, list[Any]]:
    """Columns of a table: input, group, and what the model says."""
    columns = adapted.objective.predictions(found.records, adapted.facts["names"])
    if "predicted" in columns and adapted.config.task.kind == "single_label":
        columns["predicted"] = [adapted.facts["names"][i] for i in columns["predicted"]]
    return named(split, found.indices.tolist()) | columns


def named(split: Split, indices: Sequence[int]) -> dict[str, list[Any]]:
    """The columns that tell which examples these are."""
    inputs = [name_of(split.inputs[i], str(i)) for i in indices]
    return {"input": inputs, "group": [split.groups[i] for i in indices]}
