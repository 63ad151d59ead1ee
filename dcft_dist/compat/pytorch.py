"""Private parts of torch: buffers, the default store, tensors without memory, FSDP1, FSDP2, and wrapper prefixes in names.

The attributes that these functions use are listed in `versions.USES`.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor as AsyncCollectiveTensor

# -- modules --------------------------------------------------------------------------------------------------------------


def persistent_buffers(module: Any) -> dict[str, Tensor]:
    """The buffers that a state dict contains, by name without wrapper prefixes."""
    buffers = {}
    for prefix, sub in module.named_modules():
        for slot, buffer in sub.named_buffers(recurse=False):
            if slot not in sub._non_persistent_buffers_set:
                buffers[clean(f"{prefix}.{slot}" if prefix else slot)] = buffer
    return buffers


def slots(module: Any, *kinds: str) -> list[dict[str, Any]]:
    """The dictionaries in which all modules keep what they consist of.

    Args:
        module: the outermost module.
        kinds: "_modules", "_parameters".
    """
    return [getattr(sub, kind) for sub in module.modules() for kind in kinds]


def fsdp2_materialise(module: Any, device: torch.device) -> None:
    """Gives sharded weights on the meta device memory, without values. Moves other weights and buffers to `device`."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


# -- process groups -------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """The key-value store of the default process group; torch has no public access to it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may be read from the device then. A build without CUDA cannot tell."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def record_memory(on: bool) -> None:
    """Begins or ends to record what happens to the memory of this GPU."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def dump_memory(file: str) -> None:
    """Writes what was recorded, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(file)


# -- tensors without memory ------------------------------------------------------------------------------------------------


def number(value: Any) -> float:
    """The value of a number or one-element tensor; 1 for a tensor without memory, on which `dcft plan` runs the code."""
    from torch._subclasses.fake_tensor import FakeTensor

    return 1.0 if isinstance(value, FakeTensor) else float(value)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: not on the meta device, and not one on which `dcft plan` runs the code."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def fake_tensors(numbers: bool = False) -> Any:
    """Context in which new tensors have a shape and a data type but no values. Real tensors may be used too.

    Args:
        numbers: True: code that reads a value gets 1, or one half of a floating-point tensor (1 - x may be a divisor), or
            False of a boolean one. False: reading a value is an error.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Numbers(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 0.5 if args[0].is_floating_point() else 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    return (Numbers if numbers else FakeTensorMode)(allow_non_fake_inputs=True)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Process group for the block: this process is rank 0, the other ranks do not exist, and collectives do nothing."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def memory_tracker(model: Any, optimizer: Any, on_host: Collection[str] = ()) -> tuple[Any, dict[str, int]]:
    """torch's memory tracker, to be used as a context. It also counts tensors that exist before the block.

    Args:
        model: a model under FSDP2 (memory by kind), or a DeepSpeedEngine in stage 3 (only the total).
        optimizer: the torch optimizer.
        on_host: kinds of memory that are in host memory, by the tracker's names. With some, the optimizer steps there.

    Returns:
        The tracker; and by kind the bytes at the moment when most memory outside of the host was in use, filled as the
        block runs. Kinds on the host have their largest bytes.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        tracker: Any = FSDPMemTracker(model, optimizer)  # type: ignore[arg-type]
    else:
        tracker = MemTracker()
        tracker.track_external(*tensors_like(model.optimizer.fp32_partitioned_groups_flat[0]))
    peak: dict[str, int] = {}
    most = 0

    def update_peak(state: Any) -> None:
        """In place of torch's: it leaves out the peak of every module, which would take most of a plan's time."""
        nonlocal most
        for device, found in tracker._curr_mem_snap.items():
            if device.type == "meta":
                continue
            now = {str(getattr(kind, "value", kind)): size for kind, size in found.items()}
            outside = now.pop("Total") - sum(now.get(kind, 0) for kind in on_host)
            if outside > most and not (on_host and tracker._in_opt):
                most = outside
                peak.update({kind: size for kind, size in now.items() if kind not in on_host})
            peak.update({kind: max(now.get(kind, 0), peak.get(kind, 0)) for kind in on_host})

    tracker._update_peak_stats = update_peak
    return tracker, peak


def look_at_memory(tracker: Any) -> None:
    """Counts what exists now, though no operation has touched it."""
    tracker._update_peak_stats(None)


def tensors_like(one: Any) -> list[Any]:
    """All tensors of the process that are like `one`: real, or fake tensors of the same block. Meta tensors are left out.

    DeepSpeed keeps tensors in many places, so the list comes from the garbage collector.
    """
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    return [t for t in tensors if getattr(t, "fake_mode", None) is getattr(one, "fake_mode", None)]


def real_tensors() -> Any:
    """Context in which new tensors have values, even inside `fake_tensors`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


# The values of a DTensor on this rank, without a copy, in C.
local_values = attrgetter("_local_tensor")


def version_of(tensor: Tensor) -> int:
    """How often a tensor, or another one in its memory, was changed in place."""
    return tensor._version


def storage_of(tensor: Tensor) -> int:
    """A number that tensors in the same memory share as long as it is theirs; of a DTensor, that of its values here."""
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata  # type: ignore[no-any-return]


# Multi-tensor operations without a public name, which torch's optimizers use. Arguments: lists of tensors.
add_all: Any = torch._foreach_add_
multiply_all: Any = torch._foreach_mul_
divide_all: Any = torch._foreach_div_
add_products: Any = torch._foreach_addcmul_
blend_all: Any = torch._foreach_lerp_


# -- FSDP2 ----------------------------------------------------------------------------------------------------------------


def local_shape_and_offset(
    whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this rank's part of a DTensor, and its first index in each dimension.

    Args:
        whole: unsharded shape.
        mesh: device mesh of the DTensor.
        placements: how the DTensor is placed, one entry per dimension of the mesh.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with real_tensors():  # torch computes them with tensors
        shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    return tuple(shape), tuple(offset)


def fsdp2_groups(unit: Any) -> list[Any]:
    """The parameter groups of an FSDP2 unit: at most one before torch 2.13, any number since; none without parameters."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def fsdp2_accumulates(group: Any) -> bool:
    """Whether a group has gradients that are not reduced yet, in their own data type or in that of the reduction."""
    leaves = [getattr(p, "_unsharded_param", None) for p in group.fsdp_params]  # exists after the first unshard
    unreduced = any(leaf is not None and leaf.grad is not None for leaf in leaves)
    return unreduced or any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params)


def fsdp2_members(group: Any) -> list[Any]:
    """The parameters of a group, in the order in which they are reduced."""
    return list(group.fsdp_params)


def fsdp2_ranks(group: Any) -> int:
    """Number of ranks that the weights of a group are sharded over; 0 if they are only replicated."""
    return int(getattr(group.mesh_info, "shard_mesh_size", 0))


def fsdp2_dim(parameter: Any) -> int:
    """The dimension along which a parameter is sharded."""
    return int(parameter.fsdp_placement.dim)


# The sharded parameter, and what reduces the buffer of a group: in C, since every step asks for them.
fsdp2_sharded_of = attrgetter("sharded_param")
fsdp2_reductions = attrgetter("_reduce_scatter_comm", "_all_reduce_hook")


def fsdp2_replicated(group: Any) -> bool:
    """Whether a reduction between replicas follows (HSDP)."""
    return getattr(group.mesh_info, "replicate_mesh_size", 1) > 1


def fsdp2_leaf(parameter: Any) -> Tensor | None:
    """The unsharded parameter, which receives the gradient; None before the first unshard."""
    leaf: Tensor | None = getattr(parameter, "_unsharded_param", None)
    return leaf


# Whether the buffer of a group has zeros for weights that no backward has reached.
fsdp2_with_unused = attrgetter("reduce_scatter_unused_params")


def fsdp2_knows_unused(group: Any) -> bool:
    """Whether `fsdp2_with_unused` exists: since torch 2.13."""
    return hasattr(group, "reduce_scatter_unused_params")


def fsdp2_reduction(group: Any, ranks: int) -> Any:
    """What reduces the buffer of a group: a communication; on one rank, the hook after it, or None."""
    return group._reduce_scatter_comm if ranks > 1 else group._all_reduce_hook


def fsdp2_set_reduction(unit: Any, group: Any, ranks: int, reduction: Any) -> None:
    """Sets what `fsdp2_reduction` returns.

    Args:
        unit: a module of the group.
        group: the parameter group.
        ranks: number of ranks that its weights are sharded over.
        reduction: the communication, or the hook.
    """
    alone = len(fsdp2_groups(unit)) == 1 and reduction is not None
    if ranks > 1 and alone:
        unit.set_custom_reduce_scatter(reduction)
    elif ranks > 1:  # torch has no public way for a module with several groups
        group._reduce_scatter_comm = reduction
    elif alone:
        unit.set_all_reduce_hook(reduction)
    else:
        group._all_reduce_hook = reduction


def chunk_cat(tensors: list[Tensor], ranks: int) -> Tensor:
    """Tensors in the order of a reduce-scatter's buffer: by rank, each padded along its first dimension."""
    rows = [-(-t.shape[0] // ranks) * t[:1].numel() for t in tensors]
    flat = torch.zeros(ranks, sum(rows), dtype=tensors[0].dtype)
    torch._chunk_cat(tensors, dim=0, num_chunks=ranks, out=flat)
    return flat.view(-1)


def fsdp2_sharded(unit: Any) -> list[Any]:
    """The sharded parameters that a unit uses now. `load_state_dict(assign=True)` replaces them."""
    return [p.sharded_param for group in fsdp2_groups(unit) for p in group.fsdp_params]


@contextmanager
def fsdp2_mean_with_every_backward(groups: Iterable[Any]) -> Iterator[None]:
    """Makes every backward in the block end in a mean over ranks, whatever the user has set."""
    settings = [(group, group.reduce_grads, group.gradient_divide_factor) for group in groups]
    for group, _, _ in settings:
        group.reduce_grads, group.gradient_divide_factor = True, None
    try:
        yield
    finally:
        for group, reduce, divisor in settings:
            group.reduce_grads, group.gradient_divide_factor = reduce, divisor


# -- FSDP1 ----------------------------------------------------------------------------------------------------------------


def fsdp1_handle(unit: Any) -> Any | None:
    """The handle of a unit's flat parameter; None for a unit without parameters."""
    return unit._handle


def fsdp1_replicas(unit: Any) -> Any | None:
    """The process group of the ranks that store the same shard under HYBRID_SHARD; otherwise None."""
    return getattr(unit, "_inter_node_pg", None)


def fsdp1_original_parameters(flat: Any) -> list[Any] | None:
    """With `use_orig_params=True` the original parameters, in the order of the flat parameter; otherwise None."""
    return None if flat._params is None else list(flat._params)


def fsdp1_members(flat: Any) -> list[tuple[Any, str, tuple[int, ...], int, int, int, int]]:
    """The weights inside a flat parameter, in order.

    Returns:
        Per weight: module, attribute name, shape, offset in the unsharded flat parameter; then for the part on this rank:
        offset in the shard, flat index in the weight of the first element, number of elements. The last three are 0 if
        this rank has no part.
    """
    offsets, offset = [], 0
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            offsets.append(offset)
        offset += numel
    members = []
    for info, shape, offset, part in zip(flat._param_infos, flat._shapes, offsets, flat._shard_param_infos, strict=True):
        local = (part.offset_in_shard, part.intra_param_start_idx, part.numel_in_shard) if part.in_shard else (0, 0, 0)
        members.append((info.module, info.param_name, tuple(shape), offset, *local))
    return members


def fsdp1_shared(flat: Any) -> list[tuple[Any, str, Any, str]]:
    """Tied weights: (module, attribute name, module of the first occurrence, attribute name of the first occurrence)."""
    return [(i.module, i.param_name, i.prim_module, i.prim_param_name) for i in flat._shared_param_infos]


def fsdp1_shard(flat: Any) -> Tensor:
    """This rank's shard of a flat parameter; before the first forward it is the flat parameter itself."""
    shard: Tensor = getattr(flat, "_local_shard", flat.data)
    return shard


def fsdp1_reshard(handle: Any) -> None:
    """Frees the unsharded flat parameter."""
    if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):  # else: no forward has run yet
        handle.reshard(True)


# -- names ----------------------------------------------------------------------------------------------------------------

# Prefixes that activation checkpointing, torch.compile and FSDP1 add to names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def clean(name: str) -> str:
    """A parameter name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
