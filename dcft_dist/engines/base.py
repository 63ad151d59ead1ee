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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import EngineError
from .box import Box
from .names import ParameterNames
from .prepared import MakeOptimizer, Prepared, WrapOptions

_PENALTY = "_dcft_dist_penalty"


@dataclass(frozen=True)
class Segment:
    """One weight inside a leaf: where its elements start in the flattened leaf, and which of its cells they are.

    `box` is the whole weight, except under tensor parallelism, where a leaf holds one rank's part of it.
    """

    name: str
    offset: int
    box: Box


@dataclass(frozen=True)
class Leaf:
    """An autograd leaf that receives an unsharded gradient, and the parameters it consists of."""

    tensor: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one weight.

    `parameter` is what the optimizer steps, and may hold other weights too: this one's values on this rank are the
    elements `span` of it (None: all). `local` is those values (shares memory), laid out row-major as `box`; `owned` is
    the sub-range `[begin, end)` of them that belongs to this rank alone.
    """

    name: str
    parameter: Tensor
    local: Tensor
    box: Box
    owned: tuple[int, int]
    owned_box: Box
    span: tuple[int, int] | None = None

    @property
    def gradient(self) -> Tensor | None:
        """The reduced gradient, laid out as `local` (maybe flat); None if no gradient has reached this weight."""
        return self.within(self.parameter.grad) if self.parameter.grad is not None else None

    def within(self, tensor: Tensor) -> Tensor:
        """This weight's part of a tensor that is laid out like `parameter`: its gradient, its optimizer's state."""
        values = local_tensor(tensor)
        return values if self.span is None else values.view(-1)[slice(*self.span)]


ENGINES: dict[str, type[Engine]] = {}  # name in a configuration -> engine; filled as engines are defined


class Engine(ABC):
    """How one kind of (sharded) model keeps its weights and gradients.

    A new engine is a subclass in one file. Scores, selection and penalty need `recognises`, `leaves` and `shards`; the
    trainer needs `wrap_module` too, and a `Prepared` where training is not that of a plain module.

    Attributes:
        kinds: names that the engine has in a configuration.
        name: the kind of this instance.
        model, module: the wrapped and the unwrapped model.
        takes_plain_modules: whether `recognises` is true of modules that nothing has wrapped.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    takes_plain_modules: ClassVar[bool] = False
    prepared: ClassVar[type[Prepared]] = Prepared

    name: str
    own_optimizer: torch.optim.Optimizer | None = None  # the engine steps with this one alone
    clips_inside = False  # True: gradients are clipped inside the engine's own step

    def __init__(self, model: nn.Module, module: nn.Module, names: ParameterNames) -> None:
        self.model = model
        self.module = module
        self.names = names

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ENGINES.update(dict.fromkeys(cls.kinds, cls))

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether `model` is wrapped in the way of this engine."""

    @abstractmethod
    def leaves(self) -> list[Leaf]:
        """Leaves of all trainable weights, in the same order on every rank. Collective where weights are sharded."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """The local part of every weight, frozen ones included, in model order. Local."""

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of every weight by canonical name."""
        return {name: tuple(p.shape) for name, p in self.names.parameters.items()}

    # -- wrapping, for the trainer ------------------------------------------------------------------------------------

    @classmethod
    def shards_weights(cls, options: WrapOptions) -> bool:
        """Whether a model without memory is sharded first and gets its memory then."""
        return False

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        """The wrapped model, before there is an optimizer."""
        return model

    @classmethod
    def wrap(cls, model: nn.Module, options: WrapOptions, make_optimizer: MakeOptimizer) -> Prepared:
        """The wrapped model with the optimizer that `make_optimizer` makes of its weights."""
        wrapped = cls.wrap_module(model, options)
        engine = cls(wrapped)  # type: ignore[call-arg]
        shapes = engine.full_shapes()
        weights = [(name, p, len(shapes[name]) > 1) for name, p in engine.names.parameters.items()]
        return cls.prepared(options, wrapped, make_optimizer(weights))

    # -- scoring ----------------------------------------------------------------------------------------------------

    def scoring_model(self) -> nn.Module:
        """The module to run while scoring: its backward must leave `reduce_gradients` everything it needs."""
        return self.model

    def expect(self, last: bool) -> None:
        """Before the forward of one item while scoring: whether it is the last of its score batch."""
        return None

    def backward(self, loss: Tensor) -> None:
        """The backward of one item while scoring."""
        loss.backward()

    def reduce_gradients(self) -> None:
        """Completes the mean of the gradients over ranks after the backwards of one score batch.

        Here nothing is left to do: each backward ended in the engine's own mean over ranks.
        """
        return None

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Empties all gradients for the block and puts the former ones back after it."""
        holders = self._gradient_holders()
        kept = [(p, p.grad) for p in holders]
        self.clear_gradients()
        try:
            yield
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def clear_gradients(self) -> None:
        for parameter in self._gradient_holders():
            parameter.grad = None

    def _gradient_holders(self) -> list[Tensor]:
        return list(self.module.parameters())

    # -- what is trained ----------------------------------------------------------------------------------------------

    def stepped(self) -> dict[int, list[str]]:
        """id of each tensor an optimizer may step -> names of the weights in it, as the model is now."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.names.parameters.items():
            found.setdefault(id(parameter), []).append(name)
        return found

    def holds(self) -> bool:
        """Whether the weights are still kept as this engine found them, as far as `stepped` does not tell."""
        return True

    def settle(self) -> None:
        """Drops unsharded copies of the weights that a forward without backward may have left behind."""
        return None

    def publish(self) -> None:
        """Makes the next forward use the shards as they are now, after they were changed by hand. Collective."""
        self.settle()

    @property
    def penalty(self) -> Any:
        """The penalty attached to the unwrapped module, if any; the module keeps it alive."""
        return getattr(self.module, _PENALTY, None)

    @penalty.setter
    def penalty(self, penalty: Any) -> None:
        setattr(self.module, _PENALTY, penalty)


def local_tensor(tensor: Tensor) -> Tensor:
    """The values on this rank: a DTensor's local tensor, any other tensor itself (no copy)."""
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def flat_shard(
    name: str, parameter: Tensor, values: Tensor, numel: int, start: int, share: tuple[int, int], **more: Any
) -> Shard:
    """A shard of a flat range: `values` are the weight's elements from `start` on.

    `share`: (index, count) of this rank among those that hold the same range; each owns an equal part of it.
    """
    box = Box.flat(numel, start, values.numel())
    return Shard(name, parameter, values, box, *box.share(*share), **more)


def check_materialised(names: ParameterNames) -> None:
    """
    Raises:
        EngineError: a weight has no values yet.
    """
    if any(p.is_meta for p in names.parameters.values()):
        raise EngineError("the model has meta parameters: materialise them (to_empty, then load) before this call")
