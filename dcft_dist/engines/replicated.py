"""Engines that keep whole weights on every rank: a plain module (`single`) and DistributedDataParallel (`ddp`).

A plain module under an initialised process group counts as replicated too: its score gradients are averaged over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import collectives
from ..bits import Box
from ..errors import EngineError
from ..names import ParameterNames, clean
from .base import Engine, Leaf, Segment, Shard, flat_shard


class ReplicatedEngine(Engine):
    """Whole weights on every rank; the leaf is the parameter, and rank r owns the r-th flat slice of each weight."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str) -> None:
        super().__init__(model, module, ParameterNames.of(module))
        self.name = name
        self._shapes = {id(p): p.shape for p in self.names.parameters.values()}
        group = getattr(model, "process_group", None) if name == "ddp" else None
        if group is not None and dist.get_world_size(group) != collectives.world_size():
            raise EngineError(
                f"DDP's process group has {dist.get_world_size(group)} of {collectives.world_size()} ranks: only groups of "
                "all ranks are supported"
            )

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
        # The module's weights as they are now: others than in `names` if it was sharded or re-built since, or the same
        # objects with a part of their values each (FSDP1 with use_orig_params).
        now = {id(p): (clean(name), p.shape) for name, p in self.module.named_parameters()}
        return {key: [name] for key, (name, shape) in now.items() if self._shapes.get(key, shape) == shape}

    def scoring_model(self) -> nn.Module:
        return self.module  # below DDP

    def backward(self, loss: Tensor) -> None:
        if self.name == "single":
            loss.backward()
            return
        # DDP's reducer counts what arrives at the parameters; autograd.grad passes by it and leaves it as it was.
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
