"""Finds engines: the one of a wrapped model, and the one of a name.

Every module of this room that defines an `Engine` is known without being listed, so a new engine is one file here. An engine
in a file of yours is known as soon as it is imported, or by its import path.
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
    """The engine of `model`.

    Raises:
        EngineError: `model` is no module, has no parameters, or is wrapped by something unsupported.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_version("torch")
    _import_built_in()
    for engine in _specific_first():
        if engine.recognises(model):
            return engine(model)  # type: ignore[call-arg]
    raise EngineError(f"{type(model).__name__} is wrapped in a way that no engine recognises")


def engine_named(name: str, import_roots: Sequence[str] = ()) -> type[Engine]:
    """The engine of that name, or at that import path (`package.module:Class`).

    Raises:
        EngineError: there is none.
    """
    _import_built_in()
    if ":" in name:
        engine = find_object(name, import_roots, "engine")
        if not (isinstance(engine, type) and issubclass(engine, Engine)):
            raise EngineError(f"engine: {name} is no subclass of dcft_dist.engines.base.Engine")
        return engine
    if name not in ENGINES:
        raise EngineError(f"unknown engine {name!r}{did_you_mean(name, ENGINES)}; there are {', '.join(ENGINES)}")
    return ENGINES[name]


def torch_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside one that Accelerate or DeepSpeed has wrapped."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


@cache
def _import_built_in() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f".{module.name}", __package__)


def _specific_first() -> list[type[Engine]]:
    """Plain modules are recognised last; an engine that was imported later, such as yours, is asked earlier."""
    latest_first = list(dict.fromkeys(reversed(ENGINES.values())))
    return sorted(latest_first, key=lambda engine: engine.takes_plain_modules)
