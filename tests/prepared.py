"""The odd net under every engine, behind one interface for the parity tests: backward, clip, step, whole weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dcft_dist.compat.deepspeed import import_deepspeed
from dcft_dist.compat.pytorch import fsdp2_groups

from .nets import DEVICE, Block, OddNet, full

# Every kind of engine that runs on gloo. `group`: several modules in a group; `groups`: several groups in a module.
DDP = ["ddp", "ddp-nosync"]
FSDP2 = ["fsdp2", "fsdp2-keep", "fsdp2-offload", "fsdp2-shard1", "fsdp2-checkpoint", "fsdp2-group", "fsdp2-hybrid"]
if hasattr(_fsdp_common, "ShardPlacementResult"):  # since torch 2.13
    FSDP2.insert(-1, "fsdp2-groups")
FSDP1 = [f"fsdp1-{s}-{o}" for s in ("full", "gradop", "none", "hybrid") for o in ("flat", "orig")]
FSDP1 += ["fsdp1-full-flat-nosync", "fsdp1-full-orig-nosync"]
ZERO = ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-params", "zero3-init"]
ENGINES = ["single", *DDP, *FSDP2, *FSDP1, *ZERO]
# Each engine with a number of ranks, FSDP2 with four and with two.
RANKS = [(e, 1 if e == "single" else 4 if e in ("fsdp2", "fsdp2-hybrid", "zero3") else 2) for e in ENGINES] + [("fsdp2", 2)]


@dataclass
class Prepared:
    """A model under an engine with its optimizer."""

    engine: str
    model: Any
    optimizer: Any
    clip_norm: float | None

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    def accumulating(self, last: bool) -> Any:
        """For forward and backward of a micro-batch. Otherwise DDP and FSDP1 reduce with every one."""
        return self.model.no_sync() if self.engine.endswith("nosync") and not last else nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """FSDP2 reduces with the last micro-batch only."""
        if self.is_zero:
            self.model.backward(loss, scale_wrt_gas=False)
            if not last:
                self.model.step()
            return
        if self.engine.startswith("fsdp2"):
            self.model.set_requires_gradient_sync(last)
        loss.backward()

    def clip(self) -> None:
        """DeepSpeed clips by itself."""
        if self.clip_norm is None or self.is_zero:
            return
        if self.engine.startswith("fsdp1"):
            self.model.clip_grad_norm_(self.clip_norm)
        elif self.engine == "fsdp2-groups":  # torch does not stack the norms of several meshes
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.stack([g.full_tensor().norm() for g in gradients]).norm()
            for gradient in gradients:
                gradient.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)

    def step(self) -> None:
        (self.model if self.is_zero else self.optimizer).step()

    def zero_grad(self, to_none: bool) -> None:
        if not self.is_zero:
            self.optimizer.zero_grad(set_to_none=to_none)

    def state(self) -> dict[str, Tensor]:
        """Whole weights by name, by the engine's own means."""
        if self.engine.startswith("fsdp1"):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                found = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in self.model.named_parameters()}
                return {n: p.detach().clone() for n, p in found.items()}
        bare = self.model.module if isinstance(self.model, DistributedDataParallel) or self.is_zero else self.model
        if self.is_zero:
            from deepspeed.runtime.zero import GatheredParameters
            from deepspeed.utils import safe_get_full_fp32_param

            out = {}
            outer = self.model.optimizer
            groups = (outer.fp16_groups, outer.fp32_groups) if hasattr(outer, "fp32_groups") else ((), ())  # bf16, stage 0
            masters = {id(p): m for ps, ms in zip(*groups, strict=True) for p, m in zip(ps, ms, strict=True)}
            for n, p in bare.named_parameters():
                whole = safe_get_full_fp32_param(p) if p.requires_grad and self.engine != "zero0" else masters.get(id(p))
                if whole is None:
                    with GatheredParameters([p]):
                        whole = p.detach().clone()
                out[n] = whole.view(p.ds_shape if hasattr(p, "ds_id") else p.shape).clone()
            return out
        return {_clean(n): full(p.detach()).clone() for n, p in bare.named_parameters()}


def _clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def prepare(
    make: Callable[[], OddNet],
    engine: str,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    bf16: bool = False,
    accumulation: int = 1,
    micro_batch: int = 1,
    clip_norm: float | None = None,
    zero_options: dict[str, Any] | None = None,
) -> Prepared:
    kind, _, variant = engine.partition("-")
    if kind.startswith("zero"):
        return _zero(make, engine, make_optimizer, bf16, accumulation, micro_batch, clip_norm, zero_options or {})
    wrap = {"single": lambda net: net, "ddp": _ddp, "fsdp2": _fsdp2, "fsdp1": _fsdp1}[kind]
    model = wrap(make()) if kind in ("single", "ddp") else wrap(make(), variant, bf16)  # type: ignore[call-arg]
    return Prepared(engine, model, make_optimizer(model.parameters()), clip_norm)


def _ddp(net: OddNet) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=True)


def _fsdp2(net: OddNet, variant: str, bf16: bool) -> nn.Module:
    ranks = dist.get_world_size()
    mesh = init_device_mesh(DEVICE.type, (ranks,))
    if variant == "hybrid":
        shape = (2, ranks // 2) if ranks > 2 else (ranks, 1)
        mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard"))
    options: dict[str, Any] = {"mesh": mesh}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if variant == "keep":
        options["reshard_after_forward"] = False
    if variant == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if variant == "shard1":  # FSDP2 wants other dimensions than the first to divide evenly
        options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % ranks == 0 else Shard(0)
    if variant == "groups":
        replicas = init_device_mesh(DEVICE.type, (ranks, 1), mesh_dim_names=("replicate", "shard"))
        info = _fsdp_common.HSDPMeshInfo(replicas, shard_mesh_dim=1, replicate_mesh_dim=0)
        whole = _fsdp_common.ShardPlacementResult(Shard(0), info)
        chosen = {id(p) for n, p in net.named_parameters() if n.endswith(("up.weight", "mix.weight"))}
        options["shard_placement_fn"] = lambda p: whole if id(p) in chosen else None
    if variant == "checkpoint":
        apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, Block))
    if variant == "group":
        fully_shard([net.blocks[0], net.blocks[1]], **options)
    else:
        for block in net.blocks:
            fully_shard(block, **options)
    fully_shard(net, **options)
    if variant == "shard1" and ranks in (2, 4):
        assert net.blocks[1].down.weight.placements == (Shard(1),)
    if variant == "groups":
        assert len(fsdp2_groups(net.blocks[0])) == 2
    return net


def _fsdp1(net: OddNet, variant: str, bf16: bool) -> nn.Module:
    strategy, originals = variant.split("-")[:2]
    options: dict[str, Any] = {"use_orig_params": originals == "orig", "device_id": DEVICE}
    options["sharding_strategy"] = {
        "full": ShardingStrategy.FULL_SHARD,
        "gradop": ShardingStrategy.SHARD_GRAD_OP,
        "none": ShardingStrategy.NO_SHARD,
        "hybrid": ShardingStrategy.HYBRID_SHARD,
    }[strategy]
    if strategy == "hybrid":
        ranks = dist.get_world_size()
        options["device_mesh"] = init_device_mesh(DEVICE.type, (2, ranks // 2) if ranks > 2 else (1, ranks))
    if bf16:
        options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for i, block in enumerate(net.blocks):
        net.blocks[i] = FullyShardedDataParallel(block, **options)
    if originals == "flat":  # flat units are frozen as a whole or not at all
        net.frozen = FullyShardedDataParallel(net.frozen, **options)
    return FullyShardedDataParallel(net, **options)


def _zero(
    make: Callable[[], OddNet],
    engine: str,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    bf16: bool,
    accumulation: int,
    micro_batch: int,
    clip_norm: float | None,
    options: dict[str, Any],
) -> Prepared:
    deepspeed = import_deepspeed()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    kind, _, variant = engine.partition("-")
    zero: dict[str, Any] = {"stage": int(kind[-1]), "reduce_bucket_size": 200, "allgather_bucket_size": 200}
    if kind == "zero3":
        zero |= {"stage3_param_persistence_threshold": 20, "stage3_max_live_parameters": 300, "sub_group_size": 300}
    if variant in ("offload", "params"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if variant == "params":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }
    if variant == "sum32":
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    if variant == "init":
        # Its type comes from the configuration: one given as dtype= is passed over on CPUs without float16 (0.19.8).
        with deepspeed.zero.Init(config_dict_or_path=config):
            net = make()
        if DEVICE.type == "cuda":  # the weights were drawn there, by another generator
            for name, value in dict(make().named_parameters()).items():
                with deepspeed.zero.GatheredParameters([net.get_parameter(name)], modifier_rank=0):
                    net.get_parameter(name).data.copy_(value)
    else:
        net = make()
    optimizer = make_optimizer(net.parameters())
    model, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return Prepared(engine, model, optimizer, clip_norm)
