"""The context that all phases of a run share: its folder, its data and its model."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..config.checks import fitted
from ..config.schema import Config
from ..data.batches import Batch, Examples, micro_batches
from ..data.contents import Contents
from ..data.splits import EXTERNAL, SPLITS, TaskData
from ..data.tasks import load_task
from ..distributed import collectives
from ..distributed.world import World
from ..engines.find import find_engine
from ..engines.prepared import Prepared, WrapOptions, reduces_each
from ..engines.wrap import prepare, shards_weights
from ..errors import CheckpointError, ConfigError, DataError, DivergedError, did_you_mean, listing
from ..models.pretrained import Pretrained
from ..objectives.base import Metrics, Objective
from ..objectives.make import label_facts
from ..runs.writer import RunWriter
from .adapters import fill_adapters, moved_names
from .handshake import code_facts, compare_data, compare_starts, compare_weights, read_contents
from .methods import choose_trained
from .optimizer import make_optimizer, rates_of
from .task_model import TaskModel, build_for_task


@dataclass(frozen=True)
class RunContext(TaskModel):
    """A `TaskModel` with what all phases of a run share besides: its folder and its data.

    Attributes:
        writer: writes the run's folder.
        task: the labelled examples of the three splits, as the task gives them.
        head: a plain copy of the head if it is one module and not of a segmentation, otherwise None.
        num_weights: number of weights of the whole model.
        train, validation, test: the splits as inputs of the model.
        external: further test data as inputs of the model, by name.
        lowered: a line for each size that was lowered to that of the training data.
    """

    writer: RunWriter
    task: TaskData
    head: nn.Module | None
    num_weights: int
    train: Examples
    validation: Examples
    test: Examples
    external: Mapping[str, Examples]
    lowered: Sequence[str]

    @property
    def metric(self) -> str:
        """Name of the validation metric that chooses the best epoch."""
        return self.config.train.metric or self.objective.best

    @property
    def stores_frozen(self) -> bool:
        """Whether checkpoints have weights that are not trained. With adapters, they would be a hundred times as large."""
        return not self.config.has_adapters

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; examples that do not fill a last global batch are left out."""
        return len(self.train) // self.config.train.global_batch

    def validate(self, when: str) -> Metrics:
        """Metrics on the validation data. Collective.

        Args:
            when: point of the run for the error message, such as "after epoch 3".

        Raises:
            DivergedError: an output or the validation loss is NaN, or the loss is infinite.
        """
        found = self.evaluate(self.validation)
        if len(found.broken) < len(found.indices):  # of all examples: the training has diverged
            found.require_numbers(self.task.validation, "validation")
        metrics = found.metrics
        if not math.isfinite(metrics["loss"]):
            why = "the learning rate is too high, or there is a NaN in the weights or the data"
            raise DivergedError(f"the validation loss is {metrics['loss']} {when}: {why}")
        found.require_numbers(self.task.validation, "validation")
        return metrics

    def micro_batches(
        self,
        indices: Sequence[int],
        examples: Examples,
        draw: int | None = None,
        device: torch.device | None = None,
    ) -> list[Batch]:
        """This rank's part of a global batch, cut into micro-batches of equal size.

        Args:
            indices: the examples of the global batch, the same on every rank.
            examples: the split that contains them.
            draw: which random variant of the examples to train on: the number of the epoch, or 0 for no random variation.
                None: whole examples, as in an evaluation.
            device: where to put the micro-batches; None: this rank's device.
        """
        world, size = self.world, micro_batch(self.config.train.micro_batch, len(indices) // self.world.data_ranks)
        return micro_batches(indices, world.data_rank, world.data_ranks, size, examples, device or world.device, draw)

    def progress_bar(self, items: Any, what: str, **options: Any) -> Any:
        """Yields `items` and shows their progress on rank 0.

        Args:
            items: the items to go through.
            what: label of the bar, after the run's name.
            **options: further arguments of `tqdm`.
        """
        off = not self.world.is_first or bool(os.environ.get("TQDM_DISABLE"))
        return tqdm(items, desc=f"{self.config.name}: {what}", disable=off, mininterval=2.0, **options)


@dataclass(frozen=True)
class Materials:
    """Data, objective and model of a run, before an engine wraps the model.

    Attributes:
        task: the labelled examples of the three splits, as the task gives them.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.
        objective: loss and metrics of the task.
        pretrained: the model with its head.
        examples: name of a split, as in `TaskData.splits` -> the split as inputs of the model.
    """

    task: TaskData
    facts: dict[str, Any]
    objective: Objective
    pretrained: Pretrained
    examples: dict[str, Examples]


def read_materials(config: Config) -> Materials:
    """Lists the data and builds the model. Images, volumes and the weights in `model.weights` are not read yet.

    Args:
        config: configuration of the run.

    Raises:
        DcftError: see `load_task` and `build_model`.
    """
    task = load_task(config)
    facts = label_facts(config, task.class_names, task.train.labels)
    objective, pretrained = build_for_task(config, facts)
    head = _head_of_features(config, pretrained)
    if pretrained.head and head is None and config.engine == "deepspeed" and config.head_warmup.max_epochs:
        raise ConfigError(
            "a head of several modules, or of a segmentation, cannot be warmed up under deepspeed: set "
            "head_warmup.max_epochs = 0"
        )
    if config.train.calibrate and not isinstance(head, nn.Linear):
        raise ConfigError("train.calibrate divides the head by a number, so the head must be a single linear layer")
    examples = {name: pretrained.processor(split) for name, split in task.splits.items()}
    _check_metric(config, objective, examples["validation"])
    return Materials(task, facts, objective, pretrained, examples)


def check_inputs(materials: Materials) -> None:
    """Reads every input once, each rank its part; for masks, checks that every class occurs in a training mask. Collective.

    Args:
        materials: data and model of the run.

    Raises:
        DataError: an input cannot be read, or a class other than the background occurs in no training mask.
    """
    processor, task = materials.pretrained.processor, materials.task
    with collectives.agreed("read every input"):
        processor.check(list(task.splits.values()), collectives.rank(), collectives.world_size())
    seen = processor.classes_seen(task.train)
    if seen is None:  # the labels are not masks
        return
    names = task.class_names
    counts = collectives.reduce_numbers([int(i in seen) for i in range(len(names))], what="classes in the training masks")
    if absent := [name for name, count in zip(names[1:], counts[1:], strict=True) if not count]:
        raise DataError(f"no training mask has {listing(absent)}: leave it out of data.classes, or change the split")


def make_context(config: Config, world: World, writer: RunWriter) -> RunContext:
    """Reads the data, wraps the pre-trained model with the engine, and makes its optimizer. Collective.

    Args:
        config: configuration of the run.
        world: the joined ranks.
        writer: writes the run's folder.

    Raises:
        DcftError: see `read_materials`, `train.handshake` and `prepare`.
    """
    with collectives.agreed("set-up"):
        materials = read_materials(config)
        config, lowered = fitted(config, len(materials.task.train), world.data_ranks)
        contents = Contents(materials.task.splits, writer.contents)
    facts = code_facts() | compare_data(config, materials.task, contents, writer)
    if config.data.check:
        check_inputs(materials)
        read_contents(contents)
    pretrained = materials.pretrained
    num_weights = sum(p.numel() for p in pretrained.module.parameters())
    head_copy = copy.deepcopy(_head_of_features(config, pretrained))
    prepared = _prepare(config, world, pretrained)
    compare_starts(writer, prepared.model, config, facts)
    watched = {name: contents.watch(examples, name) for name, examples in materials.examples.items()}
    return RunContext(
        config=config,
        world=world,
        facts=materials.facts,
        objective=materials.objective,
        pretrained=pretrained,
        prepared=prepared,
        writer=writer,
        task=materials.task,
        head=head_copy,
        num_weights=num_weights,
        **{name: watched[name] for name in SPLITS},
        external={name.removeprefix(EXTERNAL): found for name, found in watched.items() if name.startswith(EXTERNAL)},
        lowered=lowered,
    )


def _head_of_features(config: Config, pretrained: Pretrained) -> nn.Module | None:
    """The head, if it is one module that can be trained on stored features.

    Those of a segmentation cannot be stored: they are as large as the volumes, each of which has its own size.
    """
    head = pretrained.head_module()
    return head[1] if head and config.task.kind != "segmentation" else None


def _check_metric(config: Config, objective: Objective, validation: Examples) -> None:
    """Checks that the metric that chooses the best epoch is defined on the validation data.

    Raises:
        ConfigError: it is not defined there.
    """
    name, known = config.train.metric or objective.best, objective.names(torch.tensor(validation.labels))
    if name not in known:
        raise ConfigError(
            f"train.metric: no {name!r} on the validation data{did_you_mean(name, known)}: choose one of {', '.join(known)}"
        )


def _prepare(config: Config, world: World, pretrained: Pretrained) -> Prepared:
    """Wraps the model with the engine, loads its pre-trained weights, and makes its optimizer."""
    module, loading = pretrained.module, pretrained.loading
    options = _wrap_options(config, world, pretrained.blocks, sum(p.numel() for p in module.parameters()))
    if loading and not shards_weights(options):
        loading.into_whole(module, world.device)
    choose_trained(pretrained, config)
    compare_weights(loading.place if loading else None, module, whole=not (loading and shards_weights(options)))
    rates = rates_of(pretrained, config)
    prepared = prepare(module, options, lambda weights: make_optimizer(weights, config, rates))
    if loading and shards_weights(options):
        loading.into(prepared.model, moved_names(module))
    if config.has_adapters:
        fill_adapters(prepared.model, config.seed)
    _check_numbers(prepared.model, str(loading.place) if loading else "the model")
    return prepared


@torch.no_grad()
def _check_numbers(model: nn.Module, place: str) -> None:
    """Checks that no initial weight is NaN or infinite. Collective.

    Raises:
        CheckpointError: some are; the message names the first weight.
    """
    with collectives.agreed("initial weights"):
        for shard in find_engine(model).shards():
            if wrong := int((~torch.isfinite(shard.local)).sum()):
                raise CheckpointError(f"{place}: {wrong} elements of {shard.name} are NaN or infinite")


def _wrap_options(config: Config, world: World, blocks: Sequence[nn.Module], num_weights: int) -> WrapOptions:
    train, sharding, device = config.train, config.sharding, world.device
    share = train.global_batch // world.data_ranks
    size = micro_batch(train.micro_batch, share)
    if size < 2 and (train.mixup or train.cutmix):
        raise ConfigError(
            "train.mixup and train.cutmix mix the examples of a micro-batch, and here each has only one: raise "
            "train.micro_batch or train.global_batch"
        )
    accumulation = share // size
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    return WrapOptions(
        engine=config.engine,
        device=world.device,
        blocks=blocks,
        bf16=train.precision == "bf16",
        replicas=sharding.replicas,
        tensor_parallel=sharding.tensor_parallel,
        offload=sharding.offload,
        zero_stage=sharding.zero_stage,
        micro_batch=size,
        accumulation=accumulation,
        clip_grad_norm=train.clip_grad_norm,
        checkpointing=train.activation_checkpointing,
        activations_on_host=train.activations_on_host,
        compiler=train.compile,
        reduce_each=reduces_each(sharding.reduce, accumulation, num_weights, memory),
        prefetch=sharding.prefetch,
        import_roots=config.import_roots,
    )


def micro_batch(limit: int, share: int) -> int:
    """The size of a micro-batch: the largest up to a limit that divides one rank's share of a global batch.

    Args:
        limit: `train.micro_batch`.
        share: examples of one step on one rank.
    """
    return max(n for n in range(1, limit + 1) if share % n == 0)
