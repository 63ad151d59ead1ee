"""FSDP2 (`torch.distributed.fsdp.fully_shard`): every parameter is a DTensor, sharded over a one-dimensional mesh.

Unsharded gradients appear on FSDP's *unsharded parameter*, an autograd leaf that exists between all-gather and reshard
and stays the same object for the life of the model. Hooks on the sharded DTensor parameters never fire.

Private attributes of torch used here (tested with 2.13): `FSDPModule._get_fsdp_state()._fsdp_param_groups[*]` with
`.reduce_grads`, `.gradient_divide_factor` and `.fsdp_params[*].unsharded_accumulated_grad`, while scoring; and
`torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .. import collectives
from ..bits import Box
from ..errors import EngineError, listing
from .base import Engine, Leaf, Segment, Shard, local_tensor


class FSDP2Engine(Engine):
    """Weights sharded by `fully_shard`; each rank owns all it holds."""

    name = "fsdp2"

    def __init__(self, model: nn.Module) -> None:
        settle(model)
        super().__init__(model, model)
        plain = [n for n, p in self.names.parameters.items() if not isinstance(p, DTensor) and p.requires_grad]
        if plain:
            raise EngineError(
                f"these weights are outside every fully_shard group, so nothing reduces their gradients: "
                f"{listing(plain)}; call fully_shard on the root module too"
            )
        wide = [n for n, p in self.names.parameters.items() if isinstance(p, DTensor) and p.device_mesh.ndim != 1]
        if wide:
            raise EngineError(f"only one-dimensional meshes are supported under fsdp2, not that of {listing(wide)}")
        meshes = {p.device_mesh.size() for p in self.names.parameters.values() if isinstance(p, DTensor)}
        if meshes - {collectives.world_size()}:
            raise EngineError(
                f"the model is sharded over {min(meshes)} of {collectives.world_size()} ranks: only meshes of all ranks "
                "are supported"
            )
        if any(p.is_meta for p in self.names.parameters.values()):
            raise EngineError("the model has meta parameters: materialise them (to_empty, then load) before this call")

    def leaves(self) -> list[Leaf]:
        by_slot: dict[tuple[int, str], str] = {}
        for name, canonical in self.names.aliases.items():
            owner, _, leaf = name.rpartition(".")
            by_slot[(id(_submodule(self.module, owner)), leaf)] = canonical
        found: dict[str, Leaf] = {}
        for unit in _units(self.module):
            with _unsharded(unit):
                for sub in unit.modules():
                    for slot, tensor in sub._parameters.items():
                        if tensor is None or isinstance(tensor, DTensor) or not tensor.requires_grad:
                            continue
                        name = by_slot[(id(sub), slot)]
                        found.setdefault(name, Leaf(tensor, (Segment(name, 0, tensor.numel()),)))
        return [found[name] for name in self.names.parameters if name in found]

    def shards(self) -> list[Shard]:
        shards = []
        for name, p in self.names.parameters.items():
            if not isinstance(p, DTensor):  # a frozen weight outside every group
                box = Box.whole(tuple(p.shape))
                shards.append(Shard(name, p, p.detach(), box, (0, box.numel), box))
                continue
            size, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
            box = Box(tuple(p.shape), tuple(start), tuple(size))
            shards.append(Shard(name, p, local_tensor(p.detach()), box, (0, box.numel), box))
        return shards

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.names.parameters.items()}

    def reduce_gradients(self) -> None:
        """Nothing is left to do: each backward ended in FSDP's own mean reduce-scatter."""

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        groups = [group for unit in _units(self.module) for group in unit._get_fsdp_state()._fsdp_param_groups]
        if any(p.unsharded_accumulated_grad is not None for group in groups for p in group.fsdp_params):
            raise EngineError("gradients are being accumulated without synchronisation: score at a step boundary")
        settings = [(group, group.reduce_grads, group.gradient_divide_factor) for group in groups]
        for group in groups:
            group.reduce_grads, group.gradient_divide_factor = True, None  # a mean over ranks, with every backward
        try:
            with super().gradients_aside():
                yield
        finally:
            for group, reduce, divide in settings:
                group.reduce_grads, group.gradient_divide_factor = reduce, divide

    def current_parameters(self) -> list[tuple[str, nn.Parameter]]:
        # What the module shows depends on whether it is unsharded just now; sharded parameters are never replaced.
        return list(self.names.parameters.items())


def _units(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def settle(model: nn.Module) -> None:
    """Drops the unsharded weights that a forward without backward leaves behind under FSDP2 (elsewhere: nothing).

    As long as they are there, `parameters()` shows them instead of the sharded ones, and the next forward uses them even
    if the shards have been changed.
    """
    for unit in _units(model):
        unit.reshard()


def is_fsdp2(model: nn.Module) -> bool:
    return bool(_units(model))


def has_dtensors(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


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
        inner: Tensor | nn.Module | None = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _bare(inner)
    return module
