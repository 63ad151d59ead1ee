"""The head's warm-up in a run: on what the frozen body gives it, computed once."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from . import collectives
from .data import Examples, evaluation_batches, order
from .engines import find_engine
from .engines.private import persistent_buffers
from .errors import CheckpointError, ConfigError
from .files import write_atomic
from .job import Job
from .loading import fill_weights
from .meta import Materialiser
from .names import clean
from .training import Training
from .warmup import warm_up_head
from .weights import average_buffers, whole_weight

log = logging.getLogger(__name__)
Features = tuple[Tensor, Tensor, int]  # [size, ...] inputs of the head, [size, ...] labels, size


def warm_up_or_load(job: Job) -> None:
    """Trains the head alone, unless its file is there from an earlier attempt; leaves it in the file and the model.

    The linear probe is nothing else. Collective.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: what the head makes is not what the model makes.
    """
    file, names = job.directory.head, job.pretrained.head_names
    if not names:
        return
    if collectives.on_every_rank(file.exists()):
        with collectives.agreed("load the warmed-up head"):
            try:
                found = load_file(file)
                if set(found) != {*names, *_buffers(job, names)}:
                    raise ValueError("it has other weights than this model's head")
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file} is damaged ({error}): delete it to make it again") from error
        _put_back(job, found)
        return
    if job.head is not None and job.config.head_warmup.max_epochs:
        _put_back(job, _warm_up(job))
    elif job.config.head_warmup.max_epochs:
        _warm_up_in_place(job, names)
    found = _state(job, names)
    with collectives.agreed("save the warmed-up head"):  # it is not read back: a node may not see the new file yet
        if job.world.is_first:
            write_atomic(file, save({name: value.cpu().contiguous() for name, value in found.items()}))


def _state(job: Job, names: list[str]) -> dict[str, Tensor]:
    """Whole weights of the head, and a copy of its buffers (statistics of batch normalisation). Collective."""
    return {**_weights(job, names), **{name: buffer.clone() for name, buffer in _buffers(job, names).items()}}


def _put_back(job: Job, state: dict[str, Tensor]) -> None:
    fill_weights(job.model, state)
    for name, buffer in persistent_buffers(find_engine(job.model).module).items():
        if name in state:
            buffer.copy_(state[name])


def _buffers(job: Job, names: list[str]) -> dict[str, Tensor]:
    """Buffers of the head's modules."""
    found = persistent_buffers(find_engine(job.model).module)
    return {name: buffer for name, buffer in found.items() if _in_head(job, name.rpartition(".")[0], names)}


def _in_head(job: Job, path: str, names: list[str]) -> bool:
    """Whether a module is one of the head's: by its own weights, or, if it has none, by the patterns."""
    patterns = [form for pattern in job.pretrained.head for form in (pattern, f"{pattern}.*")]
    return path in {name.rpartition(".")[0] for name in names} or any(fnmatchcase(path, p) for p in patterns)


def _weights(job: Job, names: list[str]) -> dict[str, Tensor]:
    """Whole weights by name, from the shards of all ranks. Collective."""
    engine = find_engine(job.model)
    shapes, shards = engine.full_shapes(), {shard.name: shard for shard in engine.shards()}
    return {name: whole_weight(shards[name], shards[name].local).view(shapes[name]) for name in names}


def _warm_up(job: Job) -> dict[str, Tensor]:
    """The head's weights after training a copy of it."""
    settings = job.config.head_warmup
    name, head = _copied(job)
    inside = {n: n.removeprefix(f"{name}.") for n in job.pretrained.head_names}
    head.load_state_dict({inside[n]: value for n, value in _weights(job, list(inside)).items()}, strict=False)
    objective = job.objective

    def loss(module: nn.Module, batch: Features) -> tuple[Tensor, int]:
        features, labels, count = batch
        return objective.losses(module(features).float(), labels).sum(), count

    done = warm_up_head(
        head,
        _features(job, name, job.train),
        loss,
        head=tuple(inside.values()),
        validation=_features(job, name, job.validation),
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
    )
    if done.best_epoch == settings.max_epochs:
        log.warning("the head was still improving after %d epochs of warm-up", settings.max_epochs)
    log.info("head: %s", json.dumps({"epochs": done.best_epoch, "validation_loss": min(done.validation_losses)}))
    return {f"{name}.{inner}": value.detach() for inner, value in head.state_dict().items()}


def _warm_up_in_place(job: Job, names: list[str]) -> None:
    """A head of several modules (a decoder) is trained where it is, by steps in which the body has the learning rate 0."""
    settings, optimizer = job.config.head_warmup, job.prepared.optimizer
    rates = [group["peak_lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["peak_lr"] = settings.lr if group["in_head"] else 0.0
    training, total = Training(job), settings.max_epochs * job.steps_per_epoch
    best, best_epoch, lowest = _state(job, names), 0, job.validate("before any training")["loss"]
    with _statistics_of_the_body_stay(job, names):
        for epoch in range(1, settings.max_epochs + 1):
            steps = range((epoch - 1) * job.steps_per_epoch, epoch * job.steps_per_epoch)
            training.steps(steps, total, f"warm-up of the head, epoch {epoch}")
            average_buffers(job.model)
            loss = job.validate(f"after epoch {epoch} of the head's warm-up")["loss"]
            if loss < lowest:
                best, best_epoch, lowest = _state(job, names), epoch, loss
            if epoch - best_epoch >= settings.patience:
                break
    _put_back(job, best)
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["peak_lr"] = rate
    log.info("head: %s", json.dumps({"epochs": best_epoch, "validation_loss": lowest}))


@contextmanager
def _statistics_of_the_body_stay(job: Job, names: list[str]) -> Iterator[None]:
    """Within the block, batch normalisation outside the head is in eval mode, whatever mode the model is put into."""
    modules = {clean(path): m for path, m in find_engine(job.model).module.named_modules()}
    normalise = {path: m for path, m in modules.items() if getattr(m, "running_mean", None) is not None}
    held = [m for path, m in normalise.items() if not _in_head(job, path, names)]
    for module in held:
        module.eval()
        module.train = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module in held:
            del module.train


def _copied(job: Job) -> tuple[str, nn.Module]:
    """Name and a whole, plain copy of the head."""
    head = copy.deepcopy(job.head)
    if head is None:
        raise ConfigError(f"model.head = {list(job.pretrained.head)} is not one module")
    Materialiser(job.world.device)(head)
    return job.pretrained.head[0], head


@torch.no_grad()
def _features(job: Job, name: str, examples: Examples) -> list[Features]:
    """This rank's inputs of the head, in batches of the warm-up's size over all ranks, equally many on every rank."""
    rank, ranks = job.world.rank, job.world.world_size
    features, labels = [], []
    size = job.config.evaluation_batch
    with _seen(job.model, name) as seen:
        for batch in evaluation_batches(examples, rank, ranks, size, job.world.device):
            with job.prepared.computing():
                outputs = job.outputs(job.model, batch)
            given, made = seen.pop()
            if made.shape != outputs.shape or not torch.equal(made, outputs):
                raise ConfigError(
                    f"model.head: what {name} gives ({list(made.shape)}) is not what the model gives "
                    f"({list(outputs.shape)}), "
                    "so it cannot be warmed up alone: head_warmup.max_epochs = 0 starts with a cold head, "
                    "model.features puts another head on"
                )
            real = batch["real"]
            features.append(given[real].float())
            labels.append(batch["labels"][real])
    x, y = torch.cat(features), torch.cat(labels)
    mixed = torch.tensor(order(job.config.seed, rank, len(x)), dtype=torch.int64, device=x.device)  # they come by length
    share = max(job.config.head_warmup.batch // ranks, 1)
    num_batches = math.ceil(math.ceil(len(examples) / ranks) / share)
    parts = [mixed[i * share : (i + 1) * share] for i in range(num_batches)]
    return [(x[part], y[part], len(part)) for part in parts]


@contextmanager
def _seen(model: nn.Module, name: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """In eval mode: what the module of that name is given in each forward, and what it makes of it, goes into the list."""
    engine, seen = find_engine(model), list[tuple[Tensor, Tensor]]()
    module = {clean(path): m for path, m in engine.module.named_modules()}[name]

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise ConfigError(f"model.head: {name} is not made of one tensor into one, so it cannot be warmed up alone")
        seen.append((inputs[0], output))

    training, handle = model.training, module.register_forward_hook(keep)
    model.eval()
    try:
        yield seen
    finally:
        handle.remove()
        model.train(training)
        engine.settle()
