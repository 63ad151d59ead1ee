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

from ..compat.pytorch import clean, persistent_buffers
from ..data.batches import Examples, evaluation_batches, order
from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.meta import Materialiser
from ..engines.whole_tensors import average_buffers, fill_weights, whole_weight
from ..errors import CheckpointError, ConfigError
from ..files import write_atomic
from ..method.head_warmup import warm_up_head
from .context import RunContext
from .steps import Training

log = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor, int]  # [size, ...] inputs of the head, [size, ...] labels, size


def warm_up_or_load(run: RunContext) -> None:
    """Trains the head alone, unless its file is there from an earlier attempt; leaves it in the file and the model.

    The linear probe is nothing else. Collective.

    Raises:
        CheckpointError: the file is damaged.
        ConfigError: what the head makes is not what the model makes.
    """
    file, names = run.writer.head, run.pretrained.head_names
    if not names:
        return
    if collectives.on_every_rank(file.exists()):
        with collectives.agreed("load the warmed-up head"):
            try:
                found = load_file(file)
                if set(found) != {*names, *_buffers(run, names)}:
                    raise ValueError("it has other weights than this model's head")
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file} is damaged ({error}): delete it to make it again") from error
        _put_back(run, found)
        return
    if run.head is not None and run.config.head_warmup.max_epochs:
        _put_back(run, _warm_up(run))
    elif run.config.head_warmup.max_epochs:
        _warm_up_in_place(run, names)
    found = _state(run, names)
    with collectives.agreed("save the warmed-up head"):  # it is not read back: a node may not see the new file yet
        if run.world.is_first:
            write_atomic(file, save({name: value.cpu().contiguous() for name, value in found.items()}))


def _state(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Whole weights of the head, and a copy of its buffers (statistics of batch normalisation). Collective."""
    return {**_weights(run, names), **{name: buffer.clone() for name, buffer in _buffers(run, names).items()}}


def _put_back(run: RunContext, state: dict[str, Tensor]) -> None:
    fill_weights(run.model, state)
    for name, buffer in persistent_buffers(find_engine(run.model).module).items():
        if name in state:
            buffer.copy_(state[name])


def _buffers(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Buffers of the head's modules."""
    found = persistent_buffers(find_engine(run.model).module)
    return {name: buffer for name, buffer in found.items() if _in_head(run, name.rpartition(".")[0], names)}


def _in_head(run: RunContext, path: str, names: list[str]) -> bool:
    """Whether a module is one of the head's: by its own weights, or, if it has none, by the patterns."""
    patterns = [form for pattern in run.pretrained.head for form in (pattern, f"{pattern}.*")]
    return path in {name.rpartition(".")[0] for name in names} or any(fnmatchcase(path, p) for p in patterns)


def _weights(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Whole weights by name, from the shards of all ranks. Collective."""
    engine = find_engine(run.model)
    shapes, shards = engine.full_shapes(), {shard.name: shard for shard in engine.shards()}
    return {name: whole_weight(shards[name], shards[name].local).view(shapes[name]) for name in names}


def _warm_up(run: RunContext) -> dict[str, Tensor]:
    """The head's weights after training a copy of it."""
    settings = run.config.head_warmup
    name, head = _copied(run)
    inside = {n: n.removeprefix(f"{name}.") for n in run.pretrained.head_names}
    head.load_state_dict({inside[n]: value for n, value in _weights(run, list(inside)).items()}, strict=False)
    objective = run.objective

    def loss(module: nn.Module, batch: Features) -> tuple[Tensor, int]:
        features, labels, count = batch
        return objective.losses(module(features).float(), labels).sum(), count

    done = warm_up_head(
        head,
        _features(run, name, run.train),
        loss,
        head=tuple(inside.values()),
        validation=_features(run, name, run.validation),
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
    )
    if done.best_epoch == settings.max_epochs:
        log.warning("the head was still improving after %d epochs of warm-up", settings.max_epochs)
    log.info("head: %s", json.dumps({"epochs": done.best_epoch, "validation_loss": min(done.validation_losses)}))
    return {f"{name}.{inner}": value.detach() for inner, value in head.state_dict().items()}


def _warm_up_in_place(run: RunContext, names: list[str]) -> None:
    """A head of several modules (a decoder) is trained where it is, by steps in which the body has the learning rate 0."""
    settings, optimizer = run.config.head_warmup, run.prepared.optimizer
    rates = [group["peak_lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["peak_lr"] = settings.lr if group["in_head"] else 0.0
    training, total = Training(run), settings.max_epochs * run.steps_per_epoch
    best, best_epoch, lowest = _state(run, names), 0, run.validate("before any training")["loss"]
    with _statistics_of_the_body_stay(run, names):
        for epoch in range(1, settings.max_epochs + 1):
            steps = range((epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch)
            training.steps(steps, total, f"warm-up of the head, epoch {epoch}")
            average_buffers(run.model)
            loss = run.validate(f"after epoch {epoch} of the head's warm-up")["loss"]
            if loss < lowest:
                best, best_epoch, lowest = _state(run, names), epoch, loss
            if epoch - best_epoch >= settings.patience:
                break
    _put_back(run, best)
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["peak_lr"] = rate
    log.info("head: %s", json.dumps({"epochs": best_epoch, "validation_loss": lowest}))


@contextmanager
def _statistics_of_the_body_stay(run: RunContext, names: list[str]) -> Iterator[None]:
    """Within the block, batch normalisation outside the head is in eval mode, whatever mode the model is put into."""
    modules = {clean(path): m for path, m in find_engine(run.model).module.named_modules()}
    normalise = {path: m for path, m in modules.items() if getattr(m, "running_mean", None) is not None}
    held = [m for path, m in normalise.items() if not _in_head(run, path, names)]
    for module in held:
        module.eval()
        module.train = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module in held:
            del module.train


def _copied(run: RunContext) -> tuple[str, nn.Module]:
    """Name and a whole, plain copy of the head."""
    head = copy.deepcopy(run.head)
    if head is None:
        raise ConfigError(f"model.head = {list(run.pretrained.head)} is not one module")
    Materialiser(run.world.device)(head)
    return run.pretrained.head[0], head


@torch.no_grad()
def _features(run: RunContext, name: str, examples: Examples) -> list[Features]:
    """This rank's inputs of the head, in batches of the warm-up's size over all ranks, equally many on every rank."""
    rank, ranks = run.world.rank, run.world.world_size
    features, labels = [], []
    size = run.config.evaluation_batch
    with _seen(run.model, name) as seen:
        for batch in evaluation_batches(examples, rank, ranks, size, run.world.device):
            with run.prepared.computing():
                outputs = run.outputs(run.model, batch)
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
    mixed = torch.tensor(order(run.config.seed, rank, len(x)), dtype=torch.int64, device=x.device)  # they come by length
    share = max(run.config.head_warmup.batch // ranks, 1)
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
