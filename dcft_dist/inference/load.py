"""The adapted model of a finished run, put to use on other data: metrics and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Examples
from ..data.splits import Split, name_of
from ..distributed import collectives
from ..distributed.world import World
from ..engines.prepared import WrapOptions
from ..engines.wrap import prepare
from ..errors import ConfigError, RunError, listing
from ..runs.folder import RunFolder
from ..train.task_model import TaskModel, build_for_task

# What may differ from the run: the data, and how they are gone through.
_SOURCES = ("data.path", "data.train", "data.validation", "data.test", "data.build")


_FREE = ("--data.", "--engine", "--sharding.", "--import_roots", "--test_resamples", "--train.evaluation_batch")


def load_adapted(run: Path, overrides: Sequence[str], world: World) -> TaskModel:
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
    objective, pretrained = build_for_task(config, facts)
    engine = config.engine if world.world_size > 1 else "single"
    options = WrapOptions(
        engine,
        world.device,
        pretrained.blocks,
        bf16=config.train.precision == "bf16",
        zero_stage=config.sharding.zero_stage,
        import_roots=config.import_roots,
    )
    prepared = prepare(pretrained.module, options, _no_optimizer)
    pretrained.load(prepared.model, folder.model)
    return TaskModel(config, world, facts, objective, pretrained, prepared)


def read_examples(adapted: TaskModel, split: Split) -> Examples:
    """The examples as the model takes them, checked first unless `data.check` is off. Collective."""
    processor = adapted.pretrained.processor
    with collectives.agreed("read the data"):
        if adapted.config.data.check:
            processor.check([split], adapted.world.rank, adapted.world.world_size)
        return processor(split)


def _no_optimizer(weights: Sequence[tuple[str, nn.Parameter, bool]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter, _ in weights], lr=0.0)


def identify(split: Split, indices: Sequence[int]) -> dict[str, list[Any]]:
    """The columns that tell which examples these are."""
    inputs = [name_of(split.inputs[i], str(i)) for i in indices]
    return {"input": inputs, "group": [split.groups[i] for i in indices]}
