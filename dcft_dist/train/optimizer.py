"""The trainer's optimizer, and the learning rate and penalty factor of each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..config.method import Penalty as PenaltySettings
from ..config.schema import Config
from ..engines.prepared import Weight


def make_optimizer(
    weights: Iterable[Weight], config: Config, depths: Mapping[str, int], head: Collection[str]
) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable weights, with weight decay on matrices only.

    Each parameter group keeps its peak learning rate as `peak_lr`, and whether it belongs to the head as `in_head`.

    Args:
        weights: (name, parameter, whether it is a matrix or has more dimensions).
        config: its section `optimizer` is used.
        depths: block of each body weight, counted from the last one (0), for layer-wise learning rates; see `depths` in
            `train.methods`.
        head: names of the head's weights.
    """
    settings = config.optimizer
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter, is_matrix in weights:
        if parameter.requires_grad:
            depth = depths.get(name, 0) if settings.layer_decay < 1.0 else 0
            groups.setdefault((name in head, is_matrix, depth), []).append(parameter)
    param_groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak_lr": settings.head_lr if in_head and settings.head_lr else settings.lr * settings.layer_decay**depth,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "in_head": in_head,
        }
        for (in_head, is_matrix, depth), parameters in groups.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(param_groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(param_groups, lr=settings.lr, fused=settings.fused or None)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int, total: int) -> float:
    """Sets the learning rates of a step: linear warm-up, then cosine decay to `train.final_lr_fraction` of the peak.

    Args:
        optimizer: made by `make_optimizer`; its groups are changed.
        config: its sections `train` and `optimizer` are used.
        step: the step, counted from 0.
        total: number of all steps.

    Returns:
        The learning rate of the last block (of the whole body without `optimizer.layer_decay`).
    """
    settings = config.train
    warmup = settings.warmup_fraction * total
    if step < warmup:
        scale = (step + 1) / (warmup + 1)
    else:
        progress = (step - warmup) / max(total - warmup, 1)
        scale = settings.final_lr_fraction + (1 - settings.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    return config.optimizer.lr * scale


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
