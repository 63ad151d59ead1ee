"""Finds the engine of a wrapped model, and the engine class of a name.

Engines in `dcft_dist/engines` need no list: all files of this folder are imported. An engine in your own file is known
as soon as you import the file. A configuration can also name it by its import path.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..compat.versions import check_version
from ..errors import EngineError, did_you_mean
from ..imports import find_object
from .base import ENGINES, Engine


def find_engine(model: nn.Module) -> Engine:
    """Returns the engine for `model`.

    Args:
        model: a plain module (every rank has the same one), a DistributedDataParallel, a module after `fully_shard`, a
            FullyShardedDataParallel, a DeepSpeedEngine, or a model that your own engine recognises.

    Raises:
        EngineError: `model` is not a module, has no parameters, or is wrapped in an unsupported way.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_version("torch")
    _import_built_in()
    for engine in _specific_first():
        if engine.recognises(model):
            return engine(model)  # type: ignore[call-arg]
    raise EngineError(
        f"{type(model).__name__} is wrapped in a way that no engine recognises: use DDP, FSDP1, FSDP2 or DeepSpeed"
    )


def engine_named(name: str, import_roots: Sequence[str] = ()) -> type[Engine]:
    """Returns the engine class with a given name.

    Args:
        name: `single`, `ddp`, `fsdp1`, `fsdp2`, `deepspeed`, one of the `kinds` of your own imported engine, or an import
            path (`package.module:Class`).
        import_roots: folders in which an import path is searched first.

    Raises:
        EngineError: no engine has this name, or the import path is not that of an `Engine` subclass.
        ConfigError: the import path cannot be imported.
    """
    _import_built_in()
    if ":" in name:
        engine = find_object(name, import_roots, "engine")
        if not (isinstance(engine, type) and issubclass(engine, Engine)):
            raise EngineError(f"engine: {name} is not a subclass of dcft_dist.engines.base.Engine")
        return engine
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}{did_you_mean(name, ENGINES)}; the engines are {', '.join(ENGINES)}")
    return ENGINES[name]


def torch_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of Accelerate or DeepSpeed; an unwrapped optimizer itself."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


@cache
def _import_built_in() -> None:
    """Imports every module of this folder, so that its engines register themselves."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f".{module.name}", __package__)


def _specific_first() -> list[type[Engine]]:
    """The engines in the order in which `find_engine` asks them: last imported first, those that take plain modules last."""
    latest_first = list(dict.fromkeys(reversed(ENGINES.values())))
    return sorted(latest_first, key=lambda engine: engine.takes_plain_modules)
