"""Puts a model and its optimizer under an engine, for the trainer. Users with an own loop wrap their models themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from ..errors import EngineError
from ..meta import Materialiser
from . import find_engine, private

log = logging.getLogger(__name__)
Weight = tuple[str, nn.Parameter, bool]  # name, parameter, whether it is a matrix (or has more dimensions)
MakeOptimizer = Callable[[list[Weight]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """How a model is to be wrapped. `replicas`: groups of ranks that each hold all shards (hybrid sharding)."""

    engine: str
    device: torch.device
    blocks: Sequence[nn.Module]
    bf16: bool = False
    replicas: int = 1
    offload: bool = False
    zero_stage: int = 2
    micro_batch: int = 1
    accumulation: int = 1
    clip_grad_norm: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A wrapped model and the torch optimizer that steps its weights, with one way to train under every engine."""

    plan: Plan
    model: Any
    optimizer: torch.optim.Optimizer

    def computing(self) -> Any:
        """The context of a forward: autocast to bfloat16 where the engine does not cast by itself."""
        enabled = self.plan.bf16 and self.plan.engine in ("single", "ddp")
        return torch.autocast(self.plan.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are reduced over ranks with the last one only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        may_wait = isinstance(self.model, DistributedDataParallel | FullyShardedDataParallel) and not last
        with self.model.no_sync() if may_wait else nullcontext():
            yield
        if self.plan.engine == "deepspeed" and not last:
            self.model.step()  # counts the micro-batch

    def backward(self, loss: Tensor) -> None:
        """`loss` is already divided by the number of micro-batches."""
        if self.plan.engine == "deepspeed":
            self.model.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()

    def clip(self) -> None:
        """To the plan's norm, if there is one; DeepSpeed does so inside its step."""
        limit = self.plan.clip_grad_norm
        if limit is None or self.plan.engine == "deepspeed":
            return
        if isinstance(self.model, FullyShardedDataParallel):
            self.model.clip_grad_norm_(limit)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def step(self) -> None:
        (self.model if self.plan.engine == "deepspeed" else self.optimizer).step()

    def zero_grad(self) -> None:
        if self.plan.engine != "deepspeed":  # it has done so itself
            self.optimizer.zero_grad()


def prepare(model: nn.Module, plan: Plan, make_optimizer: MakeOptimizer) -> Prepared:
    """Wraps `model`, each of the plan's blocks and the rest a unit of its own; weights, or their masters, in float32.

    Weights on the meta device get memory, and no values, once they are sharded (before, where the engine does not shard).

    Raises:
        EngineError: `single` on several ranks; replicas that do not divide the ranks.
    """
    ranks = dist.get_world_size()
    if plan.engine == "single" and ranks > 1:
        raise EngineError(f"engine 'single' on {ranks} ranks: use another engine, or start one rank")
    if ranks % plan.replicas:
        raise EngineError(f"{plan.replicas} replicas do not divide {ranks} ranks")
    if not shards_weights(plan) or not any(p.is_meta for p in model.parameters()):
        Materialiser(plan.device)(model)
    _avoid_wrong_gradients(model, plan)
    if plan.engine == "deepspeed":
        return _deepspeed(model, plan, make_optimizer)
    wrap = {"single": lambda m, _: m, "ddp": _ddp, "fsdp2": _fsdp2, "fsdp1": _fsdp1}[plan.engine]
    wrapped = wrap(model, plan)
    engine = find_engine(wrapped)
    shapes = engine.full_shapes()
    weights = [(name, p, len(shapes[name]) > 1) for name, p in engine.names.parameters.items()]
    return Prepared(plan, wrapped, make_optimizer(weights))


def _avoid_wrong_gradients(model: nn.Module, plan: Plan) -> None:
    """Turns oneDNN off for this process where its gradients are wrong.

    In bfloat16 on CPUs with AVX-512 that of a 3-d convolution's weight reads memory which nobody wrote, where the image has
    two voxels along its first axis, as at the bottom of a U-Net (oneDNN 3.12, torch 2.13). torch's own kernel is right.
    """
    convolves = any(isinstance(m, nn.Conv3d | nn.ConvTranspose3d) for m in model.modules())
    if plan.bf16 and plan.device.type == "cpu" and convolves and torch.backends.mkldnn.is_available():
        torch.backends.mkldnn.set_flags(False)
        log.warning("bf16 on the CPU: without oneDNN, whose gradients of 3-d convolutions may be wrong; this is slow")


def shards_weights(plan: Plan) -> bool:
    """Whether the engine can take a model without memory and shard it first."""
    return plan.engine in ("fsdp2", "fsdp1") or (plan.engine == "deepspeed" and plan.zero_stage == 3)


def _ddp(model: nn.Module, plan: Plan) -> nn.Module:
    # Without this DDP re-builds its buckets after the first step, and a resumed run would sum in another order.
    return DistributedDataParallel(model, find_unused_parameters=True)


def _mesh(plan: Plan) -> Any:
    ranks, kind = dist.get_world_size(), plan.device.type
    if plan.replicas == 1:
        return init_device_mesh(kind, (ranks,))
    return init_device_mesh(kind, (plan.replicas, ranks // plan.replicas), mesh_dim_names=("replicate", "shard"))


def _fsdp2(model: nn.Module, plan: Plan) -> nn.Module:
    options = {
        "mesh": _mesh(plan),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if plan.bf16
        else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=plan.device.type == "cuda") if plan.offload else OffloadPolicy(),
    }
    for block in plan.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    if any(p.is_meta for p in model.parameters()):
        private.fsdp2_materialise(model, torch.device("cpu") if plan.offload else plan.device)
        Materialiser(plan.device).move_buffers(model)
    return model


def _fsdp1(model: nn.Module, plan: Plan) -> nn.Module:
    options = {
        "device_mesh": _mesh(plan),
        "sharding_strategy": ShardingStrategy.HYBRID_SHARD if plan.replicas > 1 else ShardingStrategy.FULL_SHARD,
        "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if plan.bf16 else None,
        "cpu_offload": CPUOffload(plan.offload),
        "device_id": plan.device,
        "param_init_fn": Materialiser(plan.device).one,  # of modules on the meta device
        "use_orig_params": True,  # so that parameter groups may differ within a unit
    }
    blocks = set(map(id, plan.blocks))
    for parent in list(model.modules()):
        for slot, child in list(parent.named_children()):
            if id(child) in blocks:
                setattr(parent, slot, FullyShardedDataParallel(child, **options))
    return FullyShardedDataParallel(model, **options)


def _in_bf16(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Casts what a model is given, as FSDP does by itself; DeepSpeed does so for float16 alone."""

    def cast(value: Any) -> Any:
        return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _deepspeed(model: nn.Module, plan: Plan, make_optimizer: MakeOptimizer) -> Prepared:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.clip_grad_norm or 0.0,  # its default would be 1.0
        "zero_optimization": {"stage": plan.zero_stage},
        "bf16": {"enabled": plan.bf16},
        "zero_allow_untested_optimizer": True,  # any of torch's: the default list has few
        "zero_force_ds_cpu_optimizer": False,
    }
    if plan.bf16 and plan.zero_stage:  # as the other engines do; stage 0 cannot
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if plan.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": plan.device.type == "cuda"}
    if any(p.is_meta for p in model.parameters()):
        dtype = torch.bfloat16 if plan.bf16 else torch.float32
        private.zero3_materialise(model, Materialiser(plan.device).one, config, dtype)
    if plan.bf16:
        model.register_forward_pre_hook(_in_bf16, with_kwargs=True)
    optimizer = make_optimizer([(name, p, len(private.zero_shape(p)) > 1) for name, p in model.named_parameters()])
    engine, *_ = private.import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    return Prepared(plan, engine, optimizer)
