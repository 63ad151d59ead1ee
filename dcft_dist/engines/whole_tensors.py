"""Whole tensors from shards and back: gather one weight, fill a shard, average buffers, fingerprint a model."""

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
    """Makes floating-point buffers the mean over ranks: batch normalisation has each rank's own statistics. Collective."""
    if collectives.world_size() > 1:
        for name, buffer in persistent_buffers(find_engine(model).module).items():
            if buffer.is_floating_point():
                buffer.copy_(collectives.all_reduce(buffer.double(), what=f"mean of {name}") / collectives.world_size())


def whole_weight(shard: Shard, values: Tensor) -> Tensor:
    """Of a tensor laid out like the shard: the whole, flattened, put together from what each rank owns. Collective."""
    owned = values.detach().reshape(-1)[slice(*shard.owned)]
    return whole_of(shard.owned_box, owned, prod(shard.box.grid), shard.name)


def whole_of(box: Box, values: Tensor, num_weights: int, name: str) -> Tensor:
    """The whole tensor, flattened, from the cells of every rank's box. Collective."""
    whole = torch.zeros(num_weights, dtype=values.dtype, device=values.device)
    whole[box.flat_index(0, box.numel, values.device)] = values
    return collectives.all_reduce(whole, what=f"whole of {name}")


def cells(stored: Any, box: Box) -> Tensor:
    """The cells of a box out of a slice that safetensors opened, flat; only the rows that hold them are read."""
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
    """Puts whole weights, by name, into a model under any engine. Collective."""
    engine = find_engine(model)
    for shard in engine.shards():
        if shard.name in values:
            fill_shard(shard, values[shard.name])
    engine.publish()


def fill_shard(shard: Shard, whole: Tensor) -> None:
    index = shard.box.flat_index(0, shard.box.numel, whole.device)
    target = shard.local.detach()
    target.copy_(whole.reshape(-1)[index].view(target.shape))


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of every rank's local weights and buffers, in rank order: equal for equal bits on equally many ranks."""
    digest, engine = hashlib.sha256(), find_engine(model)
    local = {shard.name: shard.local for shard in engine.shards()} | dict(engine.module.named_buffers())
    for _, tensor in sorted(local.items()):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    words = [int.from_bytes(digest.digest()[i : i + 4], "little") for i in range(0, 32, 4)]
    everyone = collectives.all_gather_ints(words, what="checksum of the weights")
    return hashlib.sha256(repr(everyone).encode()).hexdigest()
