"""Head warm-up: a random head makes the body's gradients meaningless, and so does one that has memorised the data."""

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


@dataclass(frozen=True)
class WarmUp:
    """What a head warm-up did: mean losses by epoch; the head kept is the one of `best_epoch` (0: as it was given)."""

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
    """Trains the head alone with AdamW, the body frozen and in eval mode, and keeps the head of the best validation loss.

    To be called before wrapping or sharding. Where the body's features are at hand, pass the head alone as the model and
    the features as batches: the body then runs once. Collective: gradients are averaged over ranks.

    Args:
        model: a plain module, the same on every rank; its head's weights are changed in place.
        batches: this rank's training batches, as many on every rank, gone through in this order each epoch.
        loss_fn: `loss_fn(model, batch)` -> mean loss, or (sum, count).
        head: patterns of the head's parameters.
        validation: this rank's validation batches.
        lr: learning rate of AdamW (weight decay 0).
        max_epochs, patience: stop after this many epochs, or when the validation loss has not improved for `patience`.

    Raises:
        EngineError: the model is already wrapped or sharded.
        PatternError: a head pattern matches nothing.
        ScoreError: there are no batches, or the ranks have unequal numbers of them.
    """
    engine = find_engine(model)
    if engine.name != "single":
        raise EngineError(f"warm up the head before wrapping the model (it is prepared for {engine.name})")
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


def _check_batches(batches: Sequence[Any], validation: Sequence[Any]) -> None:
    if not all(isinstance(b, Sequence) for b in (batches, validation)):
        raise ScoreError("batches and validation must be lists: they are gone through in every epoch")
    counts = collectives.all_gather_ints([len(batches), len(validation)], what="count of warm-up batches")
    if len({tuple(c) for c in counts}) > 1 or 0 in counts[0]:
        raise ScoreError(
            f"every rank must have the same number of training and validation batches, at least one; they have {counts}"
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
        if epoch - best_epoch >= patience:
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
