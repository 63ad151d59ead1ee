"""The engine for whole weights on every rank: a plain module (`single`) or DistributedDataParallel (`ddp`).

A plain module in an initialised process group also counts as replicated: its score gradients are averaged over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..compat.pytorch import clean, slots
from ..distributed import collectives
from ..errors import EngineError
from .base import Engine, Leaf, Segment, Shard, flat_shard, places
from .box import Box
from .names import ParameterNames
from .prepared import Prepared, WrapOptions


class PreparedReplica(Prepared):
    """A training step with autocast. DDP reduces gradients only with the last micro-batch: it keeps whole ones anyway."""

    def computing(self) -> Any:
        return torch.autocast(self.options.device.type, torch.bfloat16, enabled=self.options.bf16)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        skip_reduction = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if skip_reduction else nullcontext():
            yield


class ReplicatedEngine(Engine):
    """Whole weights on every rank. Each parameter is a leaf, and rank r owns the r-th flat slice of each weight."""

    kinds = ("single", "ddp")
    takes_plain_modules = True
    prepared = PreparedReplica

    def __init__(self, model: nn.Module) -> None:
        name = "ddp" if isinstance(model, DistributedDataParallel) else "single"
        module = model.module if isinstance(model, DistributedDataParallel) else model
        _refuse_other_wrappers(model)
        super().__init__(model, module, ParameterNames.of(module))
        self.name = name
        self._slots = slots(module, "_modules", "_parameters")
        self._shapes = {id(p): p.shape for p in self.names.parameters.values()}
        group = getattr(model, "process_group", None) if name == "ddp" else None
        if group is not None and dist.get_world_size(group) != collectives.world_size():
            raise EngineError(
                f"DDP's process group has {dist.get_world_size(group)} of {collectives.world_size()} ranks: only groups of "
                "all ranks are supported"
            )

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return True

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        if options.engine == "single":
            return model
        # Without find_unused_parameters, DDP rebuilds its buckets after the first step. A resumed run would then sum
        # gradients in another order.
        return DistributedDataParallel(model, find_unused_parameters=True)

    def leaves(self) -> list[Leaf]:
        return [
            Leaf(p, (Segment(name, 0, Box.flat(p.numel(), 0, p.numel())),))
            for name, p in self.names.parameters.items()
            if p.requires_grad
        ]

    def shards(self) -> list[Shard]:
        share = (collectives.rank(), collectives.world_size())
        return [flat_shard(name, p, p.detach(), p.numel(), 0, share) for name, p in self.names.parameters.items()]

    def stepped(self) -> dict[int, list[str]]:
        # The module's weights as they are now. If the module was sharded or rebuilt since, they are not those in `names`,
        # or they are the same objects with only a part of the values (FSDP1 with use_orig_params).
        now = {id(p): (clean(name), p.shape) for name, p in self.module.named_parameters()}
        return {key: [name] for key, (name, shape) in now.items() if self._shapes.get(key, shape) == shape}

    def _gradient_holders(self) -> list[Tensor]:
        return list(self.names.parameters.values())

    def marks(self) -> tuple[list[Any], list[Any]]:
        return list(chain.from_iterable(map(dict.values, self._slots))), places(self.names.parameters.values())

    def scoring_model(self) -> nn.Module:
        return self.module  # the module inside DDP

    def backward(self, loss: Tensor) -> None:
        if self.name == "single":
            loss.backward()
            return
        # DDP's reducer counts the gradients that reach the parameters. autograd.grad does not trigger it.
        weights = [p for p in self.names.parameters.values() if p.requires_grad]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient

    def reduce_gradients(self) -> None:
        ranks = collectives.world_size()
        if ranks == 1:
            return
        for name, p in self.names.parameters.items():
            if p.requires_grad:
                gradient = p.grad if p.grad is not None else p.detach().new_zeros(p.shape)
                p.grad = collectives.all_reduce(gradient, what=f"score gradient of {name}").div_(ranks)


def _refuse_other_wrappers(model: nn.Module) -> None:
    """Checks that the model is a plain module or DDP.

    Raises:
        EngineError: the model is wrapped or sharded in another way, or has no parameters.
    """
    if isinstance(model, nn.DataParallel):
        raise EngineError("DataParallel is not supported: use DistributedDataParallel, fully_shard or DeepSpeed")
    parameters = list(model.parameters())
    if not parameters:
        raise EngineError(f"{type(model).__name__} has no parameters")
    if any(isinstance(p, DTensor) for p in parameters):
        raise EngineError("the model has DTensor weights but no fully_shard: call fully_shard on it too")
    if any(hasattr(p, "ds_id") for p in parameters):
        raise EngineError("the model's weights are partitioned by ZeRO-3: pass the DeepSpeedEngine, not the bare module")
