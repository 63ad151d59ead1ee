"""The trainer's optimizer, learning rate and randomness, each a function of the configuration and the step."""

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
    """AdamW or SGD over what is trained; weight decay on matrices only. Each group keeps its peak rate as `peak_lr`.

    Args:
        depths: block of each body weight, counted from the top (0: the last block), for layer-wise learning rates.
        head: names of the head's weights.
    """
    settings = config.optimizer
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter, is_matrix in weights:
        if parameter.requires_grad:
            depth = depths.get(name, 0) if settings.layer_decay < 1.0 else 0
            groups.setdefault((name in head, is_matrix, depth), []).append(parameter)
    rows: list[dict[str, Any]] = [
        {
            "params": parameters,
            "peak_lr": settings.head_lr if in_head and settings.head_lr else settings.lr * settings.layer_decay**depth,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "in_head": in_head,
        }
        for (in_head, is_matrix, depth), parameters in groups.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(rows, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(rows, lr=settings.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int, total: int) -> float:
    """Linear warm-up, then cosine to `final_lr_fraction`; returns the body's rate."""
    settings = config.train
    warmup = settings.warmup_fraction * total
    if step < warmup:
        share = (step + 1) / (warmup + 1)
    else:
        place = (step - warmup) / max(total - warmup, 1)
        share = settings.final_lr_fraction + (1 - settings.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * place))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return config.optimizer.lr * share


def factor_at(penalty: PenaltySettings, step: int, total: int) -> float:
    """The scheduled factor of a step (counted from 0): `factor` at the first, `final_factor` at the last."""
    share = step / max(total - 1, 1)
    if penalty.schedule == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return penalty.factor + (penalty.final_factor - penalty.factor) * share
