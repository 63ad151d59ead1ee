"""What all phases of a run share: its data, its model, and one way to compute losses and metrics."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import collectives
from .config import check_sizes
from .data import Batch, Examples, micro_batches
from .engines.wrap import Plan, Prepared, prepare, shards_weights
from .errors import ConfigError, DivergedError, did_you_mean
from .evaluate import Evaluation, evaluate
from .kinds import facts_of, make_objective
from .methods import choose_trained, depths
from .models import build_model
from .objective import Metrics, Objective
from .optim import make_optimizer
from .pretrained import Pretrained
from .run_dir import RunDirectory
from .schema import Config
from .splits import TaskData
from .tasks import load_task
from .volumes import VolumeProcessor
from .world import World


@dataclass(frozen=True)
class Job:
    """A run with its data and its model under the engine. `head`: a plain copy of the head, if it is one module;
    `facts`: of the labels, see `kinds.facts_of`."""

    config: Config
    world: World
    directory: RunDirectory
    task: TaskData
    objective: Objective
    pretrained: Pretrained
    prepared: Prepared
    head: nn.Module | None
    num_weights: int
    facts: dict[str, Any]
    train: Examples
    validation: Examples
    test: Examples

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        found: nn.Module = self.prepared.model
        return found

    @property
    def metric(self) -> str:
        """The metric that chooses the epoch."""
        return self.config.train.metric or self.objective.best

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.config.train.global_batch

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model makes of a batch.

        Raises:
            ConfigError: they are not what the task's objective takes.
        """
        found = self.pretrained.outputs(model, batch)
        self.objective.check(found)
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        with self.prepared.computing():
            outputs = self.outputs(model, batch)
        return self.objective.loss(outputs, batch["labels"])

    def evaluate(self, examples: Examples, limit: int | None = None) -> Evaluation:
        """Collective."""
        computing, size = self.prepared.computing, self.config.evaluation_batch
        return evaluate(self.model, self.outputs, examples, self.objective, self.world, computing, size, limit)

    def validate(self, when: str) -> Metrics:
        """Metrics on the validation data. Collective.

        Raises:
            DivergedError: the loss is no number.
        """
        found = self.evaluate(self.validation).metrics
        if not math.isfinite(found["loss"]):
            why = "the learning rate is too high, or there is a NaN in the weights or the data"
            raise DivergedError(f"the validation loss is {found['loss']} {when}: {why}")
        return found

    def micro_batches(
        self,
        indices: Sequence[int],
        examples: Examples,
        draw: int | None = None,
        device: torch.device | None = None,
    ) -> list[Batch]:
        """This rank's part of a global batch. `draw`: which random variant of the examples."""
        world, size = self.world, micro_batch(self.config, len(indices), self.world.world_size)
        return micro_batches(indices, world.rank, world.world_size, size, examples, device or world.device, draw)

    def progress_bar(self, items: Any, what: str, **options: Any) -> Any:
        off = not self.world.is_first or bool(os.environ.get("TQDM_DISABLE"))
        return tqdm(items, desc=f"{self.config.name}: {what}", disable=off, mininterval=2.0, **options)


@dataclass(frozen=True)
class Materials:
    """What a run is made of, before any engine. `facts`: of the labels, see `kinds.facts_of`."""

    task: TaskData
    facts: dict[str, Any]
    objective: Objective
    pretrained: Pretrained
    examples: dict[str, Examples]


def gather(config: Config, rank: int = 0, ranks: int = 1, read: bool = True) -> Materials:
    """Reads the data, and builds the model without its weights.

    Args:
        read: whether this rank's part of the inputs is looked at.

    Raises:
        DcftError: see `load_task`, `build_model` and `Processor.check`.
    """
    task = load_task(config)
    facts = facts_of(config, task.class_names, task.train.labels)
    objective = make_objective(config, facts)
    pretrained = build_model(config, objective.num_outputs)
    several = pretrained.head and pretrained.head_module() is None
    if several and config.engine == "deepspeed" and config.head_warmup.max_epochs:
        raise ConfigError("a head of several modules cannot be warmed up under deepspeed: head_warmup.max_epochs = 0")
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    examples = {name: pretrained.processor(split) for name, split in splits.items()}
    check_sizes(config, len(examples["train"]))
    _check_metric(config, objective, examples["validation"])
    if read:
        pretrained.processor.check(list(splits.values()), rank, ranks)
    return Materials(task, facts, objective, pretrained, examples)


def check_classes(found: Materials) -> None:
    """Once every rank has read its part. Collective.

    Raises:
        DataError: a structure is in no training mask.
    """
    if isinstance(found.pretrained.processor, VolumeProcessor):
        found.pretrained.processor.check_classes(found.task.train, found.task.class_names)


def make_job(config: Config, world: World, directory: RunDirectory) -> Job:
    """Reads the data, and puts the model with its pre-trained weights and an optimizer under the engine. Collective.

    Raises:
        DcftError: see `gather` and `prepare`.
    """
    with collectives.agreed("set-up"):
        f = gather(config, world.rank, world.world_size, config.data.check)
    if config.data.check:
        check_classes(f)
    num_weights = sum(p.numel() for p in f.pretrained.module.parameters())
    one = f.pretrained.head_module()
    head = copy.deepcopy(one[1]) if one else None
    prepared = _prepare(config, world, f.pretrained)
    return Job(
        config, world, directory, f.task, f.objective, f.pretrained, prepared, head, num_weights, f.facts, **f.examples
    )


def _check_metric(config: Config, objective: Objective, validation: Examples) -> None:
    """
    Raises:
        ConfigError: the metric that is to choose the epoch is not defined on the validation data.
    """
    name, known = config.train.metric or objective.best, objective.names(torch.tensor(validation.labels))
    if name not in known:
        raise ConfigError(f"train.metric: no {name!r} on the validation data{did_you_mean(name, known)}: {', '.join(known)}")


def _prepare(config: Config, world: World, pretrained: Pretrained) -> Prepared:
    module, loading = pretrained.module, pretrained.loading
    plan = _plan(config, world, pretrained.blocks)
    if loading and not shards_weights(plan):
        loading.into_whole(module, world.device)
    choose_trained(pretrained, config)
    head, places = pretrained.head_names, depths(pretrained)
    prepared = prepare(module, plan, lambda weights: make_optimizer(weights, config, places, head))
    if loading and shards_weights(plan):
        loading.into(prepared.model)
    return prepared


def _plan(config: Config, world: World, blocks: Sequence[nn.Module]) -> Plan:
    train, sharding = config.train, config.sharding
    size = micro_batch(config, train.global_batch, world.world_size)
    return Plan(
        engine=config.engine,
        device=world.device,
        blocks=blocks,
        bf16=train.precision == "bf16",
        replicas=sharding.replicas,
        offload=sharding.offload,
        zero_stage=sharding.zero_stage,
        micro_batch=size,
        accumulation=train.global_batch // world.world_size // size,
        clip_grad_norm=train.clip_grad_norm,
    )


def micro_batch(config: Config, global_batch: int, ranks: int) -> int:
    """The largest micro-batch within the limit that divides a rank's share of a batch."""
    share = global_batch // ranks
    return max(n for n in range(1, config.train.micro_batch + 1) if share % n == 0)
