"""FSDP2 (`torch.distributed.fsdp.fully_shard`): every parameter is a DTensor, sharded over the dimensions of a mesh.

Unsharded gradients appear on FSDP's *unsharded parameter*, an autograd leaf that exists between all-gather and reshard
and stays the same object for the life of the model. Hooks on the sharded DTensor parameters never fire. Under tensor
parallelism the unsharded parameter is itself a DTensor: this rank's part along the tensor-parallel dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from .. import collectives
from ..bits import Box
from ..errors import EngineError, listing
from ..names import ParameterNames
from . import private
from .base import Engine, Leaf, Segment, Shard, check_materialised, flat_shard, local_tensor


class FSDP2Engine(Engine):
    """Weights sharded by `fully_shard` over a mesh of all ranks: data-parallel, hybrid (HSDP), with tensor parallelism."""

    name = "fsdp2"

    def __init__(self, model: nn.Module) -> None:
        _settle(model)
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

    def leaves(self) -> list[Leaf]:
        by_slot: dict[tuple[int, str], str] = {}
        for name, canonical in self.names.aliases.items():
            owner, _, leaf = name.rpartition(".")
            by_slot[(id(_submodule(self.module, owner)), leaf)] = canonical
        sharded = {id(p) for p in self.names.parameters.values()}
        found: dict[str, Leaf] = {}
        for unit in _units(self.module):
            with _unsharded(unit):
                for sub in unit.modules():
                    for slot, tensor in sub.named_parameters(recurse=False, remove_duplicate=False):
                        if id(tensor) in sharded or not tensor.requires_grad:
                            continue
                        name = by_slot[(id(sub), slot)]
                        found.setdefault(name, Leaf(tensor, (Segment(name, 0, _box(tensor)),)))
        return [found[name] for name in self.names.parameters if name in found]

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

    def stepped(self) -> dict[int, list[str]]:
        now = {id(p) for unit in _units(self.module) for p in private.fsdp2_sharded(unit)}
        known = {id(p): [name] for name, p in self.names.parameters.items() if not isinstance(p, DTensor) or id(p) in now}
        return {**{key: [] for key in now}, **known}

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        groups = [group for unit in _units(self.module) for group in private.fsdp2_groups(unit)]
        if any(private.fsdp2_accumulates(group) for group in groups):
            raise EngineError("gradients are being accumulated without synchronisation: score at a step boundary")
        with private.fsdp2_mean_with_every_backward(groups), super().gradients_aside():
            yield

    def settle(self) -> None:
        _settle(self.module)

    def _gradient_holders(self) -> list[Any]:
        # What the module shows depends on whether it is unsharded just now; sharded parameters are never replaced.
        return list(self.names.parameters.values())


def _units(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _settle(model: nn.Module) -> None:
    """As long as unsharded weights are there, `parameters()` shows them, and the next forward uses them even if the
    shards have been changed; a forward without backward leaves the root's behind."""
    for unit in _units(model):
        unit.reshard()


def is_fsdp2(model: nn.Module) -> bool:
    return bool(_units(model))


def has_dtensors(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _box(tensor: Any) -> Box:
    """This rank's cells of a weight."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tuple(tensor.shape))
    return _layout_of(tensor)[0]


def _layout_of(tensor: DTensor) -> tuple[Box, tuple[int, int], Box]:
    return _layout(collectives.rank(), tuple(tensor.shape), tensor.device_mesh, tensor.placements)


@lru_cache(maxsize=4096)  # asked for every weight around every step, and slow: it would keep a GPU waiting
def _layout(
    rank: int, shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[Box, tuple[int, int], Box]:
    """This rank's cells of such a weight, and which of them it owns among the ranks that hold the same.

    `rank`: meshes of the same ranks are equal, whichever of them this process is.
    """
    size, start = private.local_shape_and_offset(shape, mesh, placements)
    box, index, count = Box(shape, start, size), 0, 1
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
            count *= mesh.size(dim)
    return box, *box.share(index, count)


@contextmanager
def _unsharded(unit: Any) -> Iterator[None]:
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """`get_submodule` for a cleaned path: steps through the wrappers whose prefixes were removed from it."""
    for part in path.split(".") if path else ():
        module = getattr(_bare(module), part)
    return _bare(module)


def _bare(module: nn.Module) -> nn.Module:
    for attribute in ("_checkpoint_wrapped_module", "_orig_mod"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _bare(inner)
    return module
