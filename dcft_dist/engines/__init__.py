"""Finds out how a model keeps its weights: plain module, DistributedDataParallel, or FSDP2-sharded."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import EngineError
from .base import Engine, Leaf, Segment, Shard, local_tensor
from .fsdp2 import FSDP2Engine, has_dtensors, is_fsdp2, settle
from .replicated import ReplicatedEngine

__all__ = ["Engine", "Leaf", "Segment", "Shard", "find_engine", "local_tensor", "settle"]

_UNSUPPORTED = ("FullyShardedDataParallel", "DeepSpeedEngine", "DataParallel")


def find_engine(model: nn.Module) -> Engine:
    """The engine of `model`.

    Raises:
        EngineError: `model` is no module, has no parameters, or is wrapped by something unsupported.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if type(model).__name__ in _UNSUPPORTED:
        raise EngineError(
            f"{type(model).__name__} is not supported: use a plain module, DistributedDataParallel or fully_shard"
        )
    if next(model.parameters(), None) is None:
        raise EngineError(f"{type(model).__name__} has no parameters")
    if isinstance(model, DistributedDataParallel):
        return ReplicatedEngine(model, model.module, "ddp")
    if is_fsdp2(model):
        return FSDP2Engine(model)
    if has_dtensors(model):
        raise EngineError("the model has DTensor weights but no fully_shard: only FSDP2 shards weights here")
    return ReplicatedEngine(model, model, "single")
