"""A trial step of an optimizer on two small tensors, after which everything is as before.

It answers one question: does the step go on from what lies in the parameter, or from a copy that the optimizer keeps?
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engines.base import local_tensor
from .penalty_hooks import unseen

Optimizer = torch.optim.Optimizer

_DISTANCE = 64.0  # between the two tensors: large against a step, and exact in float32
_FAR = 1e6  # values at which float32 no longer resolves that distance: the training has diverged
_MOST = 1 << 14  # elements of a trial: it takes little memory beside the step
_SMALL = 1 << 12  # elements of a tensor among an optimizer's attributes that is put back; larger ones are no counters


def distance_left(optimizer: Optimizer, parameter: Tensor) -> float:
    """How much of a change of a parameter is left after the optimizer's next step: 1 if it goes on from the parameter.

    Two copies of the parameter, a constant apart, with copies of its gradient and state, take the place of all parameters
    for one step. Then everything is as before: its state, the values in its groups, its counters, and random numbers.

    Args:
        optimizer: it steps the parameter.
        parameter: one of its parameters. Without a gradient, zeros are used. Of a large one only the first rows are copied.

    Returns:
        Mean distance after the step divided by the distance before; 1 if values are NaN, or so large that it cannot be said.
    """
    values, state = local_tensor(parameter).detach(), optimizer.state.get(parameter, {})
    tensors = [local_tensor(value) for value in state.values() if isinstance(value, Tensor)]
    alike = all(tensor.ndim == 0 or tensor.shape == values.shape for tensor in tensors)  # others hang on the whole shape
    rows = max(_MOST // max(values[:1].numel(), 1), 1) if values.ndim and alike else None

    def part(tensor: Tensor) -> Tensor:
        local = local_tensor(tensor).detach()
        return (local[:rows] if local.ndim and local.shape == values.shape else local).clone()

    gradient = part(parameter.grad) if parameter.grad is not None else torch.zeros_like(part(parameter))
    twins = [nn.Parameter(part(parameter)), nn.Parameter(part(parameter) + _DISTANCE)]
    start = twins[1].detach() - twins[0].detach()
    with _only(optimizer, parameter, twins):
        for twin in twins:
            twin.grad = gradient.clone()
            if state:
                copies = {k: part(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
                optimizer.state[twin] = copies
        _bare_step(optimizer)
    left = float(((twins[1].detach() - twins[0].detach()) / start).double().mean())
    sayable = left == left and float(twins[0].detach().abs().max()) < _FAR
    return left if sayable else 1.0


def decay(optimizer: Optimizer, parameter: Tensor) -> float:
    """Part of a weight that weight decay takes away in one step."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return min(float(group.get("lr") or 0.0) * float(group.get("weight_decay") or 0.0), 1.0)


@contextmanager
def _only(optimizer: Optimizer, parameter: Tensor, twins: list[nn.Parameter]) -> Iterator[None]:
    """The optimizer with these parameters in place of `parameter`, and without any other, for the block."""
    groups = list(optimizer.param_groups)
    named = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "defaults")}
    restore = [_remembered(group, 2) for group in groups]
    restore += [_remembered(value, 2) for value in named.values()]
    restore += [_remembered(value, 2) for key, value in optimizer.state.items() if not isinstance(key, Tensor)]
    python, numpy, attributes = random.getstate(), np.random.get_state(), set(vars(optimizer))
    devices = [values.device] if (values := local_tensor(parameter)).is_cuda else []
    for group in groups:
        group["params"] = list(twins) if any(p is parameter for p in group["params"]) else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for put_back in restore:
            put_back()
        for twin in twins:
            optimizer.state.pop(twin, None)
        for key in [key for key in vars(optimizer) if key not in attributes]:
            delattr(optimizer, key)
        vars(optimizer).update(named)
        random.setstate(python)
        np.random.set_state(numpy)


def _remembered(value: Any, depth: int) -> Callable[[], None]:
    """Returns what puts the contents of a dictionary, list or small tensor back, in place: others may hold it too."""
    if isinstance(value, Tensor):
        if value.numel() > _SMALL or value.is_meta or isinstance(value, nn.Parameter):
            return _nothing
        with torch.no_grad():
            saved = value.detach().clone()
        return lambda: _copy(value, saved)
    if not isinstance(value, dict | list) or not depth:
        return _nothing
    parts = [_remembered(part, depth - 1) for part in (value.values() if isinstance(value, dict) else value)]
    before: Any = copy.copy(value)

    def put_back() -> None:
        if isinstance(value, dict):
            value.clear()
            value.update(before)
        else:
            value[:] = before
        for part in parts:
            part()

    return put_back


@torch.no_grad()
def _copy(value: Tensor, saved: Tensor) -> None:
    value.copy_(saved)


def _nothing() -> None:
    return None


def _bare_step(optimizer: Optimizer) -> Any:
    """A step without hooks: neither a penalty nor anybody else may take it for a step of the training."""
    step = type(optimizer).step
    bare: Any = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    with unseen():
        return bare(optimizer)
