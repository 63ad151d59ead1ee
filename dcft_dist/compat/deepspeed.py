"""Private parts of DeepSpeed: the flat partitions that its optimizers step, and how ZeRO is entered and left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def zero3_weights(model: Any) -> list[Any]:
    """What this rank holds of the weights: its partitions, and their masters."""
    return [p.ds_tensor for p in model.parameters()] + list(model.optimizer.fp32_partitioned_groups_flat)


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
class FlatPart:
    """One parameter inside a flat partition: `numel` cells at `offset` there, which start at flat index `first` of it."""

    parameter: Any
    offset: int
    first: int
    numel: int


@dataclass(frozen=True)
class FlatPartition:
    """A tensor that DeepSpeed's inner optimizer steps, and the parts of parameters in it on this rank."""

    tensor: Any
    parts: list[FlatPart]
    replicated: bool


def zero_inner_optimizer(engine: Any) -> Any | None:
    """The torch optimizer that DeepSpeed steps; None without one."""
    outer = engine.optimizer
    return getattr(outer, "optimizer", outer) if outer is not None else None


def zero_partitions(optimizer: Any, stage: int) -> list[FlatPartition]:
    """What the inner optimizer steps, in the order in which DeepSpeed steps it."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        return [
            FlatPartition(flat, [_zero3_part(optimizer, p) for p in group], replicated=False)
            for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        return [FlatPartition(f, [_mapped_part(p) for p in g], replicated=False) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bfloat16
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        return [FlatPartition(f, [_mapped_part(p) for p in g], replicated=False) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups_flat"):  # stage 0 in half precision, fused optimizer
        flats, groups = optimizer.fp32_groups_flat, optimizer.fp16_groups
        return [FlatPartition(f, _consecutive(g), replicated=True) for f, g in zip(flats, groups, strict=True)]
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in half precision, any other optimizer
        pairs = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        return [
            FlatPartition(f, _consecutive([p]), replicated=True) for fs, ps in pairs for f, p in zip(fs, ps, strict=True)
        ]
    parameters = (p for group in optimizer.param_groups for p in group["params"])  # stage 0 in float32
    return [FlatPartition(p, _consecutive([p]), replicated=True) for p in parameters]


def _zero3_part(optimizer: Any, parameter: Any) -> FlatPart:
    _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    values, first = _zero3_range(parameter)
    return FlatPart(parameter, offset, first, values)


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """(number of real cells, flat index of the first) of this rank's partition, which is padded at the end."""
    import torch.distributed as dist

    size = parameter.partition_numel()
    first = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return min(size, parameter.ds_numel - first), first


def _mapped_part(parameter: Any) -> FlatPart:
    mapping = parameter._hp_mapping
    if mapping is None:  # none of it is in this rank's partition
        return FlatPart(parameter, 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return FlatPart(parameter, high.start, low.start, low.numel)


def _consecutive(parameters: Iterable[Any]) -> list[FlatPart]:
    parts, offset = [], 0
    for parameter in parameters:
        parts.append(FlatPart(parameter, offset, 0, parameter.numel()))
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


def zero_steps(optimizer: Any, flats: list[FlatPartition]) -> bool:
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


def zero_publish(optimizer: Any, flats: list[FlatPartition]) -> None:
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
