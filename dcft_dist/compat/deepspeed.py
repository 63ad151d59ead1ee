"""Private parts of DeepSpeed: its import, the flat partitions that its optimizers step, and steps that change nothing."""

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
    """This rank's part of a ZeRO-3 model: the partition of every parameter, and the flat fp32 master copies."""
    return [p.ds_tensor for p in model.parameters()] + list(model.optimizer.fp32_partitioned_groups_flat)


@contextmanager
def zero3_alone() -> Iterator[None]:
    """Lets ZeRO-3 run in the block as rank 0 of ranks that do not exist.

    DeepSpeed reads its rank from environment variables, so the block sets them. It also compares the order of modules
    with other ranks, so the block switches this check off. DeepSpeed keeps its own process groups: the block destroys
    them at its end, together with those of torch.
    """
    deepspeed = import_deepspeed()
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    compare, old_environment = coordinator.assert_ints_same_as_other_ranks, dict(os.environ)
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns at each collective of DeepSpeed
            yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        coordinator.assert_ints_same_as_other_ranks = compare
        os.environ.clear()
        os.environ.update(old_environment)


def import_deepspeed() -> Any:
    """Imports DeepSpeed so that it also works on a machine without a GPU, and returns the module.

    Without a GPU, DeepSpeed would compile an extension for shared-memory collectives, which takes a minute or more. A
    killed compilation leaves a lock, and later ones wait for it without end. gloo does not need the extension, so it is
    switched off.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero3_materialise(model: Any, make: Callable[[Any], None], config: dict[str, Any], dtype: torch.dtype) -> None:
    """Partitions a model on the meta device. Only one module at a time has memory for its whole weights.

    Args:
        model: the model; changed in place.
        make: gives the own weights of one module memory, without its submodules.
        config: DeepSpeed's configuration.
        dtype: data type of the weights. DeepSpeed does not cast them after partitioning. Master copies are in float32.
    """
    init = import_deepspeed().zero.Init
    for module in reversed(list(model.modules())):  # submodules first: `Init` then leaves them alone
        make(module)
        own_weights = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in own_weights:
            parameter.data = parameter.data.to(dtype)
        if own_weights:
            init(module=module, config_dict_or_path=config)  # it also broadcasts them, although they have no values yet


@dataclass(frozen=True)
class FlatPart:
    """The elements of one parameter inside a flat partition.

    Attributes:
        parameter: the model's parameter.
        offset: index of the first of these elements in the partition.
        first: flat index of the first of these elements in the parameter.
        numel: number of elements; 0 if this rank has none.
    """

    parameter: Any
    offset: int
    first: int
    numel: int


@dataclass(frozen=True)
class FlatPartition:
    """A tensor that DeepSpeed's inner optimizer steps.

    Attributes:
        tensor: the flat fp32 tensor, or in stage 0 with float32 the parameter itself.
        parts: the parts of parameters in it on this rank.
        replicated: True if every rank has the same whole tensor (stage 0).
    """

    tensor: Any
    parts: list[FlatPart]
    replicated: bool


def zero_inner_optimizer(engine: Any) -> Any | None:
    """The torch optimizer inside a DeepSpeedEngine; None if the engine has none."""
    outer = engine.optimizer
    return getattr(outer, "optimizer", outer) if outer is not None else None


def zero_partitions(optimizer: Any, stage: int) -> list[FlatPartition]:
    """The tensors that the inner optimizer steps, in the order in which DeepSpeed steps them."""
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
    numel, first = _zero3_range(parameter)
    return FlatPart(parameter, offset, first, numel)


def _zero3_range(parameter: Any) -> tuple[int, int]:
    """(number of elements without padding, flat index of the first) of this rank's partition. Padding is at its end."""
    import torch.distributed as dist

    size = parameter.partition_numel()
    first = min(dist.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return min(size, parameter.ds_numel - first), first


def _mapped_part(parameter: Any) -> FlatPart:
    mapping = parameter._hp_mapping
    if mapping is None:  # this rank's partition has no element of it
        return FlatPart(parameter, 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return FlatPart(parameter, high.start, low.start, low.numel)


def _consecutive(parameters: Iterable[Any]) -> list[FlatPart]:
    """Whole parameters, one after the other."""
    parts, offset = [], 0
    for parameter in parameters:
        parts.append(FlatPart(parameter, offset, 0, parameter.numel()))
        offset += parameter.numel()
    return parts


def zero_shape(parameter: Any) -> tuple[int, ...]:
    """Unpartitioned shape of a parameter, in any stage."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape)


def zero3_group_size(parameter: Any) -> int | None:
    """Number of ranks that a stage-3 parameter is partitioned over; None for any other parameter."""
    return parameter.ds_process_group.size() if hasattr(parameter, "ds_id") else None


def zero3_partition(parameter: Any) -> tuple[Tensor, int] | None:
    """(this rank's elements, flat index of the first) of a stage-3 parameter; None for any other parameter."""
    if not hasattr(parameter, "ds_id"):
        return None
    numel, first = _zero3_range(parameter)
    return parameter.ds_tensor.detach().view(-1)[:numel], first


def zero_gradients_wait(optimizer: Any) -> bool:
    """Whether gradients of an earlier backward wait for the next step (stages 1 to 3)."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return bool(optimizer.micro_step_id > 0 or optimizer._epilogue_ran_this_backward)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return bool(optimizer.micro_step_id >= 0)
    return any(any(group) for group in getattr(optimizer, "fp32_groups_has_gradients", ()))


def zero_steps(optimizer: Any, flats: list[FlatPartition]) -> bool:
    """Whether the model's weights still belong to these partitions: another `deepspeed.initialize` makes new ones."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return all(part.parameter._z3_optimizer is optimizer for flat in flats for part in flat.parts)
    mapped = [(f, getattr(part.parameter, "_hp_mapping", None)) for f in flats if not f.replicated for part in f.parts]
    storages = [(m.hp_fragment.untyped_storage(), f.tensor.untyped_storage()) for f, m in mapped if m is not None]
    return all(current.data_ptr() == expected.data_ptr() for current, expected in storages)


def zero_owners(flats: list[FlatPartition]) -> list[Any]:
    """Objects that another `deepspeed.initialize` replaces; `zero_steps` depends on nothing else."""
    parameters = [part.parameter for flat in flats for part in flat.parts]
    return [getattr(p, "_z3_optimizer", getattr(p, "_hp_mapping", None)) for p in parameters]


def zero_step_that_reads(optimizer: Any, inner: Any, read: list[tuple[Any, Tensor]]) -> None:
    """Runs a DeepSpeed step that changes no weight, to read the reduced gradients. Collective.

    Args:
        optimizer: DeepSpeed's optimizer.
        inner: the torch optimizer inside it.
        read: the function appends (tensor, copy of its gradient) for each tensor that the inner optimizer would step. It
            stays empty if the gradients overflowed.
    """

    def step(*_: Any, **__: Any) -> None:
        for group in inner.param_groups:
            read.extend((p, p.grad.clone()) for p in group["params"] if p.grad is not None)

    old_step = inner.__dict__.get("step")  # a learning-rate scheduler may have replaced the method
    inner.step = step
    try:
        optimizer.step()
    finally:
        if old_step is None:
            del inner.step
        else:
            inner.step = old_step


@contextmanager
def zero_undisturbed(engine: Any) -> Iterator[None]:
    """Switches clipping off for the block. After it, restores the accumulation boundary, loss scale and step counters."""
    optimizer = engine.optimizer
    boundary = engine._is_gradient_accumulation_boundary
    scaler = getattr(optimizer, "loss_scaler", None)
    old_scale = dict(vars(scaler)) if scaler is not None else {}
    names = ["clip_grad", "overflow", "cur_scale", "cur_iter", "last_overflow_iter", "_global_grad_norm"]
    names += ["_hp_optimizer_states_linked", "micro_step_id"]
    old_values = {n: vars(optimizer)[n] for n in names if n in vars(optimizer)}
    if "clip_grad" in old_values:
        optimizer.clip_grad = 0.0
    try:
        yield
    finally:
        vars(optimizer).update(old_values)
        if scaler is not None:
            vars(scaler).update(old_scale)
        engine.set_gradient_accumulation_boundary(boundary)


def zero_publish(optimizer: Any, flats: list[FlatPartition]) -> None:
    """Copies the fp32 partitions into the model's weights. Collective."""
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
