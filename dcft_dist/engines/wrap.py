"""Puts a model under an engine, for the trainer. Users with an own loop wrap their models themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..errors import EngineError


def wrap_model(model: nn.Module, engine: str, device: torch.device, *, blocks: Sequence[nn.Module], bf16: bool) -> nn.Module:
    """`model` under `single`, `ddp` or `fsdp2` (each of `blocks` and the rest a unit of its own), weights in float32.

    Raises:
        EngineError: `single` on several ranks.
    """
    model.to(device)
    if engine == "single":
        if dist.get_world_size() > 1:
            raise EngineError(f"engine 'single' on {dist.get_world_size()} ranks: use 'ddp' or 'fsdp2', or start one rank")
        return model
    if engine == "ddp":
        # Without this DDP re-builds its buckets after the first step, and a resumed run would sum in another order.
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def computing(engine: str, device: torch.device, bf16: bool) -> Callable[[], Any]:
    """The context of a forward: autocast to bfloat16 where the engine does not cast by itself."""
    enabled = bf16 and engine != "fsdp2"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients are reduced over ranks with the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
