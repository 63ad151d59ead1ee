"""Every private attribute of torch, DeepSpeed and transformers that this package touches, and the versions it was tested on.

Nothing else in the package reaches into other libraries. `USES` is the list: a test builds each object and fails if an
attribute is gone, and a version outside `TESTED` warns once.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..names import clean

log = logging.getLogger(__name__)

# Package -> version series on which the attributes below were seen to work.
TESTED = {"torch": ("2.11", "2.13", "2.14"), "deepspeed": ("0.19",), "transformers": ("5.23",)}

# Where -> attributes used. `module:Class` objects are looked up by the test on a live instance of that kind.
USES: dict[str, tuple[str, ...]] = {
    "Module": ("_non_persistent_buffers_set", "_apply"),
    "torch.distributed.distributed_c10d": ("_get_default_store",),
    "torch.distributed.tensor._utils": ("compute_local_shape_and_global_offset",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode", "unset_fake_temporarily"),
    "torch.testing._internal.distributed.fake_pg": (),
    "torch.distributed._tools.fsdp2_mem_tracker": ("FSDPMemTracker",),
    "torch.distributed._tools.mem_tracker": ("MemTracker",),
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_fsdp_param_group",),  # and, since torch 2.13, `_fsdp_param_groups`
    "FSDPParamGroup": ("reduce_grads", "gradient_divide_factor", "fsdp_params"),
    "FSDPParam": ("unsharded_accumulated_grad", "_unsharded_param", "sharded_param"),
    "FullyShardedDataParallel": ("_handle", "_inter_node_pg"),
    "FlatParamHandle": ("flat_param", "process_group", "uses_sharded_strategy", "reshard"),
    "FlatParameter": (
        "_param_infos",
        "_shared_param_infos",
        "_shapes",
        "_numels_with_padding",
        "_is_padding_mask",
        "_shard_param_infos",
        "_local_shard",
        "_params",
    ),
    "DeepSpeedEngine": ("_is_gradient_accumulation_boundary", "micro_steps"),
    "DeepSpeedZeroOptimizer": (
        "optimizer",
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "update_lp_params",
        "clip_grad",
        "loss_scaler",
        "overflow",
        "micro_step_id",
        "_global_grad_norm",
        "_hp_optimizer_states_linked",
    ),
    "DeepSpeedZeroOptimizer.parameter": ("_hp_mapping",),
    "DeepSpeedZeroOptimizer.parameter._hp_mapping": ("lp_fragment_address", "hp_fragment_address", "hp_fragment"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "optimizer",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "persistent_parameters",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "clip_grad",
        "loss_scaler",
        "overflow",
        "micro_step_id",
        "_epilogue_ran_this_backward",
        "_global_grad_norm",
    ),
    "DeepSpeedZeroOptimizer_Stage3.parameter": (
        "_z3_optimizer",
        "ds_id",
        "ds_shape",
        "ds_numel",
        "ds_tensor",
        "partition_numel",
        "ds_process_group",
    ),
    "BF16_Optimizer": (
        "optimizer",
        "bf16_groups",
        "fp32_groups_flat_partition",
        "update_lp_params",
        "clip_grad",
        "fp32_groups_has_gradients",
        "_hp_optimizer_states_linked",
    ),
    "FP16_UnfusedOptimizer": ("optimizer", "fp16_groups", "fp32_groups", "clip_grad"),
    "CheckpointWrapper": ("_checkpoint_wrapped_module",),
    "OptimizedModule": ("_orig_mod",),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",),
    "transformers.Trainer": ("_prepare_inputs",),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": ("rename_source_key", "WeightConverter", "WeightRenaming"),
}


@cache
def check_version(package: str) -> None:
    """Warns, once, if the installed version is none of the tested ones."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return
    if ".".join(installed.split("+")[0].split(".")[:2]) not in TESTED[package]:
        log.warning(
            "%s %s is none of the versions that this package's use of its private parts was tested on (%s): "
            "check a short run against one process, or install a tested version",
            package,
            installed,
            ", ".join(TESTED[package]),
        )


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


def without_memory(numbers: bool = False) -> Any:
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
        tracker.track_external(*_tensors_like(model.optimizer.fp32_partitioned_groups_flat[0]))
    every = tracker._update_peak_stats

    def whole(state: Any) -> None:
        """The peak of all is all that is asked for; that of every module would take three quarters of a plan's time."""
        modules, tracker.memory_tracking = tracker.memory_tracking, {}
        every(state)
        tracker.memory_tracking = modules

    tracker._update_peak_stats = whole
    return tracker


def zero3_weights(model: Any) -> list[Any]:
    """What this rank holds of the weights: its partitions, and their masters."""
    return [p.ds_tensor for p in model.parameters()] + list(model.optimizer.fp32_partitioned_groups_flat)


def _tensors_like(one: Any) -> list[Any]:
    """All tensors of the process, or of the block without memory that `one` is of: DeepSpeed's are in many places."""
    from torch import Tensor

    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta]
    return [t for t in found if getattr(t, "fake_mode", None) is getattr(one, "fake_mode", None)]


@contextmanager
def zero3_alone() -> Iterator[None]:
    """A block in which DeepSpeed's ZeRO-3 runs as rank 0 of ranks that are not there.

    It reads from the environment where it is, and compares the order of modules with that of rank 0, which it cannot here.
    It keeps process groups in places of its own: they are destroyed, with torch's.
    """
    deepspeed = import_deepspeed()
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    compare, before = coordinator.assert_ints_same_as_other_ranks, dict(os.environ)
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, at each collective that DeepSpeed calls
            yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        coordinator.assert_ints_same_as_other_ranks = compare
        os.environ.clear()
        os.environ.update(before)


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


# -- transformers ---------------------------------------------------------------------------------------------------------


@contextmanager
def without_initialising() -> Iterator[None]:
    """A block in which transformers' models keep what memory they get: some draw until the values suit."""
    if find_spec("transformers") is None:
        yield
        return
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def trainer_inputs(trainer: Any, batch: Any) -> Any:
    """The batch as the Trainer's own steps see it: on the device, under DeepSpeed in its data type."""
    return trainer._prepare_inputs(batch)


# -- DeepSpeed ------------------------------------------------------------------------------------------------------------


def import_deepspeed() -> Any:
    """DeepSpeed, imported so that it works at once on a machine without GPU.

    There it would compile an extension for shared-memory collectives (a minute or more; a compilation that was killed
    leaves a lock that later ones wait for without end): gloo does without.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero3_materialise(model: Any, make: Callable[[Any], None], config: dict[str, Any], dtype: torch.dtype) -> None:
    """Partitions a model on the meta device. `make` gives a module's own weights memory; one module at a time is whole.

    `dtype`: of the weights, which DeepSpeed no longer casts once they are partitioned; masters are in float32.
    """
    init = import_deepspeed().zero.Init
    for module in reversed(list(model.modules())):  # parents after their parts, which it leaves as they are then
        make(module)
        own = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        if own:
            init(module=module, config_dict_or_path=config)  # it also sends them, without values yet


@dataclass(frozen=True)
class Part:
    """One parameter inside a flat partition: `numel` cells at `offset` there, which start at flat index `first` of it."""

    parameter: Any
    offset: int
    first: int
    numel: int


@dataclass(frozen=True)
class Flat:
    """A tensor that DeepSpeed's inner optimizer steps, and the parts of parameters in it on this rank."""

    tensor: Any
    parts: list[Part]
    replicated: bool


def zero_inner_optimizer(engine: Any) -> Any | None:
    """The torch optimizer that DeepSpeed steps; None without one."""
    outer = engine.optimizer
    return getattr(outer, "optimizer", outer) if outer is not None else None


def zero_partitions(optimizer: Any, stage: int) -> list[Flat]:
    """What the inner optimizer steps, in the order in which DeepSpeed steps it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return [
            Flat(flat, [_zero3_part(optimizer, p) for p in group], replicated=False)
            for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        return [Flat(f, [_mapped_part(p) for p in g], replicated=False) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bfloat16
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        return [Flat(f, [_mapped_part(p) for p in g], replicated=False) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups_flat"):  # stage 0 in half precision, fused optimizer
        flats, groups = optimizer.fp32_groups_flat, optimizer.fp16_groups
        return [Flat(f, _consecutive(g), replicated=True) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in half precision, any other optimizer
        pairs = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        return [Flat(f, _consecutive([p]), replicated=True) for fs, ps in pairs for f, p in zip(fs, ps, strict=True)]
    parameters = (p for group in optimizer.param_groups for p in group["params"])  # stage 0 in float32
    return [Flat(p, _consecutive([p]), replicated=True) for p in parameters]


def _zero3_part(optimizer: Any, parameter: Any) -> Part:
    _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    values, first = _zero3_range(parameter)
    return Part(parameter, offset, first, values)


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """(number of real cells, flat index of the first) of this rank's partition, which is padded at the end."""
    import torch.distributed as dist

    size = parameter.partition_numel()
    first = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return min(size, parameter.ds_numel - first), first


def _mapped_part(parameter: Any) -> Part:
    mapping = parameter._hp_mapping
    if mapping is None:  # none of it is in this rank's partition
        return Part(parameter, 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Part(parameter, high.start, low.start, low.numel)


def _consecutive(parameters: Iterable[Any]) -> list[Part]:
    parts, offset = [], 0
    for parameter in parameters:
        parts.append(Part(parameter, offset, 0, parameter.numel()))
        offset += parameter.numel()
    return parts


def zero_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape)


def zero3_group_size(parameter: Any) -> int | None:
    """Number of ranks that a stage-3 parameter is partitioned over; None for any other parameter."""
    return parameter.ds_process_group.size() if hasattr(parameter, "ds_id") else None


def zero3_partition(parameter: Any) -> tuple[Tensor, int] | None:
    """This rank's cells of a stage-3 parameter and the flat index of the first; None for any other parameter."""
    if not hasattr(parameter, "ds_id"):
        return None
    numel, first = _zero3_range(parameter)
    return parameter.ds_tensor.detach().view(-1)[:numel], first


def zero_gradients_wait(optimizer: Any) -> bool:
    """Whether a backward has left gradients there for a step that is still to come (stages 1 to 3)."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return bool(optimizer.micro_step_id > 0 or optimizer._epilogue_ran_this_backward)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return bool(optimizer.micro_step_id >= 0)
    return any(any(group) for group in getattr(optimizer, "fp32_groups_has_gradients", ()))


def zero_steps(optimizer: Any, flats: list[Flat]) -> bool:
    """Whether the model's weights are still tied to these partitions: `deepspeed.initialize` ties them to new ones."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return all(part.parameter._z3_optimizer is optimizer for flat in flats for part in flat.parts)
    mapped = [(f, getattr(part.parameter, "_hp_mapping", None)) for f in flats if not f.replicated for part in f.parts]
    storages = [(m.hp_fragment.untyped_storage(), f.tensor.untyped_storage()) for f, m in mapped if m is not None]
    return all(one.data_ptr() == other.data_ptr() for one, other in storages)


def zero_step_that_reads(optimizer: Any, inner: Any, read: list[tuple[Any, Tensor]]) -> None:
    """A DeepSpeed step that moves nothing: where the inner optimizer would step, (tensor, its gradient) is noted."""

    def step(*_: Any, **__: Any) -> None:
        for group in inner.param_groups:
            read.extend((p, p.grad.clone()) for p in group["params"] if p.grad is not None)

    replaced = inner.__dict__.get("step")  # a learning-rate scheduler may have put its own there
    inner.step = step
    try:
        optimizer.step()
    finally:
        if replaced is None:
            del inner.step
        else:
            inner.step = replaced


@contextmanager
def zero_undisturbed(engine: Any) -> Iterator[None]:
    """For the block nothing is clipped; then boundary, loss scale and the counters of a step are as they were."""
    optimizer = engine.optimizer
    boundary = engine._is_gradient_accumulation_boundary
    scaler = getattr(optimizer, "loss_scaler", None)
    scale = dict(vars(scaler)) if scaler is not None else {}
    names = ["clip_grad", "overflow", "cur_scale", "cur_iter", "last_overflow_iter", "_global_grad_norm"]
    names += ["_hp_optimizer_states_linked", "micro_step_id"]
    kept = {n: vars(optimizer)[n] for n in names if n in vars(optimizer)}
    if "clip_grad" in kept:
        optimizer.clip_grad = 0.0
    try:
        yield
    finally:
        vars(optimizer).update(kept)
        if scaler is not None:
            vars(scaler).update(scale)
        engine.set_gradient_accumulation_boundary(boundary)


def zero_publish(optimizer: Any, flats: list[Flat]) -> None:
    """Copies the fp32 partitions into the model, on every rank. Collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for i in range(len(flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for flat in flats:
            for part in flat.parts:
                if part.parameter is not flat.tensor:
                    part.parameter.data.view(-1).copy_(flat.tensor.data.view(-1)[part.offset : part.offset + part.numel])


def names_in_transformers(model: Any, stored: Iterable[str]) -> dict[str, list[str]]:
    """Name in a file of transformers -> name in the model; several: it is cut into so many equal parts of its rows; none:
    several tensors are merged into one, or one is cut otherwise.

    Files keep the names that a model had when it was published, whatever its modules are called today.
    """
    from transformers import conversion_mapping, core_model_loading

    found = conversion_mapping.get_model_conversion_mapping(model)
    merging = [change for change in found if isinstance(change, core_model_loading.WeightConverter)]
    renaming = [change for change in found if isinstance(change, core_model_loading.WeightRenaming)]
    cuts = {c.source_patterns[0]: c.target_patterns for c in merging if _cuts_rows(c)}
    state, names = model.state_dict(), {}
    for name in stored:
        new, by = core_model_loading.rename_source_key(name, renaming, merging, model.base_model_prefix, state)
        parts = cuts.get(by, []) if by else [""]
        names[name] = [new.replace(parts[0], part) if part else new for part in parts]
    return names


def _cuts_rows(change: Any) -> bool:
    """Whether a change of transformers cuts one tensor into equal parts of its rows."""
    from transformers.core_model_loading import Chunk

    ways, many = change.operations, len(change.target_patterns)
    return len(ways) == 1 == len(change.source_patterns) and isinstance(ways[0], Chunk) and ways[0].dim == 0 and many > 1
