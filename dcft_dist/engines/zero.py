"""The engine for DeepSpeed, ZeRO stages 0 to 3.

DeepSpeed's optimizer steps flat fp32 partitions. The model stores copies of them, in stage 3 only this rank's part.

In every stage, tensor hooks on the module's parameters see the whole gradient before DeepSpeed reduces it. The reduced
gradient exists only while the inner optimizer steps, in `.grad` of the flat partitions. So a score batch runs one
DeepSpeed step in which the inner optimizer reads gradients instead of changing weights. After it, DeepSpeed itself clears
the gradients it accumulated.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compat.deepspeed import (
    import_deepspeed,
    zero3_group_size,
    zero3_materialise,
    zero3_partition,
    zero_gradients_wait,
    zero_inner_optimizer,
    zero_owners,
    zero_partitions,
    zero_publish,
    zero_shape,
    zero_step_that_reads,
    zero_steps,
    zero_undisturbed,
)
from ..compat.versions import check_version
from ..distributed import collectives
from ..errors import DivergedError, EngineError, ScoreError, listing
from .base import Engine, Leaf, Segment, Shard, flat_shard, places
from .box import Box
from .meta import Materialiser
from .names import ParameterNames
from .prepared import MakeOptimizer, Prepared, WrapOptions

log = logging.getLogger(__name__)


@cache
def _warn_of_clipping() -> None:
    log.warning(
        "DeepSpeed clips gradients to a norm of 1.0, which is also the default of DeepSpeed and Accelerate: to train "
        'without clipping, set "gradient_clipping": 0.0 in DeepSpeed\'s configuration'
    )


class PreparedZero(Prepared):
    """A training step in which DeepSpeed counts micro-batches, and reduces, clips and clears the gradients by itself."""

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.model.step()  # DeepSpeed counts the micro-batch; nothing is stepped yet

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def clip(self) -> None:
        return None

    def step(self) -> None:
        """
        Raises:
            DivergedError: DeepSpeed has left the step out, since a gradient is NaN or infinite. It would do so in silence.
        """
        before = self.model.skipped_steps
        self.model.step()
        if self.model.skipped_steps != before:
            raise DivergedError("a gradient is NaN or infinite, so DeepSpeed has left out this step: lower optimizer.lr")

    def zero_grad(self) -> None:
        return None


class ZeroEngine(Engine):
    """A DeepSpeedEngine with an optimizer. Each rank owns its partition, or in stage 0 a slice of every weight."""

    kinds = ("deepspeed",)
    name = "deepspeed"
    prepared = PreparedZero
    model: Any

    def __init__(self, model: Any) -> None:
        check_version("deepspeed")
        super().__init__(model, model.module, ParameterNames.of(model.module))
        self.stage = int(model.zero_optimization_stage())
        self.own_optimizer = zero_inner_optimizer(model)
        if self.own_optimizer is None:
            raise EngineError("the DeepSpeedEngine has no optimizer: pass one to deepspeed.initialize")
        self.clips_inside = model.gradient_clipping() > 0
        if model.gradient_clipping() == 1.0:
            _warn_of_clipping()
        self._names_by_id = {id(p): name for name, p in self.names.parameters.items()}
        self._partitions = zero_partitions(model.optimizer, self.stage)
        self._flat_gradients: list[tuple[Any, Tensor | None]] = []  # flat partition, its `.grad` before a score batch
        stepped = {id(part.parameter) for flat in self._partitions for part in flat.parts}
        unstepped = [n for n in self.names.trainable if id(self.names.parameters[n]) not in stepped]
        if unstepped:
            raise EngineError(
                f"DeepSpeed's optimizer does not step {listing(unstepped)}: freeze them, or pass them to the optimizer"
            )
        ranks = collectives.world_size()
        wrong_sizes = [n for p in self.names.parameters.values() if (n := zero3_group_size(p)) not in (None, ranks)]
        if wrong_sizes:
            raise EngineError(f"ZeRO partitions weights over {wrong_sizes[0]} of {ranks} ranks: MiCS is not supported")

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        deepspeed = sys.modules.get("deepspeed")  # not imported: `model` cannot be a DeepSpeedEngine
        return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)

    @classmethod
    def shards_weights(cls, options: WrapOptions) -> bool:
        return options.zero_stage == 3

    @classmethod
    def flattens(cls, zero_stage: int) -> bool:
        return zero_stage > 0

    @classmethod
    def wrap(cls, model: nn.Module, options: WrapOptions, make_optimizer: MakeOptimizer) -> Prepared:
        config = _config(options)
        if any(p.is_meta for p in model.parameters()):
            dtype = torch.bfloat16 if options.bf16 else torch.float32
            zero3_materialise(model, Materialiser(options.device).one, config, dtype)
        if options.bf16:
            model.register_forward_pre_hook(_in_bf16, with_kwargs=True)
        optimizer = make_optimizer([(name, p, len(zero_shape(p)) > 1) for name, p in model.named_parameters()])
        if dist.get_world_size() == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it, and no launcher has set it for a lone process
        engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
        return cls.prepared(options, engine, optimizer)

    def leaves(self) -> list[Leaf]:
        shapes = self.full_shapes()
        return [
            Leaf(p, (Segment(name, 0, Box.flat(prod(shapes[name]), 0, prod(shapes[name]))),))
            for name, p in self.names.parameters.items()
            if p.requires_grad
        ]

    def shards(self) -> list[Shard]:
        rank_and_count, shapes = (collectives.rank(), collectives.world_size()), self.full_shapes()
        shards: dict[str, Shard] = {}
        for flat in self._partitions:
            for part in flat.parts:
                if (name := self._names_by_id.get(id(part.parameter))) is None:
                    continue  # of an adapter that has been merged, and is no longer in the model
                span = (part.offset, part.offset + part.numel)
                values = flat.tensor.detach().view(-1)[slice(*span)]
                share = rank_and_count if flat.replicated else (0, 1)
                shards[name] = flat_shard(name, flat.tensor, values, prod(shapes[name]), part.first, share, span=span)
        for name, p in self.names.parameters.items():
            if name not in shards:  # frozen
                values, first = zero3_partition(p) or (p.detach().view(-1), 0)
                share = (0, 1) if zero3_group_size(p) else rank_and_count
                shards[name] = flat_shard(name, p, values, prod(shapes[name]), first, share)
        return [shards[name] for name in self.names.parameters]

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: zero_shape(p) for name, p in self.names.parameters.items()}

    def stepped(self) -> dict[int, list[str]]:
        # All names of a group, even if this rank's partition has no element of them: the same names on every rank.
        names = {
            id(flat.tensor): [self._names_by_id.get(id(part.parameter)) for part in flat.parts] for flat in self._partitions
        }
        return {tensor: [name for name in parts if name is not None] for tensor, parts in names.items()}

    def holds(self) -> bool:
        return zero_steps(self.model.optimizer, self._partitions)

    def marks(self) -> tuple[list[Any], list[Any]]:
        return zero_owners(self._partitions), places(flat.tensor for flat in self._partitions)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def expect(self, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        if self.model.optimizer is self.own_optimizer:
            return  # stage 0 in float32: the parameters' own gradients are the reduced ones
        gradients: list[tuple[Any, Tensor]] = []
        zero_step_that_reads(self.model.optimizer, self.own_optimizer, gradients)
        if not gradients:
            raise ScoreError("the gradients of a score batch overflowed: lower the loss scale (fp16.initial_scale_power)")
        self._flat_gradients = [(flat, flat.grad) for flat, _ in gradients]
        for flat, gradient in gradients:
            flat.grad = gradient

    def clear_gradients(self) -> None:
        super().clear_gradients()
        for flat, gradient in self._flat_gradients:
            flat.grad = gradient
        self._flat_gradients = []

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        if not self.model.managed_gradient_accumulation():
            raise EngineError("scoring needs managed_gradient_accumulation = true in DeepSpeed's configuration")
        pending = zero_gradients_wait(self.model.optimizer)
        if pending or self.model.micro_steps % self.model.gradient_accumulation_steps():
            raise EngineError("gradients are being accumulated: score at a step boundary")
        with super().gradients_aside(), zero_undisturbed(self.model):
            yield

    def publish(self) -> None:
        zero_publish(self.model.optimizer, self._partitions)


def _config(options: WrapOptions) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "gradient_clipping": options.clip_grad_norm or 0.0,  # DeepSpeed's default is 1.0
        "zero_optimization": {"stage": options.zero_stage},
        "bf16": {"enabled": options.bf16},
        "zero_allow_untested_optimizer": True,  # accept any torch optimizer: DeepSpeed's own list is short
        "zero_force_ds_cpu_optimizer": False,
    }
    if options.bf16 and options.zero_stage:  # reduce in float32, as the other engines do; stage 0 cannot
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if options.offload:
        pinned = options.device.type == "cuda"
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return config


def _in_bf16(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook that casts inputs to bfloat16. FSDP does so by itself; DeepSpeed does so only for float16."""

    def cast(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}
