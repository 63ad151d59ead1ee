"""Head warm-up: trains the new head before the model is scored.

A random head makes the body's gradients meaningless. So does a head that has memorised the training data. The warm-up
therefore stops on the validation loss.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.find import find_engine
from ..engines.names import Patterns
from ..errors import EngineError, ScoreError
from .score_batches import LossFn

_LEAST_STEPS = 10  # without a lower validation loss, before a warm-up stops


@dataclass(frozen=True)
class WarmUp:
    """Record of a head warm-up.

    Attributes:
        train_losses: mean training loss of each epoch, the first entry being epoch 1.
        validation_losses: mean validation loss before the training (entry 0) and after each epoch.
        best_epoch: the epoch with the lowest validation loss, from which the model has its head; 0: the head is unchanged.
    """

    train_losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    best_epoch: int


def warm_up_head(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    head: Patterns,
    validation: Sequence[Any],
    lr: float = 1e-3,
    max_epochs: int = 100,
    patience: int = 3,
) -> WarmUp:
    """Trains only the head with AdamW, and keeps the head with the lowest validation loss. Collective.

    Call it before wrapping or sharding. The body is frozen and the whole model is in eval mode; both are undone at the
    end. Gradients are averaged over ranks. To run the body only once, compute its features first, and then pass the head
    alone as `model` and the features as batches.

    Args:
        model: a plain module, the same on every rank; the head's weights are changed in place.
        batches: list of this rank's training batches. Every rank needs the same number. Each epoch uses them in this order.
        loss_fn: `loss_fn(model, batch)` returns the mean loss over the batch as a scalar tensor, or `(sum, count)`: the sum
            of the losses and the number of samples. Use the latter if batches differ in size.
        head: patterns of the head's parameters: the name of a module or parameter ("classifier"), a glob over whole
            parameter names ("*.head.*"), or a list of these.
        validation: list of this rank's validation batches. Every rank needs the same number.
        lr: learning rate of AdamW (weight decay 0).
        max_epochs: number of epochs at most; 0 leaves the head as it is.
        patience: stop after this many epochs in a row without a lower validation loss, but not before 10 steps without one:
            with few data an epoch is one step, and the first steps of AdamW may raise the loss.

    Returns:
        The losses of all epochs, and the epoch that the head comes from (`WarmUp`).

    Raises:
        EngineError: the model is already wrapped or sharded.
        PatternError: a head pattern matches nothing.
        ScoreError: `batches` or `validation` is empty or not a list, or the ranks have unequal numbers of batches.
    """
    engine = find_engine(model)
    if engine.name != "single":
        raise EngineError(f"the model is already prepared for {engine.name}: warm up the head before wrapping or sharding")
    _check_batches(batches, validation)
    names = set(engine.names.match(head, what="head"))
    weights = [p for n, p in engine.names.parameters.items() if n in names]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for parameter, _ in trainable:
        parameter.requires_grad_(any(parameter is w for w in weights))
    try:
        return _train(model, weights, batches, validation, loss_fn, lr, max_epochs, patience)
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def is_spent(patience: int, epochs: int, steps_per_epoch: int) -> bool:
    """Whether a warm-up stops after a number of epochs without a lower validation loss.

    Args:
        patience: number of epochs to wait.
        epochs: number of epochs since the lowest validation loss.
        steps_per_epoch: optimizer steps in an epoch.
    """
    return epochs >= patience and epochs * steps_per_epoch >= _LEAST_STEPS


def _check_batches(batches: Sequence[Any], validation: Sequence[Any]) -> None:
    if not all(isinstance(b, Sequence) for b in (batches, validation)):
        raise ScoreError("batches and validation must be lists: every epoch iterates over them")
    counts = collectives.all_gather_ints([len(batches), len(validation)], what="count of warm-up batches")
    if len({tuple(c) for c in counts}) > 1 or 0 in counts[0]:
        raise ScoreError(
            f"the ranks have {counts} [training, validation] batches: every rank needs the same numbers, at least one each"
        )


def _train(
    model: nn.Module,
    weights: list[nn.Parameter],
    batches: Sequence[Any],
    validation: Sequence[Any],
    loss_fn: LossFn,
    lr: float,
    max_epochs: int,
    patience: int,
) -> WarmUp:
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    best, best_epoch, best_loss = _copy(weights), 0, _validation_loss(model, validation, loss_fn)
    train_losses, validation_losses = [], [best_loss]
    for epoch in range(1, max_epochs + 1):
        losses = [_step(model, weights, optimizer, batch, loss_fn) for batch in batches]
        train_losses.append(sum(losses) / len(losses))
        validation_losses.append(_validation_loss(model, validation, loss_fn))
        if validation_losses[-1] < best_loss:
            best, best_epoch, best_loss = _copy(weights), epoch, validation_losses[-1]
        if is_spent(patience, epoch - best_epoch, len(batches)):
            break
    with torch.no_grad():
        for weight, value in zip(weights, best, strict=True):
            weight.copy_(value)
            weight.grad = None
    return WarmUp(tuple(train_losses), tuple(validation_losses), best_epoch)


def _copy(weights: list[nn.Parameter]) -> list[Tensor]:
    return [copy.deepcopy(w.detach()) for w in weights]


def _step(
    model: nn.Module, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, batch: Any, loss_fn: LossFn
) -> float:
    loss, count = _loss_sum(loss_fn(model, batch))
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    flat = torch.cat([*(g.reshape(-1).double() for g in known), torch.stack([loss.detach().double(), count])])
    flat = collectives.all_reduce(flat, what="head warm-up gradient")
    total, size = float(flat[-2]), float(flat[-1])
    parts = flat[:-2].split([w.numel() for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = (part / size).view_as(weight).to(weight.dtype)
    optimizer.step()
    return total / size


def _loss_sum(result: Tensor | tuple[Tensor, Tensor | int | float]) -> tuple[Tensor, Tensor]:
    loss, count = result if isinstance(result, tuple) else (result, 1.0)
    return loss, torch.tensor(float(count), dtype=torch.float64, device=loss.device)


@torch.no_grad()
def _validation_loss(model: nn.Module, validation: Sequence[Any], loss_fn: LossFn) -> float:
    total = torch.zeros(2, dtype=torch.float64)
    for batch in validation:
        loss, count = _loss_sum(loss_fn(model, batch))
        total += torch.stack([loss.double(), count]).cpu()
    loss_sum, size = collectives.all_reduce(total, what="head warm-up validation loss").tolist()
    return float(loss_sum / size)
