"""The trainer's optimizer: which rates hold for which weights, and the learning rate and penalty factor of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compat.pytorch import clean
from ..config.method import Penalty as PenaltySettings
from ..config.schema import Config
from ..engines.names import ParameterNames
from ..engines.prepared import Weight
from ..models.pretrained import Pretrained
from .custom_optimizer import custom_optimizer


@dataclass(frozen=True)
class Rates:
    """Rates of a weight.

    Attributes:
        peak_lr: learning rate at the peak of the schedule.
        weight_decay: weight decay.
        in_head: whether the weight belongs to the head.
    """

    peak_lr: float
    weight_decay: float
    in_head: bool


def rates_of(pretrained: Pretrained, config: Config) -> dict[str, Rates]:
    """Rates of every weight: layer-wise decay, the head's own rate, and `optimizer.groups`.

    Args:
        pretrained: the model, not wrapped yet.
        config: its section `optimizer` is used.

    Returns:
        Name -> rates, in model order.

    Raises:
        PatternError: a pattern matches no weight.
    """
    settings, head, depth_of = config.optimizer, set(pretrained.head_names), depths(pretrained)
    names = ParameterNames.of(pretrained.module)
    group_of = {
        name: group for group in reversed(settings.groups) for name in names.match(group.pattern, what="optimizer.groups")
    }
    rates = {}
    for name, parameter in names.parameters.items():
        lr = settings.head_lr or settings.lr if name in head else settings.lr * settings.layer_decay ** depth_of[name]
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        if group := group_of.get(name):
            lr *= group.lr_scale
            decay = decay if group.weight_decay is None else group.weight_decay
        rates[name] = Rates(lr, decay, name in head)
    return rates


def depths(pretrained: Pretrained) -> dict[str, int]:
    """Depth of each body weight: its block, counted from the last one, for layer-wise learning rates.

    Args:
        pretrained: the model, not wrapped yet.

    Returns:
        Name -> depth: 0 for the last block, `len(blocks) - 1` for the first. Weights before all blocks, such as embeddings,
        have `len(blocks)`. Other weights outside the blocks have 0.
    """
    blocks, head = pretrained.blocks, set(pretrained.head_names)
    inside = {id(p): len(blocks) - 1 - i for i, block in enumerate(blocks) for p in block.parameters()}
    depth_of, depth = {}, len(blocks)
    for name, parameter in pretrained.module.named_parameters():
        if name not in head:
            depth = inside.get(id(parameter), 0 if depth < len(blocks) else depth)
            depth_of[name] = depth
    return depth_of


def make_optimizer(weights: Iterable[Weight], config: Config, rates: Mapping[str, Rates]) -> torch.optim.Optimizer:
    """The optimizer over the trainable weights.

    Each parameter group keeps its peak learning rate as `peak_lr`, and whether it belongs to the head as `in_head`.

    Args:
        weights: (name, parameter, whether it is a matrix or has more dimensions), as an engine lists them.
        config: its section `optimizer` is used.
        rates: made by `rates_of`.

    Raises:
        ConfigError: the optimizer of `optimizer.build` cannot be used; see `custom_optimizer`.
    """
    settings = config.optimizer
    groups: dict[Rates, list[nn.Parameter]] = {}
    for name, parameter, _ in weights:
        if parameter.requires_grad:
            groups.setdefault(rates[clean(name)], []).append(parameter)
    param_groups: list[dict[str, Any]] = [
        {"params": parameters, "peak_lr": r.peak_lr, "weight_decay": r.weight_decay, "in_head": r.in_head}
        for r, parameters in groups.items()
    ]
    if settings.build is not None:
        return custom_optimizer(param_groups, config)
    if settings.name == "sgd":
        return torch.optim.SGD(param_groups, lr=settings.lr, momentum=settings.momentum)
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(param_groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=settings.fused or None)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int, total: int) -> float:
    """Sets the learning rates of a step.

    Args:
        optimizer: made by `make_optimizer`; its groups are changed.
        config: its sections `train` and `optimizer` are used.
        step: the step, counted from 0.
        total: number of all steps.

    Returns:
        The learning rate of the last block (of the whole body without `optimizer.layer_decay`).
    """
    scale = lr_scale(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return config.optimizer.lr * scale


def lr_scale(config: Config, step: int, total: int) -> float:
    """The learning rate of a step as a multiple of its peak: a linear warm-up, then `train.schedule`.

    Args:
        config: its section `train` is used.
        step: the step, counted from 0.
        total: number of all steps.
    """
    settings = config.train
    warmup = settings.warmup_fraction * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    begin = total - settings.decay_fraction * total if settings.schedule == "wsd" else warmup
    progress = max(step - begin, 0.0) / max(total - begin, 1)
    if settings.schedule == "constant":
        return 1.0
    left = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1.0 - progress
    return settings.final_lr_fraction + (1 - settings.final_lr_fraction) * left


def factor_at(penalty: PenaltySettings, step: int, total: int) -> float:
    """The penalty factor of a step: with a schedule, `factor` at the first step and `final_factor` at the last.

    Args:
        penalty: the section `[penalty]`; without the schedule `linear` or `cosine` the result is its `factor`.
        step: the step, counted from 0.
        total: number of all steps.
    """
    if penalty.schedule not in ("linear", "cosine"):
        return penalty.factor
    progress = step / max(total - 1, 1)
    if penalty.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return penalty.factor + (penalty.final_factor - penalty.factor) * progress
