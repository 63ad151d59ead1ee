"""A new engine in one file, as a user would write it: whole weights on every rank, gradients averaged before the step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dcft_dist.distributed import collectives
from dcft_dist.engines.base import Engine, Leaf, Segment, Shard, flat_shard
from dcft_dist.engines.box import Box
from dcft_dist.engines.names import ParameterNames
from dcft_dist.engines.prepared import Prepared, WrapOptions


class Averaged(nn.Module):
    """A model whose gradients `average` makes the mean over ranks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def average(self) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


class PreparedAveraged(Prepared):
    def step(self) -> None:
        self.model.average()
        self.optimizer.step()


class AveragedEngine(Engine):
    """The leaf is the parameter; rank r owns the r-th flat slice of each weight."""

    kinds = ("averaged",)
    name = "averaged"
    prepared = PreparedAveraged
    model: Averaged

    def __init__(self, model: Averaged) -> None:
        super().__init__(model, model.module, ParameterNames.of(model.module))

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return isinstance(model, Averaged)

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        return Averaged(model)

    def leaves(self) -> list[Leaf]:
        weights = [(name, p) for name, p in self.names.parameters.items() if p.requires_grad]
        return [Leaf(p, (Segment(name, 0, Box.flat(p.numel(), 0, p.numel())),)) for name, p in weights]

    def shards(self) -> list[Shard]:
        share = (collectives.rank(), collectives.world_size())
        return [flat_shard(name, p, p.detach(), p.numel(), 0, share) for name, p in self.names.parameters.items()]

    def reduce_gradients(self) -> None:
        self.model.average()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
