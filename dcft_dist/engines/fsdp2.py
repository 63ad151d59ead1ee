"""The engine for FSDP2 (`torch.distributed.fsdp.fully_shard`).

Every parameter is a DTensor, sharded over the dimensions of a device mesh. The autograd leaf is FSDP's *unsharded
parameter*: it receives the unsharded gradient. The model shows it only between all-gather and reshard, but it stays the
same object as long as the model lives. Hooks on the sharded DTensor parameters never fire.

Under tensor parallelism the unsharded parameter is itself a DTensor: this rank's part along the tensor-parallel dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from ..compat.pytorch import (
    fsdp2_accumulates,
    fsdp2_groups,
    fsdp2_leaf,
    fsdp2_materialise,
    fsdp2_mean_with_every_backward,
    fsdp2_members,
    fsdp2_ranks,
    fsdp2_replicated,
    fsdp2_sharded,
    fsdp2_sharded_of,
    local_shape_and_offset,
    local_values,
    slots,
)
from ..distributed import collectives
from ..errors import EngineError, listing
from .base import Bucket, Engine, Leaf, Segment, Shard, check_materialised, flat_shard, local_tensor, places
from .box import Box
from .fsdp2_buckets import FSDP2Bucket
from .meta import Materialiser
from .names import ParameterNames
from .prepared import Prepared, WrapOptions
from .tensor_parallel import split_layers


class PreparedFSDP2(Prepared):
    """A training step that reduces gradients with the last micro-batch, or with each."""

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last or self.options.reduce_each)
        yield


class FSDP2Engine(Engine):
    """Weights sharded by `fully_shard` over a mesh of all ranks. Hybrid sharding (HSDP) and tensor parallelism work too."""

    kinds = ("fsdp2",)
    name = "fsdp2"
    prepared = PreparedFSDP2

    def __init__(self, model: nn.Module) -> None:
        _reshard_all(model)
        super().__init__(model, model, ParameterNames.of(model))
        parameters = self.names.parameters
        plain = [n for n, p in parameters.items() if not isinstance(p, DTensor) and p.requires_grad]
        if plain:
            raise EngineError(
                f"these weights are outside every fully_shard group, so nothing reduces their gradients: "
                f"{listing(plain)}; call fully_shard on the root module too"
            )
        sizes = {p.device_mesh.size() for p in parameters.values() if isinstance(p, DTensor)}
        if sizes - {collectives.world_size()}:
            raise EngineError(
                f"the model is sharded over {min(sizes)} of {collectives.world_size()} ranks: only meshes of all ranks "
                "are supported"
            )
        check_materialised(self.names)
        self._slots = slots(model, "_modules")
        self._params = [p for _, group in _groups(model) for p in fsdp2_members(group)]

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        return bool(_units(model))

    @classmethod
    def shards_weights(cls, options: WrapOptions) -> bool:
        return True

    @classmethod
    def wrap_module(cls, model: nn.Module, options: WrapOptions) -> nn.Module:
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        pinned = CPUOffloadPolicy(pin_memory=options.device.type == "cuda")
        mesh = mesh_of(options)
        if options.tensor_parallel > 1:
            split_layers(model, mesh["tensor"])
            mesh = mesh["shard"]
        fsdp_options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": bf16 if options.bf16 else MixedPrecisionPolicy(),
            "offload_policy": pinned if options.offload else OffloadPolicy(),
        }
        for block in options.blocks:
            fully_shard(block, **fsdp_options)
        fully_shard(model, **fsdp_options)
        _prefetch(list(options.blocks), options.prefetch)
        if any(p.is_meta for p in model.parameters()):
            fsdp2_materialise(model, torch.device("cpu") if options.offload else options.device)
            Materialiser(options.device).move_buffers(model)
        return model

    def leaves(self) -> list[Leaf]:
        by_slot: dict[tuple[int, str], str] = {}  # (id of module, attribute) -> canonical name
        for name, canonical in self.names.aliases.items():
            owner, _, slot = name.rpartition(".")
            by_slot[(id(_submodule(self.module, owner)), slot)] = canonical
        sharded_ids = {id(p) for p in self.names.parameters.values()}
        leaves: dict[str, Leaf] = {}
        for unit in _units(self.module):
            with _unsharded(unit):
                for sub in unit.modules():
                    for slot, tensor in sub.named_parameters(recurse=False, remove_duplicate=False):
                        if id(tensor) in sharded_ids or not tensor.requires_grad:
                            continue
                        name = by_slot[(id(sub), slot)]
                        leaves.setdefault(name, Leaf(tensor, (Segment(name, 0, _box(tensor)),)))
        return [leaves[name] for name in self.names.parameters if name in leaves]

    def shards(self) -> list[Shard]:
        shards = []
        for name, p in self.names.parameters.items():
            if not isinstance(p, DTensor):  # a frozen weight outside every group
                share = (collectives.rank(), collectives.world_size())
                shards.append(flat_shard(name, p, p.detach(), p.numel(), 0, share))
                continue
            with torch.no_grad():
                local = local_tensor(p)
            shards.append(Shard(name, p, local, *_layout_of(p)))
        return shards

    def buckets(self, leaves: Sequence[Leaf]) -> list[Bucket]:
        by_id = {id(leaf.tensor): leaf for leaf in leaves}
        return [
            FSDP2Bucket(unit, group, by_id)
            for unit, group in _groups(self.module)
            if _can_intercept(group) and any(id(fsdp2_leaf(p)) in by_id for p in fsdp2_members(group))
        ]

    def marks(self) -> tuple[list[Any], list[Any]]:
        sharded = list(map(fsdp2_sharded_of, self._params))
        return [*chain.from_iterable(map(dict.values, self._slots)), *sharded], places(map(local_values, sharded))

    def stepped(self) -> dict[int, list[str]]:
        current = {id(p) for unit in _units(self.module) for p in fsdp2_sharded(unit)}
        weights = self.names.parameters.items()
        named = {id(p): [name] for name, p in weights if not isinstance(p, DTensor) or id(p) in current}
        return {**{key: [] for key in current}, **named}

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        groups = [group for unit in _units(self.module) for group in fsdp2_groups(unit)]
        if any(fsdp2_accumulates(group) for group in groups):
            raise EngineError("gradients are being accumulated without synchronisation: score at a step boundary")
        with fsdp2_mean_with_every_backward(groups), super().gradients_aside():
            yield

    def settle(self) -> None:
        _reshard_all(self.module)

    def _gradient_holders(self) -> list[Any]:
        # `parameters()` shows sharded or unsharded parameters, depending on the moment. The sharded ones stay the same.
        return list(self.names.parameters.values())


def _groups(model: nn.Module) -> list[tuple[Any, Any]]:
    """(module, parameter group) of every group; modules that share a group count once."""
    return list({id(group): (unit, group) for unit in _units(model) for group in fsdp2_groups(unit)}.values())


def _can_intercept(group: Any) -> bool:
    """Whether the buffer of a group can be reached before all reductions: not where only replicas communicate."""
    ranks = fsdp2_ranks(group)
    return ranks > 1 or (ranks == 1 and not fsdp2_replicated(group))


def _units(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _prefetch(blocks: list[Any], number: int) -> None:
    """Gathers the weights of the next blocks while one computes, in forward and backward."""
    for i, block in enumerate(blocks if number else []):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + number])
        block.set_modules_to_backward_prefetch(blocks[max(i - number, 0) : i][::-1])


def _reshard_all(model: nn.Module) -> None:
    """Frees the unsharded weights of all units.

    While unsharded weights exist, `parameters()` shows them, and the next forward uses them even if the shards changed.
    A forward without backward leaves the unsharded weights of the root module behind.
    """
    for unit in _units(model):
        unit.reshard()


def mesh_of(options: WrapOptions) -> DeviceMesh:
    """The device mesh of all ranks for FSDP.

    Returns:
        A mesh of shape `(ranks,)`; with replicas, of shape `(replicas, ranks // replicas)`; with tensor parallelism, of
        shape `(ranks // tensor_parallel, tensor_parallel)`.
    """
    ranks, device = dist.get_world_size(), options.device.type
    if (together := options.tensor_parallel) > 1:
        return init_device_mesh(device, (ranks // together, together), mesh_dim_names=("shard", "tensor"))
    if options.replicas == 1:
        return init_device_mesh(device, (ranks,))
    return init_device_mesh(device, (options.replicas, ranks // options.replicas), mesh_dim_names=("replicate", "shard"))


def _box(tensor: Any) -> Box:
    """The elements of a weight on this rank; a plain tensor has all of them."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tuple(tensor.shape))
    return _layout_of(tensor)[0]


def _layout_of(tensor: DTensor) -> tuple[Box, tuple[int, int], Box]:
    return _layout(collectives.rank(), tuple(tensor.shape), tensor.device_mesh, tensor.placements)


@lru_cache(maxsize=4096)  # slow, and called for every weight around every step: without the cache a GPU waits
def _layout(
    rank: int, shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[Box, tuple[int, int], Box]:
    """The elements of a weight on this rank, and which of them it owns among the ranks that store the same elements.

    Args:
        rank: this rank. Only the cache needs it: meshes of the same ranks are equal on every rank.
        shape: unsharded shape of the weight.
        mesh: device mesh of the DTensor.
        placements: how the DTensor is placed, one entry per dimension of the mesh.

    Returns:
        `box`, `owned` and `owned_box` of a `Shard`.
    """
    size, start = local_shape_and_offset(shape, mesh, placements)
    box, index, count = Box(shape, start, size), 0, 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
            count *= mesh.size(dim)
    return box, *box.share(index, count)


@contextmanager
def _unsharded(unit: Any) -> Iterator[None]:
    """All-gathers a unit's weights for the block. Collective."""
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """Like `get_submodule`, for a path without wrapper prefixes: skips activation-checkpoint and compile wrappers."""
    for slot in path.split(".") if path else ():
        module = getattr(_unwrapped(module), slot)
    return _unwrapped(module)


def _unwrapped(module: nn.Module) -> nn.Module:
    for attribute in ("_checkpoint_wrapped_module", "_orig_mod"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return module
