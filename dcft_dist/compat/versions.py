"""The tested versions of torch, DeepSpeed and transformers, and the private attributes of theirs that the package uses.

`TESTED` lists the versions; `check_version` warns once about any other version. `USES` lists the attributes; a test builds
each object and fails if an attribute is missing.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger(__name__)

# Package -> version series on which the attributes below exist and work.
TESTED = {"torch": ("2.11", "2.13", "2.14"), "deepspeed": ("0.19",), "transformers": ("5.23",)}


# Class or module -> attributes used. For a class, the test looks at a live instance.
USES: dict[str, tuple[str, ...]] = {
    "torch": ("_chunk_cat", "_foreach_add_", "_foreach_mul_", "_foreach_div_", "_foreach_addcmul_", "_foreach_lerp_"),
    "torch.cuda.memory": ("_record_memory_history", "_dump_snapshot"),
    "Module": ("_non_persistent_buffers_set", "_apply", "_modules", "_parameters"),
    "DTensor": ("_local_tensor",),
    "torch.distributed._functional_collectives": ("AsyncCollectiveTensor",),
    "torch.distributed.distributed_c10d": ("_get_default_store",),
    "torch.distributed.tensor._utils": ("compute_local_shape_and_global_offset",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode", "unset_fake_temporarily"),
    "torch.testing._internal.distributed.fake_pg": (),
    "torch.distributed._tools.fsdp2_mem_tracker": ("FSDPMemTracker",),
    "torch.distributed._tools.mem_tracker": ("MemTracker",),
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_fsdp_param_group",),  # and `_fsdp_param_groups` since torch 2.13
    "FSDPParamGroup": (
        "reduce_grads",
        "gradient_divide_factor",
        "fsdp_params",
        "mesh_info",
        "_reduce_scatter_comm",
        "_all_reduce_hook",
    ),
    "FSDPParamGroup.mesh_info": ("shard_mesh_size",),
    "FSDPParam": ("unsharded_accumulated_grad", "_unsharded_param", "sharded_param", "fsdp_placement"),
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
    "transformers.Trainer": ("_prepare_inputs", "_get_output_dir"),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": ("rename_source_key", "WeightConverter", "WeightRenaming"),
}


@cache
def check_version(package: str) -> None:
    """Warns once if the installed version of a package is not one of the tested versions.

    Args:
        package: `torch`, `deepspeed` or `transformers`.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        return
    if ".".join(installed.split("+")[0].split(".")[:2]) not in TESTED[package]:
        log.warning(
            "%s %s is not one of the tested versions (%s), and dcft_dist uses private parts of it: "
            "install a tested version, or compare a short run with one on a single process",
            package,
            installed,
            ", ".join(TESTED[package]),
        )
