"""DeepSpeed engines, ZeRO stages 0 to 3: the optimizer steps flat fp32 partitions, the model holds (parts of) its copies.

Tensor hooks on the engine's module parameters get the whole gradient before DeepSpeed's own reduction, in every stage. The
reduced gradient lives in `.grad` of the flat partitions, and only while the inner optimizer steps. So a score batch
is a DeepSpeed step whose inner optimizer reads instead of writing: DeepSpeed itself then clears what it has accumulated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

from torch import Tensor

from .. import collectives
from ..bits import Box
from ..errors import EngineError, ScoreError, listing
from ..names import ParameterNames
from . import private
from .base import Engine, Leaf, Segment, Shard, flat_shard

log = logging.getLogger(__name__)


@cache
def _warn_of_clipping() -> None:
    log.warning(
        "DeepSpeed clips gradients to a norm of 1.0, which it and Accelerate also do where nobody asked for it: to train "
        'without clipping, write "gradient_clipping": 0.0 into DeepSpeed\'s configuration'
    )


class ZeroEngine(Engine):
    """A DeepSpeedEngine with an optimizer. Each rank owns its partition; in stage 0 a slice of every weight."""

    name = "deepspeed"
    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.module, ParameterNames.of(model.module))
        self.stage = int(model.zero_optimization_stage())
        self.own_optimizer = private.zero_inner_optimizer(model)
        if self.own_optimizer is None:
            raise EngineError("the DeepSpeedEngine has no optimizer: pass one to deepspeed.initialize")
        self.clips_inside = model.gradient_clipping() > 0
        if model.gradient_clipping() == 1.0:
            _warn_of_clipping()
        self._names = {id(p): name for name, p in self.names.parameters.items()}
        self._flats = private.zero_partitions(model.optimizer, self.stage)
        self._held: list[tuple[Any, Tensor | None]] = []
        known = {id(part.parameter) for flat in self._flats for part in flat.parts}
        missed = [n for n in self.names.trainable if id(self.names.parameters[n]) not in known]
        if missed:
            raise EngineError(f"DeepSpeed's optimizer does not step {listing(missed)}: freeze them, or pass them to it")
        ranks = collectives.world_size()
        sizes = [n for p in self.names.parameters.values() if (n := private.zero3_group_size(p)) not in (None, ranks)]
        if sizes:
            raise EngineError(f"ZeRO partitions over {sizes[0]} of {ranks} ranks: MiCS is not supported")

    def leaves(self) -> list[Leaf]:
        shapes = self.full_shapes()
        return [
            Leaf(p, (Segment(name, 0, Box.flat(prod(shapes[name]), 0, prod(shapes[name]))),))
            for name, p in self.names.parameters.items()
            if p.requires_grad
        ]

    def shards(self) -> list[Shard]:
        ranks, shapes = (collectives.rank(), collectives.world_size()), self.full_shapes()
        found: dict[str, Shard] = {}
        for flat in self._flats:
            for part in flat.parts:
                name = self._names[id(part.parameter)]
                span = (part.offset, part.offset + part.numel)
                values = flat.tensor.detach().view(-1)[slice(*span)]
                share = ranks if flat.replicated else (0, 1)
                found[name] = flat_shard(name, flat.tensor, values, prod(shapes[name]), part.first, share, span=span)
        for name, p in self.names.parameters.items():
            if name not in found:  # frozen
                values, first = private.zero3_partition(p) or (p.detach().view(-1), 0)
                share = (0, 1) if private.zero3_group_size(p) else ranks
                found[name] = flat_shard(name, p, values, prod(shapes[name]), first, share)
        return [found[name] for name in self.names.parameters]

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: private.zero_shape(p) for name, p in self.names.parameters.items()}

    def stepped(self) -> dict[int, list[str]]:
        # All of a group's names, whether or not this rank's partition has any of their cells: the same on every rank.
        return {id(flat.tensor): [self._names[id(part.parameter)] for part in flat.parts] for flat in self._flats}

    def holds(self) -> bool:
        return private.zero_steps(self.model.optimizer, self._flats)

    # -- scoring ----------------------------------------------------------------------------------------------------

    def expect(self, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        if self.model.optimizer is self.own_optimizer:
            return  # stage 0 in float32: the reduced gradients are those of the parameters
        read: list[tuple[Any, Tensor]] = []
        private.zero_step_that_reads(self.model.optimizer, self.own_optimizer, read)
        if not read:
            raise ScoreError("the gradients of a score batch overflowed: lower the loss scale (fp16.initial_scale_power)")
        self._held = [(flat, flat.grad) for flat, _ in read]
        for flat, gradient in read:
            flat.grad = gradient

    def clear_gradients(self) -> None:
        super().clear_gradients()
        for flat, gradient in self._held:
            flat.grad = gradient
        self._held = []

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        if not self.model.managed_gradient_accumulation():
            raise EngineError("scoring needs managed_gradient_accumulation = true in DeepSpeed's configuration")
        waiting = private.zero_gradients_wait(self.model.optimizer)
        if waiting or self.model.micro_steps % self.model.gradient_accumulation_steps():
            raise EngineError("gradients are being accumulated: score at a step boundary")
        with super().gradients_aside(), private.zero_undisturbed(self.model):
            yield

    def publish(self) -> None:
        private.zero_publish(self.model.optimizer, self._flats)
