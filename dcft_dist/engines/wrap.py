"""Wraps a model and its optimizer in an engine, for the trainer. With your own training loop you wrap the model yourself."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from ..errors import EngineError
from .blocks import checkpoint_activations, compile_blocks
from .find import engine_named
from .meta import Materialiser
from .prepared import MakeOptimizer, Prepared, WrapOptions

log = logging.getLogger(__name__)


def prepare(model: nn.Module, options: WrapOptions, make_optimizer: MakeOptimizer) -> Prepared:
    """Wraps `model` for training and creates its optimizer.

    Each block becomes its own unit, and the rest of the model another one. Weights (or their master copies) are in
    float32. Weights on the meta device get memory without values: after sharding if the engine can shard them first.

    Args:
        model: the plain model; its weights may be on the meta device.
        options: the engine and how it wraps the model.
        make_optimizer: called with (name, parameter, whether the weight has two or more dimensions) of every weight.

    Raises:
        EngineError: the engine is unknown; `single` runs on several ranks; or the ranks cannot be split evenly into
            `options.replicas` groups.
    """
    ranks, engine = dist.get_world_size(), engine_named(options.engine, options.import_roots)
    if options.engine == "single" and ranks > 1:
        raise EngineError(f"engine 'single' on {ranks} ranks: use another engine, or start only one rank")
    if ranks % options.replicas:
        raise EngineError(f"{options.replicas} replicas do not divide {ranks} ranks: choose a divisor of {ranks}")
    if options.tensor_parallel > 1 and (options.engine != "fsdp2" or options.replicas > 1):
        raise EngineError("sharding.tensor_parallel needs the engine fsdp2, without replicas")
    if options.tensor_parallel > 1 and options.compiler is not None and options.checkpointing == "blocks":
        raise EngineError(
            "train.compile with sharding.tensor_parallel needs train.activation_checkpointing = 'none' or 'selective'"
        )
    if ranks % options.tensor_parallel:
        raise EngineError(f"sharding.tensor_parallel = {options.tensor_parallel} does not divide {ranks} ranks")
    if not engine.shards_weights(options) or not any(p.is_meta for p in model.parameters()):
        Materialiser(options.device)(model)
    _avoid_wrong_gradients(model, options)
    checkpoint_activations(options.blocks, options.checkpointing, options.activations_on_host)
    if options.compiler is not None:
        compile_blocks(options.blocks, options.compiler)
    return engine.wrap(model, options, make_optimizer)


def shards_weights(options: WrapOptions) -> bool:
    """Whether the engine of `options` can shard a model on the meta device first and allocate its memory afterwards."""
    return engine_named(options.engine, options.import_roots).shards_weights(options)


def _avoid_wrong_gradients(model: nn.Module, options: WrapOptions) -> None:
    """Switches oneDNN off for this process where its gradients may be wrong.

    On CPUs with AVX-512, oneDNN's bfloat16 gradient of a 3-d convolution's weight reads uninitialised memory. This happens
    if the image has two voxels along its first axis, as at the bottom of a U-Net (oneDNN 3.12, torch 2.13). torch's own
    kernel is right.
    """
    has_conv3d = any(isinstance(m, nn.Conv3d | nn.ConvTranspose3d) for m in model.modules())
    if options.bf16 and options.device.type == "cpu" and has_conv3d and torch.backends.mkldnn.is_available():
        torch.backends.mkldnn.set_flags(False)
        log.warning("bf16 on the CPU: oneDNN is off because its gradients of 3-d convolutions may be wrong; this is slow")
