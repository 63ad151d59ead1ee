"""The base class of all engines. `Engine` lists what a new engine must implement.

Scoring, selection and penalty see a model through these views:

- `leaves()`: the autograd leaves that receive unsharded gradients on this rank, and the weights inside each leaf.
- `buckets()`: under engines that reduce gradients in flat buffers, those buffers, right before the reduction.
- `shards()`: this rank's part of every weight, its reduced gradient, and the range of elements that this rank *owns*.
  Over all ranks, the owned ranges cover every weight exactly once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compat.pytorch import has_values, local_values
from ..errors import EngineError
from .box import Box
from .names import ParameterNames
from .prepared import MakeOptimizer, Prepared, WrapOptions

_PENALTY, _PULL = "_dcft_dist_penalty", "_dcft_dist_pull"


@dataclass(frozen=True)
class Segment:
    """One weight inside a leaf.

    Attributes:
        name: canonical name of the weight.
        offset: index of the weight's first element in the flattened leaf.
        box: the elements of the weight that the leaf contains: all of them, or under tensor parallelism this rank's part.
    """

    name: str
    offset: int
    box: Box


@dataclass(frozen=True)
class Leaf:
    """An autograd leaf that receives an unsharded gradient.

    Attributes:
        tensor: the leaf; a hook on it sees the gradient.
        segments: the trainable weights inside the leaf.
    """

    tensor: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one weight.

    Attributes:
        name: canonical name of the weight.
        parameter: the tensor that the optimizer steps. It may contain other weights too.
        local: the weight's values on this rank, in row-major order of `box`. Shares memory with `parameter`.
        box: the elements of the weight that `local` contains.
        owned: the range `[begin, end)` of `local`, flattened, that belongs to this rank alone.
        owned_box: the same range as elements of the weight.
        span: the range `[begin, end)` of the weight's values in the flattened `parameter`; None: the whole parameter.
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
        """The reduced gradient, in the order of `local` but possibly flat; None if no gradient has reached this weight."""
        return self.within(self.parameter.grad) if self.parameter.grad is not None else None

    def within(self, tensor: Tensor) -> Tensor:
        """This weight's part of a tensor with the layout of `parameter`, such as its gradient or optimizer state.

        Args:
            tensor: a tensor or DTensor with the shape of `parameter`.

        Returns:
            A view of the part on this rank; flat if `span` is set.
        """
        values = local_tensor(tensor)
        return values if self.span is None else values.view(-1)[slice(*self.span)]


class Bucket(ABC):
    """Gradients that one collective reduces together, in one flat buffer.

    Attributes:
        segments: the trainable weights that may be in the buffer; their offsets have no meaning.
        device: where the buffer is.
        reached: leaves that a backward has reached since the last reduction; the engine clears it.
    """

    segments: tuple[Segment, ...]
    device: torch.device
    reached: list[Tensor]

    @abstractmethod
    def lay_out(self, masks: Mapping[str, Tensor], present: Collection[str]) -> Tensor:
        """Puts masks of weights in the order of the buffer.

        Args:
            masks: name -> bool tensor in the shape of the weight's box. Cells of other weights are False.
            present: names of the weights with a gradient in the buffer.

        Returns:
            Flat bool tensor of the buffer's size.
        """

    @abstractmethod
    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Reverses `lay_out` for a buffer with every weight: name -> bool tensor in the shape of the weight's box."""

    @abstractmethod
    def intercept(self, before: Callable[[Tensor, frozenset[str]], None]) -> None:
        """Lets `before(buffer, names of the weights in it)` change the buffer right before each reduction."""

    @classmethod
    @abstractmethod
    def renew(cls, buckets: Sequence[Any]) -> None:
        """Does so for communications that the user has set since, in any of these buckets. Each step calls it."""

    @abstractmethod
    def waits(self) -> bool:
        """Whether the bucket has gradients that a later backward will reduce."""

    @abstractmethod
    def release(self) -> None:
        """Ends what `intercept` began."""


ENGINES: dict[str, type[Engine]] = {}  # name in a configuration -> engine class; each `Engine` subclass adds itself


class Engine(ABC):
    """How one kind of model stores its weights and gradients on the ranks.

    To write a new engine, put one subclass into one file. The subclass registers itself when the file is imported,
    and files in `dcft_dist/engines` are imported without being listed. A configuration names the engine by one of its
    `kinds`, or by its import path (`package.module:Class`).
    `engines/replicated.py` is a short example.

    Every engine implements:
        - `kinds`, `name`, and `__init__(model)`, which calls `super().__init__(model, module, names)`.
        - `recognises`, `leaves` and `shards`. These are enough for scoring, selection and penalty if each backward
          ends in a mean of the gradients over ranks, and if parameters keep the shape of their weights.

    The trainer (`dcft train`) also needs:
        - `wrap_module`; or `wrap`, if the wrapper takes the optimizer too.
        - `prepared`, a subclass of `Prepared`, if a training step differs from that of a plain module.
        - `shards_weights`, if the engine can shard a model that is still on the meta device; `flattens`, if the optimizer
          gets flat parts of the weights.

    Override the other methods where their default is wrong for the engine:
        - `backward` and `reduce_gradients`, if a backward does not end in the mean over ranks; `expect`, if the wrapper
          must know which backward of a score batch is the last; `scoring_model`, if scoring must bypass the wrapper.
        - `full_shapes`, if parameters do not have the shape of their weights.
        - `gradients_aside` and `clear_gradients`, if gradients also live outside `module.parameters()`.
        - `buckets`, if gradients are reduced in flat buffers that can be reached before the reduction.
        - `marks`, if it can tell faster than by looking at every shard that nothing has changed.
        - `stepped`, if an optimizer steps other tensors than the module's parameters; `holds`, if weights can be moved
          to new storage without a change of those tensors.
        - `settle`, if a forward leaves unsharded weights behind; `publish`, if the model computes with copies.
        - `own_optimizer` and `clips_inside`, if the engine steps and clips by itself.

    Attributes:
        kinds: the engine's names in a configuration.
        name: the kind of this instance.
        takes_plain_modules: True if `recognises` accepts modules that nothing has wrapped. `find_engine` asks such an
            engine last.
        prepared: the class that the trainer uses to run a training step.
        own_optimizer: the only optimizer that can step this engine's weights; None: any optimizer can.
        clips_inside: True if the engine clips gradients inside its own step.
        model: the wrapped model.
        module: the unwrapped model; the same object as `model` if the engine shards it in place.
        names: canonical names of the weights.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    takes_plain_modules: ClassVar[bool] = False
    prepared: ClassVar[type[Prepared]] = Prepared

    name: str
    own_optimizer: torch.optim.Optimizer | None = None
    clips_inside = False

    def __init__(self, model: nn.Module, module: nn.Module, names: ParameterNames) -> None:
        """
        Args:
            model: the wrapped model.
            module: the unwrapped model; its `named_parameters()` define the canonical names.
            names: canonical names of the weights.
        """
        self.model = model
        self.module = module
        self.names = names

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ENGINES.update(dict.fromkeys(cls.kinds, cls))

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether this engine handles `model` as it is wrapped now."""

    @abstractmethod
    def leaves(self) -> list[Leaf]:
        """The leaves of all trainable weights, in the same order on every rank. Collective where weights are sharded."""

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's part of every weight, frozen weights included, in model order. No communication."""

    def buckets(self, leaves: Sequence[Leaf]) -> list[Bucket]:
        """The flat buffers in which gradients are reduced, in the same order on every rank.

        Args:
            leaves: what `leaves` returned. Those that no bucket contains are hooked themselves.
        """
        return []

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """The unsharded shape of every weight, by canonical name."""
        return {name: tuple(p.shape) for name, p in self.names.parameters.items()}

    # -- wrapping, for the trainer ------------------------------------------------------------------------------------

    @classmethod
    def shards_weights(cls, options: WrapOptions) -> bool:
        """Whether the engine can shard a model on the meta device first and allocate its memory afterwards."""
        return False

    @classmethod
    def flattens(cls, zero_stage: int) -> bool:
        """Whether an optimizer gets flat parts of the weights, which do not show the rows and columns.

        Args:
            zero_stage: stage of DeepSpeed; other engines do not need it.
        """
        return False

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        """Wraps `model` before the optimizer exists.

        Args:
            model: the plain model. Its weights may be on the meta device only if `shards_weights(options)` is True.
            options: how to wrap it.

        Returns:
            The wrapped model, with memory for its weights.
        """
        return model

    @classmethod
    def wrap(cls, model: nn.Module, options: WrapOptions, make_optimizer: MakeOptimizer) -> Prepared:
        """Wraps `model` and creates its optimizer.

        Args:
            model: as for `wrap_module`.
            options: how to wrap it.
            make_optimizer: called with (name, parameter, whether the weight has two or more dimensions) of every weight.
        """
        wrapped = cls.wrap_module(model, options)
        engine = cls(wrapped)  # type: ignore[call-arg]
        shapes = engine.full_shapes()
        weights = [(name, p, len(shapes[name]) > 1) for name, p in engine.names.parameters.items()]
        return cls.prepared(options, wrapped, make_optimizer(weights))

    # -- scoring ------------------------------------------------------------------------------------------------------

    def scoring_model(self) -> nn.Module:
        """The module to run while scoring. After its backward, `reduce_gradients` must be able to form the mean."""
        return self.model

    def expect(self, last: bool) -> None:
        """Called while scoring, before the forward of each item.

        Args:
            last: whether the item is the last one of its score batch.
        """
        return None

    def backward(self, loss: Tensor) -> None:
        """Runs the backward of one item while scoring; `loss` is a scalar."""
        loss.backward()

    def reduce_gradients(self) -> None:
        """Completes the mean of the gradients over ranks after all backwards of one score batch. May be collective.

        The default does nothing: it assumes that each backward ended in a mean over ranks.
        """
        return None

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Removes all gradients for the block and restores the old ones after it."""
        holders = self._gradient_holders()
        old_gradients = [(p, p.grad) for p in holders]
        self.clear_gradients()
        try:
            yield
        finally:
            for parameter, gradient in old_gradients:
                parameter.grad = gradient

    def clear_gradients(self) -> None:
        """Sets all gradients to None."""
        for parameter in self._gradient_holders():
            parameter.grad = None

    def _gradient_holders(self) -> list[Tensor]:
        """All tensors with a `.grad` that a backward may fill."""
        return list(self.module.parameters())

    # -- training -----------------------------------------------------------------------------------------------------

    def stepped(self) -> dict[int, list[str]]:
        """The tensors that an optimizer may step, as the model is now. The names are the same on every rank.

        Returns:
            id of each tensor -> canonical names of the weights in it.
        """
        names_by_id: dict[int, list[str]] = {}
        for name, parameter in self.names.parameters.items():
            names_by_id.setdefault(id(parameter), []).append(name)
        return names_by_id

    def holds(self) -> bool:
        """Whether the weights are still stored as when this engine was created. Only for changes `stepped` cannot show."""
        return True

    def marks(self) -> tuple[list[Any], list[Any]]:
        """What `shards`, `stepped` and `holds` depend on. A step asks for it twice, so it should call little Python.

        Returns:
            Objects, and `places` of memory. As long as the objects are the same ones and the places are equal, the three
            methods return the same.
        """
        local = [shard.local for shard in self.shards()]
        return [self.holds()], [*self.stepped(), *places(local)]

    def settle(self) -> None:
        """Frees unsharded copies of the weights, which a forward without backward may leave behind."""
        return None

    def publish(self) -> None:
        """Makes the next forward use the current shards. Call it after you changed shards in place. Collective."""
        self.settle()

    @property
    def penalty(self) -> Any:
        """The penalty attached to the unwrapped module, or None. The module keeps the penalty alive."""
        return getattr(self.module, _PENALTY, None)

    @penalty.setter
    def penalty(self, penalty: Any) -> None:
        setattr(self.module, _PENALTY, penalty)

    @property
    def pull(self) -> Any:
        """The pull to the start that acts on the unwrapped module, or None. The module keeps it alive."""
        return getattr(self.module, _PULL, None)

    @pull.setter
    def pull(self, pull: Any) -> None:
        setattr(self.module, _PULL, pull)


def local_tensor(tensor: Tensor) -> Tensor:
    """The values on this rank, without a copy: the local tensor of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients_of(shards: Iterable[Shard]) -> list[Tensor | None]:
    """`Shard.gradient` of each shard, without a call of Python for each."""
    found: list[Tensor | None] = []
    for shard in shards:
        gradient = shard.parameter.grad
        if gradient is not None:
            if isinstance(gradient, DTensor):
                gradient = local_values(gradient)
            if shard.span is not None:
                gradient = gradient.view(-1)[shard.span[0] : shard.span[1]]
        found.append(gradient)
    return found


def places(tensors: Iterable[Tensor]) -> list[Any]:
    """Where these tensors are in memory, and how. Tensors without memory, on which `dcft plan` runs the code, never move."""
    tensors = list(tensors)
    if tensors and not has_values(tensors[0]):
        return []
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.stride, tensors)]


def overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether some of these contiguous tensors share memory, as gradients of weights that are added may."""
    if not tensors or not has_values(tensors[0]):
        return False
    end = 0
    for begin, size in sorted(zip(map(Tensor.data_ptr, tensors), map(_nbytes, tensors), strict=True)):
        if size and begin < end:
            return True
        end = max(end, begin + size)
    return False


_nbytes = attrgetter("nbytes")


def flat_shard(
    name: str, parameter: Tensor, values: Tensor, numel: int, start: int, share: tuple[int, int], **fields: Any
) -> Shard:
    """Builds the shard of a rank that stores a flat range of a weight.

    Args:
        name: canonical name of the weight.
        parameter: the tensor that the optimizer steps.
        values: the weight's elements on this rank.
        numel: number of elements of the whole weight.
        start: flat index in the weight of the first of `values`.
        share: (index, count) of this rank among the ranks that store the same range. Each owns an equal part of it.
        fields: other fields of `Shard`, such as `span`.
    """
    box = Box.flat(numel, start, values.numel())
    return Shard(name, parameter, values, box, *box.share(*share), **fields)


def check_materialised(names: ParameterNames) -> None:
    """Checks that no weight is on the meta device.

    Raises:
        EngineError: a weight is on the meta device, so it has no values yet.
    """
    if any(p.is_meta for p in names.parameters.values()):
        raise EngineError("the model has meta parameters: materialise them (to_empty, then load) before this call")
