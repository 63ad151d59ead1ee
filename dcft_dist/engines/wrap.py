"""Puts a model and its optimizer under an engine, for the trainer. Users with a loop of their own wrap models themselves."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from ..errors import EngineError
from .find import engine_named
from .meta import Materialiser
from .prepared import MakeOptimizer, Prepared, WrapOptions

log = logging.getLogger(__name__)


def prepare(model: nn.Module, options: WrapOptions, make_optimizer: MakeOptimizer) -> Prepared:
    """Wraps `model`: each block is a unit of its own, and so is the rest. Weights, or their masters, are in float32.

    Weights on the meta device get memory without values: after sharding, or before it where the engine does not shard.

    Raises:
        EngineError: an unknown engine; one that takes a single rank on several; replicas that do not divide the ranks.
    """
    ranks, engine = dist.get_world_size(), engine_named(options.engine, options.import_roots)
    if options.engine == "single" and ranks > 1:
        raise EngineError(f"engine 'single' on {ranks} ranks: use another engine, or start one rank")
    if ranks % options.replicas:
        raise EngineError(f"{options.replicas} replicas do not divide {ranks} ranks")
    if not engine.shards_weights(options) or not any(p.is_meta for p in model.parameters()):
        Materialiser(options.device)(model)
    _avoid_wrong_gradients(model, options)
    return engine.wrap(model, options, make_optimizer)


def shards_weights(options: WrapOptions) -> bool:
    """Whether the engine can take a model without memory and shard it first."""
    return engine_named(options.engine, options.import_roots).shards_weights(options)


def _avoid_wrong_gradients(model: nn.Module, options: WrapOptions) -> None:
    """Turns oneDNN off for this process where its gradients are wrong.

    On CPUs with AVX-512 the bfloat16 gradient of a 3-d convolution's weight reads unwritten memory if the image has two
    voxels along its first axis, as at the bottom of a U-Net (oneDNN 3.12, torch 2.13). torch's own kernel is right.
    """
    convolves = any(isinstance(m, nn.Conv3d | nn.ConvTranspose3d) for m in model.modules())
    if options.bf16 and options.device.type == "cpu" and convolves and torch.backends.mkldnn.is_available():
        torch.backends.mkldnn.set_flags(False)
        log.warning("bf16 on the CPU: without oneDNN, whose gradients of 3-d convolutions may be wrong; this is slow")
