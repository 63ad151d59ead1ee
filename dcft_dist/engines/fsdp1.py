"""The engine for FSDP1 (`FullyShardedDataParallel`).

FSDP1 flattens the weights of each unit into one flat parameter, and each rank stores a range of it. A weight may be split
between ranks. The flat parameter has padding between and after the weights.

The flat parameter is the autograd leaf: it receives the unsharded gradient of all weights of its unit. Hooks on the
original parameters never fire, whether `use_orig_params` is True or False.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from ..compat.pytorch import (
    clean,
    fsdp1_handle,
    fsdp1_members,
    fsdp1_original_parameters,
    fsdp1_replicas,
    fsdp1_reshard,
    fsdp1_shard,
    fsdp1_shared,
)
from ..distributed import collectives
from ..errors import EngineError, listing
from .base import Engine, Leaf, Segment, Shard, check_materialised, flat_shard, places
from .box import Box
from .fsdp2 import mesh_of
from .meta import Materialiser
from .names import ParameterNames
from .prepared import Prepared, WrapOptions


class PreparedFSDP1(Prepared):
    """A training step that reduces gradients with the last micro-batch or with each, and clips with FSDP's own method."""

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with nullcontext() if last or self.options.reduce_each else self.model.no_sync():
            yield

    def clip(self) -> None:
        if self.options.clip_grad_norm is not None:
            self.model.clip_grad_norm_(self.options.clip_grad_norm)


class FSDP1Engine(Engine):
    """Weights flattened and sharded by `FullyShardedDataParallel`, with any of its sharding strategies."""

    kinds = ("fsdp1",)
    name = "fsdp1"
    prepared = PreparedFSDP1

    def __init__(self, model: nn.Module) -> None:
        self._units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
        self._handles = [h for h in map(fsdp1_handle, self._units) if h is not None]
        self._positions: dict[str, tuple[Any, int]] = {}  # name -> (flat parameter, number of the weight in it)
        super().__init__(model, model, ParameterNames(self._named(model)))
        outside = [n for n, p in self.names.parameters.items() if n not in self._positions and p.requires_grad]
        if outside or not isinstance(model, FullyShardedDataParallel):
            raise EngineError(
                f"nothing reduces the gradients of {listing(outside) or 'a model whose root is not wrapped'}: "
                "wrap the root module in FullyShardedDataParallel too, and freeze what is in ignored_states"
            )
        self._shares = {id(h.flat_param): _share(u, h) for u in self._units if (h := fsdp1_handle(u)) is not None}
        check_materialised(self.names)
        self.settle()

    def _named(self, model: nn.Module) -> Iterator[tuple[str, Hashable, Any]]:
        """(name, identity, parameter) of all weights, in the order of the unwrapped model's `named_parameters`."""
        slots: dict[int, list[tuple[str, Hashable, Any, Any]]] = {}
        for handle in self._handles:
            flat = handle.flat_param
            originals = fsdp1_original_parameters(flat)
            indices: dict[tuple[int, str], int] = {}
            for i, (module, slot, *_) in enumerate(fsdp1_members(flat)):
                indices[id(module), slot] = i
                holder = flat if originals is None else originals[i]
                slots.setdefault(id(module), []).append((slot, (id(flat), i), holder, (flat, i)))
            for module, slot, first_module, first_slot in fsdp1_shared(flat):
                i = indices[id(first_module), first_slot]
                holder = flat if originals is None else originals[i]
                slots.setdefault(id(module), []).append((slot, (id(flat), i), holder, (flat, i)))
        flats = {id(h.flat_param) for h in self._handles}
        for prefix, module in model.named_modules(remove_duplicate=False):
            known = slots.get(id(module), [])
            for slot, identity, holder, position in known:
                name = clean(f"{prefix}.{slot}" if prefix else slot)
                self._positions.setdefault(name, position)
                yield name, identity, holder
            for slot, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) not in flats and slot not in {k[0] for k in known}:
                    yield f"{prefix}.{slot}" if prefix else slot, id(parameter), parameter

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return any(isinstance(m, FullyShardedDataParallel) for m in model.modules())

    @classmethod
    def shards_weights(cls, options: WrapOptions) -> bool:
        return True

    @classmethod
    def flattens(cls, zero_stage: int) -> bool:
        return True

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fsdp_options: dict[str, Any] = {
            "device_mesh": mesh_of(options),
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD if options.replicas > 1 else ShardingStrategy.FULL_SHARD,
            "mixed_precision": bf16 if options.bf16 else None,
            "cpu_offload": CPUOffload(options.offload),
            "device_id": options.device,
            "param_init_fn": Materialiser(options.device).one,  # gives modules on the meta device memory
            "use_orig_params": True,  # parameter groups may then differ within a unit
        }
        blocks = set(map(id, options.blocks))
        for parent in list(model.modules()):
            for slot, child in list(parent.named_children()):
                if id(child) in blocks:
                    setattr(parent, slot, FullyShardedDataParallel(child, **fsdp_options))
        return FullyShardedDataParallel(model, **fsdp_options)

    def leaves(self) -> list[Leaf]:
        names = {self._positions[n][0:2]: n for n in self.names.parameters if n in self._positions}
        leaves = []
        for handle in self._handles:
            flat = handle.flat_param
            segments = []
            for i, (_, _, shape, offset, *_) in enumerate(fsdp1_members(flat)):
                name = names[flat, i]
                if self.names.parameters[name].requires_grad:
                    segments.append(Segment(name, offset, Box.flat(prod(shape), 0, prod(shape))))
            if segments:
                leaves.append(Leaf(flat, tuple(segments)))
        return leaves

    def shards(self) -> list[Shard]:
        members = {id(h.flat_param): fsdp1_members(h.flat_param) for h in self._handles}
        shards = []
        for name, holder in self.names.parameters.items():
            if name not in self._positions:  # frozen and outside every unit
                share = (collectives.rank(), collectives.world_size())
                shards.append(flat_shard(name, holder, holder.detach(), holder.numel(), 0, share))
                continue
            flat, i = self._positions[name]
            _, _, shape, _, begin, start, size = members[id(flat)][i]
            values = fsdp1_shard(flat).detach().view(-1)[begin : begin + size]
            span = (begin, begin + size) if holder is flat else None
            shards.append(flat_shard(name, holder, values, prod(shape), start, self._shares[id(flat)], span=span))
        return shards

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().full_shapes()
        for name in self.names.parameters.keys() & self._positions.keys():
            flat, i = self._positions[name]
            shapes[name] = fsdp1_members(flat)[i][2]
        return shapes

    def marks(self) -> tuple[list[Any], list[Any]]:
        shards = [fsdp1_shard(h.flat_param) for h in self._handles]
        return list(self.names.parameters.values()), places([*shards, *self.names.parameters.values()])

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        unsharded = [h for h in self._handles if h.uses_sharded_strategy and _has_unsharded_gradient(h)]
        if unsharded:
            raise EngineError("gradients are being accumulated without synchronisation: score at a step boundary")
        with super().gradients_aside():
            yield

    def settle(self) -> None:
        for handle in self._handles:
            fsdp1_reshard(handle)

    def _gradient_holders(self) -> list[Tensor]:
        # With use_orig_params, the original parameters' gradients are views of the flat parameter's gradient.
        flats: list[Tensor] = [h.flat_param for h in self._handles]
        return [*flats, *(p for p in self.names.parameters.values() if not any(p is f for f in flats))]


def _share(unit: Any, handle: Any) -> tuple[int, int]:
    """(index, count) of this rank among the ranks that store the same shard.

    Raises:
        EngineError: FSDP's process groups leave out some ranks.
    """
    ranks = collectives.world_size()
    if not handle.uses_sharded_strategy:
        count, index = handle.process_group.size(), handle.process_group.rank()
        covered = count
    else:
        replicas = fsdp1_replicas(unit)
        index, count = (dist.get_rank(replicas), replicas.size()) if replicas is not None else (0, 1)
        covered = handle.process_group.size() * count
    if covered != ranks:
        raise EngineError(f"FSDP's process groups cover {covered} of {ranks} ranks: only groups of all ranks are supported")
    return index, count


def _has_unsharded_gradient(handle: Any) -> bool:
    gradient = handle.flat_param.grad
    return gradient is not None and gradient.shape != fsdp1_shard(handle.flat_param).shape
