"""The two views of a model's weights that scores, selection and penalty are written against.

`leaves()`: the autograd leaves that receive unsharded gradients on this rank, with the parameters inside them.
`shards()`: this rank's local part of every weight, its reduced gradient, and the part of it that this rank *owns*;
owned boxes cover every weight exactly once over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import Box
from ..names import ParameterNames, clean

_PENALTY = "_dcft_dist_penalty"


@dataclass(frozen=True)
class Segment:
    """One parameter inside a leaf: its name, and where its `numel` elements start in the flattened leaf."""

    name: str
    offset: int
    numel: int


@dataclass(frozen=True)
class Leaf:
    """An autograd leaf that receives an unsharded gradient, and the parameters it consists of."""

    tensor: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one weight.

    `parameter` is what the optimizer steps; `local` its values on this rank (shares memory), laid out row-major as
    `box`; `owned` is the sub-range `[begin, end)` of those values that belongs to this rank alone.
    """

    name: str
    parameter: nn.Parameter
    local: Tensor
    box: Box
    owned: tuple[int, int]
    owned_box: Box

    @property
    def gradient(self) -> Tensor | None:
        """The reduced gradient, laid out as `local`; None if no gradient has reached this weight."""
        return local_tensor(self.parameter.grad) if self.parameter.grad is not None else None


class Engine(ABC):
    """How one kind of (sharded) model keeps its weights and gradients. `module` is the unwrapped model."""

    name: str

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model = model
        self.module = module
        self.names = ParameterNames(module)

    @abstractmethod
    def leaves(self) -> list[Leaf]:
        """Leaves of all trainable weights, in the same order on every rank. Collective where weights are sharded."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """The local part of every weight, frozen ones included, in model order. Local."""

    @abstractmethod
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of every weight by canonical name."""

    def scoring_model(self) -> nn.Module:
        """The module to run while scoring: its backward must leave `reduce_gradients` everything it needs."""
        return self.model

    def backward(self, loss: Tensor) -> None:
        """The backward of one item while scoring."""
        loss.backward()

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Completes the mean of the gradients over ranks after the backwards of one score batch."""

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Empties all gradients for the block and puts the former ones back after it."""
        kept = [(p, p.grad) for p in self.module.parameters()]
        self.clear_gradients()
        try:
            yield
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def clear_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def current_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The module's weights as they are now: others than in `names` if it was sharded or re-built since."""
        return [(clean(name), parameter) for name, parameter in self.module.named_parameters()]

    @property
    def penalty(self) -> Any:
        """The penalty attached to the unwrapped module, if any; the module keeps it alive."""
        return getattr(self.module, _PENALTY, None)

    @penalty.setter
    def penalty(self, penalty: Any) -> None:
        setattr(self.module, _PENALTY, penalty)

    def device(self) -> torch.device:
        return next(iter(self.names.parameters.values())).device


def local_tensor(tensor: Tensor) -> Tensor:
    """The values on this rank: a DTensor's local tensor, any other tensor itself (no copy)."""
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
