"""Loads the adapted model of a finished run, to use it on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.trust import require_trust
from ..data.batches import Examples
from ..data.splits import READING, Split, name_of
from ..distributed import collectives
from ..distributed.world import World
from ..engines.prepared import WrapOptions
from ..engines.wrap import prepare
from ..errors import ConfigError, RunError, listing
from ..files import read_json
from ..runs.folder import RunFolder
from ..train.task_model import TaskModel, build_for_task

# Keys of the data's source: if one of them is overridden, the run's own values of all of them are dropped.
_SOURCES = ("data.path", "data.train", "data.validation", "data.test", "data.build")


# What may differ from the run: the data, and how the model goes through them.
_FREE = ("--data.", "--engine", "--sharding.", "--import_roots", "--test_resamples", "--train.evaluation_batch")


def load_adapted(
    run: Path, overrides: Sequence[str], world: World, trust: bool = False, own_data: bool = False
) -> TaskModel:
    """Reads the exported model of a finished run. Collective.

    Args:
        run: folder of the run.
        overrides: command-line words that change the run's configuration, such as `--data.path` and its value; only the
            data, the engine and a few settings of the evaluation may change.
        world: the joined ranks; with one rank the engine is `single`.
        trust: whether the code that the run names may be imported (see `config.trust`).
        own_data: whether the data of the run itself are meant, so that `overrides` need not name any.

    Returns:
        The model under its engine, with an optimizer that changes nothing.

    Raises:
        RunError: the folder has no finished run, the run has no exported model, or volumes were read otherwise then.
        ConfigError: an override may not change, or the data are missing.
        DamagedError: configuration or model are not those that the run wrote.
        TrustError: the run names code, and the user has not said that it may run.
    """
    folder = RunFolder(run)
    unknown = [word for word in overrides if word.startswith("--") and not word.startswith(_FREE)]
    if unknown:
        raise ConfigError(f"{listing(unknown)}: a finished run takes other data, not other settings")
    new_sources = [key for key in _SOURCES if any(word.split("=")[0] == f"--{key}" for word in overrides)]
    config, facts = folder.finished()
    if any(word.startswith("--data.") for word in overrides) and config.task.name != "own":
        raise ConfigError(f"--data.*: {run} has the task {config.task.name}, which brings its own data: leave --data out")
    if new_sources:  # drop the run's own sources, or both would be mixed
        config, facts = folder.finished(overrides, (*_SOURCES, "data.external_tests"))
    elif config.task.name == "own" and not own_data:
        raise ConfigError(f"which data? Give one of {', '.join(f'--{key}' for key in _SOURCES)}, as in the configuration")
    else:
        config, facts = folder.finished(overrides)
    require_trust(config, run, trust, overrides)
    folder.require_unaltered()
    normalised = config.data.modality == "volume" and config.data.window is None
    if normalised and read_json(folder.summary).get("reading", 1) < READING:
        raise RunError(f"{run}: it was trained before voxels of 0 were normalised, so its inputs would differ: train again")
    if not folder.model.is_dir():
        raise RunError(f"{folder.model} is missing: it was deleted, or the run had checkpoint.keep_last = 0")
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
    """The split as inputs of the model. Collective.

    Args:
        adapted: the finished run's model.
        split: the examples.

    Raises:
        DataError: an input cannot be read (checked unless `data.check` is off).
    """
    processor = adapted.pretrained.processor
    with collectives.agreed("read the data"):
        if adapted.config.data.check:
            processor.check([split], adapted.world.rank, adapted.world.world_size)
        return processor(split)


def _no_optimizer(weights: Sequence[tuple[str, nn.Parameter, bool]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter, _ in weights], lr=0.0)


def identify(split: Split, indices: Sequence[int]) -> dict[str, list[Any]]:
    """The columns `input` and `group`, which identify examples in a table.

    Args:
        split: the examples.
        indices: which of them, in the order of the rows.
    """
    inputs = [name_of(split.inputs[i], str(i)) for i in indices]
    return {"input": inputs, "group": [split.groups[i] for i in indices]}
