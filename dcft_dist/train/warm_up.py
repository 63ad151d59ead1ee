"""The head's warm-up in a run. A head of one module trains on features that the frozen body computes once."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compat.pytorch import clean, persistent_buffers
from ..data.batches import Examples, evaluation_batches, order
from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.meta import Materialiser
from ..engines.whole_tensors import average_buffers, fill_weights, whole_weight
from ..errors import CheckpointError, ConfigError, DivergedError, alone, counted
from ..method.head_warmup import is_spent, warm_up_head
from ..tensor_file import is_altered
from ..weights.export import write_tensors
from .context import RunContext
from .custom_optimizer import group_values, set_group_values
from .steps import Training

log = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor, int]  # inputs of the head [size, ...], labels [size, ...], size


def warm_up_or_load(run: RunContext) -> None:
    """Trains the head alone and saves it, or loads the head that an earlier attempt saved. Collective.

    The method `linear_probe` trains nothing else.

    Args:
        run: the context of the run; the head of its model is changed in place.

    Raises:
        CheckpointError: the saved file is damaged.
        ConfigError: the head cannot be trained alone.
        DivergedError: the validation loss is NaN or infinite.
    """
    file, names = run.writer.head, run.pretrained.head_names
    if not names:
        return
    if collectives.on_every_rank(file.exists()):
        run.writer.require_own(file)
        with collectives.agreed("load the warmed-up head"):
            try:
                if is_altered(file):
                    raise ValueError("it was altered after it was written")
                state = load_file(file)
                if set(state) != {*names, *_buffers(run, names)}:
                    raise ValueError("it has other weights than this model's head")
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{file} is damaged ({error}): delete it to make it again") from error
        _load_state(run, state)
        return
    if run.head is not None and run.config.head_warmup.max_epochs:
        _load_state(run, _warm_up(run))
    elif run.config.head_warmup.max_epochs:
        _warm_up_in_place(run, names)
    state = _state(run, names)
    with collectives.agreed("save the warmed-up head"):  # not read back: another node may not see the new file yet
        if run.world.is_first:
            write_tensors(file, state)
    run.writer.keep(file)


def _state(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Whole weights of the head, and copies of its buffers (statistics of batch normalisation). Collective."""
    return {**_weights(run, names), **{name: buffer.clone() for name, buffer in _buffers(run, names).items()}}


def _load_state(run: RunContext, state: dict[str, Tensor]) -> None:
    fill_weights(run.model, state)
    for name, buffer in persistent_buffers(find_engine(run.model).module).items():
        if name in state:
            buffer.copy_(state[name])


def _buffers(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Buffers of the head's modules."""
    buffers = persistent_buffers(find_engine(run.model).module)
    return {name: buffer for name, buffer in buffers.items() if _in_head(run, name.rpartition(".")[0], names)}


def _in_head(run: RunContext, path: str, names: list[str]) -> bool:
    """Whether a module belongs to the head: it has weights of the head, or its path matches `model.head`."""
    patterns = [form for pattern in run.pretrained.head for form in (pattern, f"{pattern}.*")]
    return path in {name.rpartition(".")[0] for name in names} or any(fnmatchcase(path, p) for p in patterns)


def _weights(run: RunContext, names: list[str]) -> dict[str, Tensor]:
    """Whole weights by name, from the shards of all ranks. Collective."""
    engine = find_engine(run.model)
    shapes, shards = engine.full_shapes(), {shard.name: shard for shard in engine.shards()}
    return {name: whole_weight(shards[name], shards[name].local).view(shapes[name]) for name in names}


def _warm_up(run: RunContext) -> dict[str, Tensor]:
    """Trains a copy of the head on the body's features. Returns its weights and buffers. Collective."""
    settings = run.config.head_warmup
    name, head = _head_copy(run)
    inner_names = {n: n.removeprefix(f"{name}.") for n in run.pretrained.head_names}
    head.load_state_dict({inner_names[n]: value for n, value in _weights(run, list(inner_names)).items()}, strict=False)
    objective = run.objective

    def loss(module: nn.Module, batch: Features) -> tuple[Tensor, int]:
        features, labels, count = batch
        return objective.losses(module(features).float(), labels).sum(), count

    result = warm_up_head(
        head,
        _features(run, name, run.train, "train"),
        loss,
        head=tuple(inner_names.values()),
        validation=_features(run, name, run.validation, "validation"),
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
    )
    if result.best_epoch == settings.max_epochs:
        log.warning("the head was still improving after %d epochs of warm-up (head_warmup.max_epochs)", settings.max_epochs)
    log.info("head: %s, validation loss %.6g", counted(result.best_epoch, "epoch"), min(result.validation_losses))
    return {f"{name}.{inner}": value.detach() for inner, value in head.state_dict().items()}


def _warm_up_in_place(run: RunContext, names: list[str]) -> None:
    """Trains a head of several modules (a decoder) inside the model; the body's learning rate is 0. Collective."""
    settings, optimizer = run.config.head_warmup, run.prepared.optimizer
    before = group_values(optimizer)
    for group in optimizer.param_groups:
        group["peak_lr"] = settings.lr if group["in_head"] else 0.0
    training, total = Training(run), settings.max_epochs * run.steps_per_epoch
    best, best_epoch, lowest = _state(run, names), 0, run.validate("before any training")["loss"]
    with _frozen_body_statistics(run, names):
        for epoch in range(1, settings.max_epochs + 1):
            steps = range((epoch - 1) * run.steps_per_epoch, epoch * run.steps_per_epoch)
            training.steps(steps, total, f"warm-up of the head, epoch {epoch}")
            average_buffers(run.model)
            loss = run.validate(f"after epoch {epoch} of the head's warm-up")["loss"]
            if loss < lowest:
                best, best_epoch, lowest = _state(run, names), epoch, loss
            if is_spent(settings.patience, epoch - best_epoch, run.steps_per_epoch):
                break
    _load_state(run, best)
    optimizer.state.clear()
    set_group_values(optimizer, before)
    log.info("head: %s, validation loss %.6g", counted(best_epoch, "epoch"), lowest)


@contextmanager
def _frozen_body_statistics(run: RunContext, names: list[str]) -> Iterator[None]:
    """Keeps batch normalisation outside the head in eval mode inside the block, even after `model.train()`."""
    modules = {clean(path): m for path, m in find_engine(run.model).module.named_modules()}
    with_statistics = {path: m for path, m in modules.items() if getattr(m, "running_mean", None) is not None}
    frozen = [m for path, m in with_statistics.items() if not _in_head(run, path, names)]
    for module in frozen:
        module.eval()
        module.train = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module in frozen:
            del module.train


def _head_copy(run: RunContext) -> tuple[str, nn.Module]:
    """Name of the head, and a copy of it that no engine shards."""
    head = copy.deepcopy(run.head)
    if head is None:
        raise ConfigError(f"model.head = {list(run.pretrained.head)} is not one module")
    Materialiser(run.world.device)(head)
    return run.pretrained.head[0], head


@torch.no_grad()
def _features(run: RunContext, name: str, examples: Examples, what: str) -> list[Features]:
    """This rank's inputs of the head, in equally many batches on every rank. Collective.

    Each batch has `head_warmup.batch` examples over all ranks.

    Raises:
        DivergedError: an output is NaN; the message names the example of the split `what`.
        ConfigError: the head's output is not the model's.
    """
    rank, ranks = run.world.data_rank, run.world.data_ranks
    features, labels = [], []
    size = run.config.evaluation_batch
    with _recorded(run.model, name) as records:
        for batch in evaluation_batches(examples, rank, ranks, size, run.world.device):
            with run.prepared.computing():
                outputs = run.outputs(run.model, batch)
            head_inputs, head_outputs = records.pop()
            if bool((broken := outputs.isnan().reshape(len(batch["index"]), -1).any(1)).any()):
                first = int(batch["index"][broken][0])
                text = f"the model's output is NaN for example {first} of {what}: a NaN is in its input or in the weights"
                raise alone(DivergedError(text))
            if head_outputs.shape != outputs.shape or not torch.equal(head_outputs, outputs):
                raise ConfigError(
                    f"model.head: the output of {name} ({list(head_outputs.shape)}) is not the output of the model "
                    f"({list(outputs.shape)}), so the head cannot be warmed up alone: set head_warmup.max_epochs = 0 to "
                    "start with a random head, or model.features to put a new head on"
                )
            real = batch["real"]
            features.append(head_inputs[real].float())
            labels.append(batch["labels"][real])
    x, y = torch.cat(features), torch.cat(labels)
    # Shuffled, since the evaluation sorts examples by length.
    shuffled = torch.tensor(order(run.config.seed, rank, len(x)), dtype=torch.int64, device=x.device)
    share = max(run.config.head_warmup.batch // ranks, 1)
    num_batches = math.ceil(math.ceil(len(examples) / ranks) / share)
    parts = [shuffled[i * share : (i + 1) * share] for i in range(num_batches)]
    return [(x[part], y[part], len(part)) for part in parts]


@contextmanager
def _recorded(model: nn.Module, name: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Puts the model in eval mode, and lists (input, output) of the named module for each forward inside the block."""
    engine, records = find_engine(model), list[tuple[Tensor, Tensor]]()
    module = {clean(path): m for path, m in engine.module.named_modules()}[name]

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise ConfigError(f"model.head: {name} does not turn one tensor into one tensor: it cannot be warmed up alone")
        given = inputs[0].to_local() if isinstance(inputs[0], DTensor) else inputs[0]  # under tensor parallelism
        records.append((given, output))

    training, handle = model.training, module.register_forward_hook(record)
    model.eval()
    try:
        yield records
    finally:
        handle.remove()
        model.train(training)
        engine.settle()
