"""Every private attribute of torch, DeepSpeed and transformers that this package touches, and the versions it was tested on.

Nothing else in the package reaches into other libraries. `USES` is the list: a test builds each object and fails if an
attribute is gone, and a version outside `TESTED` warns once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# -- modules --------------------------------------------------------------------------------------------------------------


def persistent_buffers(module: Any) -> dict[str, Tensor]:
    """The buffers that belong to a state dict, by name."""
    found = {}
    for prefix, sub in module.named_modules():
        for slot, buffer in sub.named_buffers(recurse=False):
            if slot not in sub._non_persistent_buffers_set:
                found[clean(f"{prefix}.{slot}" if prefix else slot)] = buffer
    return found


def fsdp2_materialise(module: Any, device: torch.device) -> None:
    """Gives sharded weights on the meta device memory without values; the others, and buffers, are moved."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


# -- process groups -------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """The key-value store that `init_process_group` made; torch has no public accessor."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


# -- tensors without memory ------------------------------------------------------------------------------------------------


def number(value: Any) -> float:
    """The value of a one-element tensor; 1 for a tensor without memory (`dcft plan` runs the code on such tensors)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return 1.0 if isinstance(value, FakeTensor) else float(value)


def fake_tensors(numbers: bool = False) -> Any:
    """A block in which tensors have shapes and types, but no values; real ones may take part.

    `numbers`: code that reads a value finds 1, or False, where it would be an error.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Numbers(FakeTensorMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    return (Numbers if numbers else FakeTensorMode)(allow_non_fake_inputs=True)


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """A process group in which this process is rank 0 of many that are not there: collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  it registers the backend

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def memory_tracker(model: Any, optimizer: Any) -> Any:
    """Torch's own account of memory over a block, with what is there before it: of FSDP2 by kind, of ZeRO-3 in all."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        tracker: Any = FSDPMemTracker(model, optimizer)  # type: ignore[arg-type]
    else:
        tracker = MemTracker()
        tracker.track_external(*tensors_like(model.optimizer.fp32_partitioned_groups_flat[0]))
    every = tracker._update_peak_stats

    def whole(state: Any) -> None:
        """The peak of all is all that is asked for; that of every module would take three quarters of a plan's time."""
        modules, tracker.memory_tracking = tracker.memory_tracking, {}
        every(state)
        tracker.memory_tracking = modules

    tracker._update_peak_stats = whole
    return tracker


def tensors_like(one: Any) -> list[Any]:
    """All tensors of the process, or of the block without memory that `one` is of: DeepSpeed's are in many places."""
    from torch import Tensor

    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    return [t for t in found if getattr(t, "fake_mode", None) is getattr(one, "fake_mode", None)]


def real_tensors() -> Any:
    """A block in which new tensors have values, whatever is around it."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


# -- FSDP2 ----------------------------------------------------------------------------------------------------------------


def local_shape_and_offset(
    whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of a DTensor's local tensor, and where it starts in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with real_tensors():  # it computes with tensors
        shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    return tuple(shape), tuple(offset)


def fsdp2_groups(unit: Any) -> list[Any]:
    """A unit's groups of parameters: perhaps several since torch 2.13, before that one; none where it has no parameters."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def fsdp2_accumulates(group: Any) -> bool:
    """Whether gradients wait there to be reduced: in the reduction's data type if it is another one, else as they came."""
    leaves = [getattr(p, "_unsharded_param", None) for p in group.fsdp_params]  # made by the first unshard
    waiting = any(leaf is not None and leaf.grad is not None for leaf in leaves)
    return waiting or any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params)


def fsdp2_sharded(unit: Any) -> list[Any]:
    """The sharded parameters that a unit works with now: others than at first, after `load_state_dict(assign=True)`."""
    return [p.sharded_param for group in fsdp2_groups(unit) for p in group.fsdp_params]


@contextmanager
def fsdp2_mean_with_every_backward(groups: Iterable[Any]) -> Iterator[None]:
    """For the block every backward ends in a mean over ranks, whatever the user has set."""
    settings = [(group, group.reduce_grads, group.gradient_divide_factor) for group in groups]
    for group, _, _ in settings:
        group.reduce_grads, group.gradient_divide_factor = True, None
    try:
        yield
    finally:
        for group, reduce, divide in settings:
            group.reduce_grads, group.gradient_divide_factor = reduce, divide


# -- FSDP1 ----------------------------------------------------------------------------------------------------------------


def fsdp1_handle(unit: Any) -> Any | None:
    """The handle of a unit's flat parameter; None for a unit without parameters."""
    return unit._handle


def fsdp1_replicas(unit: Any) -> Any | None:
    """Under HYBRID_SHARD, the process group of the ranks that hold the same shard."""
    return getattr(unit, "_inter_node_pg", None)


def fsdp1_original_parameters(flat: Any) -> list[Any] | None:
    """The original parameters in the order of the flat one, with `use_orig_params=True`; else None."""
    return None if flat._params is None else list(flat._params)


def fsdp1_members(flat: Any) -> list[tuple[Any, str, tuple[int, ...], int, int, int, int]]:
    """Per weight: (module, slot, shape, offset in the unsharded flat parameter, and of this rank's part: offset in the
    shard, first flat index in the weight, number of elements)."""
    offsets, at = [], 0
    for numel, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not padding:
            offsets.append(at)
        at += numel
    members = []
    for info, shape, offset, part in zip(flat._param_infos, flat._shapes, offsets, flat._shard_param_infos, strict=True):
        here = (part.offset_in_shard, part.intra_param_start_idx, part.numel_in_shard) if part.in_shard else (0, 0, 0)
        members.append((info.module, info.param_name, tuple(shape), offset, *here))
    return members


def fsdp1_shared(flat: Any) -> list[tuple[Any, str, Any, str]]:
    """Tied weights: (module, slot, module and slot of the first occurrence)."""
    return [(i.module, i.param_name, i.prim_module, i.prim_param_name) for i in flat._shared_param_infos]


def fsdp1_shard(flat: Any) -> Tensor:
    """The shard itself; before the first forward the flat parameter is it."""
    shard: Tensor = getattr(flat, "_local_shard", flat.data)
    return shard


def fsdp1_reshard(handle: Any) -> None:
    if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):  # else: no forward has run yet
        handle.reshard(True)


# Prefixes that activation checkpointing, torch.compile and FSDP1 put into names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def clean(name: str) -> str:
    """The name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
