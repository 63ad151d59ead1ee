"""The optimizer of `optimizer.build`: from torch, from another package, or the user's own.

It is tried on a small weight before the run begins. So what the trainer, the engine or a checkpoint cannot do is an error
now, and not after an epoch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..compat.pytorch import has_values
from ..config.schema import Config
from ..distributed import collectives
from ..engines.base import local_tensor
from ..engines.find import engine_named
from ..errors import ConfigError, DcftError, line_of
from ..imports import find_function

KEY = "optimizer.build"

_STEPS = 3  # of the trial: what an optimizer sets up late shows at its second step

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def custom_optimizer(param_groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """Tries and makes the optimizer of `optimizer.build`. Collective.

    Args:
        param_groups: groups for its constructor, each with `weight_decay`.
        config: its section `optimizer` is used, and its engine.

    Raises:
        ConfigError: it is no optimizer, its constructor or step fails, it needs a closure, it has a mode for evaluation, a
            checkpoint cannot keep its state, or it would make other steps on the engine's shards than on whole tensors.
    """
    settings = config.optimizer
    path = str(settings.build)
    found = find_function(path, config.import_roots, KEY)
    takes_decay = _takes(found, "weight_decay")
    if not takes_decay and any(group["weight_decay"] for group in param_groups):
        raise ConfigError(f"{KEY}: {path} has no weight decay: set optimizer.weight_decay = 0")

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not takes_decay:
            groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
        try:
            optimizer = found([dict(group) for group in groups], lr=settings.lr, **settings.args)
        except Exception as error:
            raise ConfigError(f"{KEY}: {path} fails: {type(error).__name__}: {line_of(error)}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"{KEY}: {path} makes a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        for given, group in zip(groups, optimizer.param_groups, strict=True):
            if (decay := group.get("weight_decay", 0.0)) != (wanted := given.get("weight_decay", 0.0)):
                raise ConfigError(f"{KEY}: {path} sets a weight decay of {decay} where {wanted} was asked for")
        return optimizer

    example: Any = next(parameter for group in param_groups for parameter in group["params"])
    if not has_values(local_tensor(example)):  # `dcft plan`
        return build(param_groups)
    with collectives.agreed(KEY):
        whole = _trial(build, path, _weight())
    sharded = example if isinstance(example, DTensor) else None
    flat = sharded is None and engine_named(config.engine, config.import_roots).flattens(config.sharding.zero_stage)
    if flat or sharded is not None:
        with collectives.agreed(KEY):
            parts = _trial(build, path, *_parts(_weight(), sharded))
        if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-6):
            advice = "use the engine fsdp2, ddp or single" if flat else "use the engine ddp or single"
            raise ConfigError(
                f"{KEY}: {path} looks at whole tensors, and the engine {config.engine} gives it parts of them: {advice}"
            )
    optimizer = build(param_groups)
    if flat and optimizer.state:
        raise ConfigError(
            f"{KEY}: {path} has a state before its first step, which the engine {config.engine} would not flatten: use the "
            "engine fsdp2, ddp or single"
        )
    return optimizer


def _takes(function: Any, name: str) -> bool:
    """Whether a function or class may take an argument of this name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _weight() -> Tensor:
    """The weight of a trial, the same on every rank."""
    return torch.linspace(-1.0, 1.0, 48).view(8, 6) + 0.01


def _parts(weight: Tensor, like: DTensor | None) -> list[Tensor]:
    """The weight as an engine stores it: distributed like one of its weights, or two flat halves."""
    if like is None:
        return list(weight.flatten().chunk(2))
    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in like.placements]
    return [distribute_tensor(weight.to(like.device_mesh.device_type), like.device_mesh, placements)]


def _trial(build: Build, path: str, *parts: Tensor) -> Tensor:
    """The weight after a few steps, flattened, on the CPU.

    Args:
        build: makes the optimizer.
        path: its import path.
        parts: tensors that have the weight's elements, in order.

    Raises:
        ConfigError: see `custom_optimizer`.
    """
    parameters = [torch.nn.Parameter(part.clone()) for part in parts]
    optimizer = build([{"params": parameters, "weight_decay": 0.0}])
    if (mode := getattr(optimizer, "eval", None)) and callable(mode):
        raise ConfigError(f"{KEY}: {path} has a mode for evaluation, so it keeps weights of its own: choose another one")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"{KEY}: {path} needs a closure for its step, which the trainer does not give: choose another one")
    before = _counts(optimizer)
    for step in range(_STEPS):
        for parameter in parameters:
            parameter.grad = torch.cos(parameter.detach() * (step + 2)) * 0.1
        try:
            optimizer.step()
        except DcftError:
            raise
        except Exception as error:
            raise ConfigError(f"{KEY}: a step of {path} fails: {type(error).__name__}: {line_of(error)}") from error
    if changed := [name for name, value in _counts(optimizer).items() if before.get(name) != value]:
        raise ConfigError(f"{KEY}: {path} counts in its own attribute {changed[0]!r}, which a checkpoint cannot keep")
    if kept := next(_cannot_be_kept(optimizer), None):
        raise ConfigError(f"{KEY}: {path} keeps {', '.join(kept)}, which a checkpoint cannot keep: choose another one")
    values: list[Any] = [parameter.detach() for parameter in parameters]
    return torch.cat([(v.full_tensor() if isinstance(v, DTensor) else v).flatten().cpu() for v in values])


def _cannot_be_kept(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """(entry, why) of what an optimizer remembers, and a checkpoint cannot keep for another number of ranks."""
    for parameter, state in optimizer.state.items():
        if not isinstance(state, dict):
            yield "a state that belongs to no weight", f"a {type(state).__name__}"
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                yield f"{key!r}", f"of shape {list(value.shape)} for a weight of shape {list(parameter.shape)}"
            elif not isinstance(value, Tensor | int | float | None):
                yield f"{key!r}", f"a {type(value).__name__}"
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params" and not _is_plain(value):
                yield f"{key!r} in its groups", f"a {type(value).__name__}"


def _counts(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Numbers among the attributes of an optimizer itself."""
    plain = {name: value for name, value in vars(optimizer).items() if isinstance(value, int | float)}
    scalars = {n: v.item() for n, v in vars(optimizer).items() if isinstance(v, Tensor) and v.numel() == 1}
    return {name: float(value) for name, value in {**plain, **scalars}.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps in its groups, such as a count of steps: one table for each group, for JSON.

    Args:
        optimizer: made by `make_optimizer`.
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def set_group_values(optimizer: torch.optim.Optimizer, values: list[dict[str, Any]]) -> None:
    """Puts back what `group_values` returned.

    Args:
        optimizer: as there.
        values: as returned, also after a way through JSON, which turns tuples into lists.

    Raises:
        ConfigError: the optimizer has another number of groups.
    """
    if len(values) != len(optimizer.param_groups):
        raise ConfigError(f"the optimizer has {len(optimizer.param_groups)} groups of weights, not {len(values)} as before")
    for group, stored in zip(optimizer.param_groups, values, strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in stored.items()})
