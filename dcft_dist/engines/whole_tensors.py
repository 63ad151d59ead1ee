"""Whole tensors from shards and back: gather a weight, fill a shard, average buffers, compute a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.pytorch import persistent_buffers
from ..distributed import collectives
from .base import Shard
from .box import Box
from .find import find_engine


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Averages floating-point buffers over ranks: each rank has its own batch-normalisation statistics. Collective."""
    if collectives.world_size() > 1:
        for name, buffer in persistent_buffers(find_engine(model).module).items():
            if buffer.is_floating_point():
                buffer.copy_(collectives.all_reduce(buffer.double(), what=f"average {name}") / collectives.world_size())


def whole_weight(shard: Shard, values: Tensor) -> Tensor:
    """Gathers a whole tensor from the parts that the ranks own. Collective.

    Args:
        shard: this rank's part of the weight.
        values: a tensor in the order of `shard.local`, such as the weight, its gradient or optimizer state.

    Returns:
        Flat tensor with as many elements as the whole weight, on every rank.
    """
    owned = values.detach().reshape(-1)[slice(*shard.owned)]
    return whole_of(shard.owned_box, owned, prod(shard.box.grid), shard.name)


def whole_of(box: Box, values: Tensor, num_weights: int, name: str) -> Tensor:
    """Gathers a whole tensor from the boxes of all ranks, which must not overlap. Collective.

    Args:
        box: the elements that this rank contributes.
        values: flat tensor of these elements.
        num_weights: number of elements of the whole tensor.
        name: name of the weight, for error messages.

    Returns:
        Flat tensor of shape `(num_weights,)` on every rank.
    """
    whole = torch.zeros(num_weights, dtype=values.dtype, device=values.device)
    whole[box.flat_index(0, box.numel, values.device)] = values
    return collectives.all_reduce(whole, what=f"gather {name}")


def cells(stored: Any, box: Box) -> Tensor:
    """Reads the elements of a box from a stored tensor.

    Args:
        stored: a slice opened by safetensors (`get_slice`). If the box is a contiguous flat range, only its rows are read.
        box: the elements to read.

    Returns:
        Flat tensor with `box.numel` elements.
    """
    shape = tuple(stored.get_shape())
    if not box.numel:
        return stored[:0].reshape(-1)  # type: ignore[no-any-return]
    if box.first is None or not shape:
        return stored[...].reshape(box.grid)[box.slices()].reshape(-1)  # type: ignore[no-any-return]
    row = prod(shape[1:])
    top, bottom = box.first // row, -(-(box.first + box.numel) // row)
    return stored[top:bottom].reshape(-1)[box.first - top * row :][: box.numel]  # type: ignore[no-any-return]


@torch.no_grad()
def fill_weights(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies whole weights into a model under any engine. Collective.

    Args:
        model: the wrapped or plain model.
        values: canonical name -> whole tensor. Weights without an entry stay as they are.
    """
    engine = find_engine(model)
    for shard in engine.shards():
        if shard.name in values:
            fill_shard(shard, values[shard.name])
    engine.publish()


def fill_shard(shard: Shard, whole: Tensor) -> None:
    """Copies this rank's part of a whole weight (any shape, row-major) into the shard. No communication."""
    index = shard.box.flat_index(0, shard.box.numel, whole.device)
    target = shard.local.detach()
    target.copy_(whole.reshape(-1)[index].view(target.shape))


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers of all ranks, in rank order. Collective.

    Two models have equal checksums if their bits, engine and number of ranks are equal.
    """
    digest, engine = hashlib.sha256(), find_engine(model)
    local = {shard.name: shard.local for shard in engine.shards()} | dict(engine.module.named_buffers())
    for _, tensor in sorted(local.items()):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    words = [int.from_bytes(digest.digest()[i : i + 4], "little") for i in range(0, 32, 4)]
    digests = collectives.all_gather_ints(words, what="checksum of the weights")
    return hashlib.sha256(repr(digests).encode()).hexdigest()
