"""Finds out how a model keeps its weights: plain module, DDP, FSDP2, FSDP1, or a DeepSpeed engine."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import EngineError
from .base import Engine, Leaf, Segment, Shard, local_tensor
from .fsdp1 import FSDP1Engine, is_fsdp1
from .fsdp2 import FSDP2Engine, has_dtensors, is_fsdp2
from .private import check_version
from .replicated import ReplicatedEngine

__all__ = ["Engine", "Leaf", "Segment", "Shard", "find_engine", "local_tensor", "torch_optimizer"]


def find_engine(model: nn.Module) -> Engine:
    """The engine of `model`.

    Raises:
        EngineError: `model` is no module, has no parameters, or is wrapped by something unsupported.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise EngineError("DataParallel is not supported: use DistributedDataParallel, fully_shard or DeepSpeed")
    check_version("torch")
    if (deepspeed := sys.modules.get("deepspeed")) is not None and isinstance(model, deepspeed.DeepSpeedEngine):
        from .zero import ZeroEngine

        check_version("deepspeed")
        return ZeroEngine(model)
    if next(model.parameters(), None) is None:
        raise EngineError(f"{type(model).__name__} has no parameters")
    if isinstance(model, DistributedDataParallel):
        return ReplicatedEngine(model, model.module, "ddp")
    if is_fsdp1(model):
        return FSDP1Engine(model)
    if is_fsdp2(model):
        return FSDP2Engine(model)
    if has_dtensors(model):
        raise EngineError("the model has DTensor weights but no fully_shard: call fully_shard on it too")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise EngineError("the model's weights are partitioned by ZeRO-3: pass the DeepSpeedEngine, not the bare module")
    return ReplicatedEngine(model, model, "single")


def torch_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside what Accelerate or DeepSpeed made of it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
