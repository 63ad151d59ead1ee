"""Packed masks: one bit per weight, and the bits of one box within a weight.

The bit of flat row-major index `i` is bit `i % 8` (least significant first) of byte `i // 8`.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compat.pytorch import real_tensors
from ..engines.box import Box

Packed = NDArray[np.uint8]


CHUNK = 1 << 20  # elements processed at a time: limits the extra memory of a pass over the weights


STEP = {"cpu": 1 << 18, "cuda": 1 << 22}  # elements, for speed: fits in a core's cache; keeps a GPU busy


BLOCK = 4096  # cells per program of a kernel; a multiple of 8


# For kernels over many shards: addresses, addresses of the bits (0: an unscored weight) and sizes of the shards; of each
# block the number of its shard and its first cell.
Blocks = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# The same for scores, which have no bits: addresses and sizes of the shards, and of each block its shard and first cell.
ScoreBlocks = tuple[Tensor, Tensor, Tensor, Tensor]


def step_of(device: torch.device) -> int:
    """Elements to process at a time on this device, where speed matters."""
    return STEP.get(device.type, CHUNK)


def pack(mask: Tensor) -> Packed:
    """Packs a boolean tensor of any shape into ceil(numel / 8) bytes."""
    flat = mask.detach().reshape(-1)
    if flat.device.type == "cpu":
        return np.packbits(flat.numpy(), bitorder="little")
    # Packed on the GPU, so that only an eighth of the bytes is copied to the CPU.
    rows = torch.nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    bit_positions = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (rows << bit_positions).sum(1, dtype=torch.uint8).cpu().numpy()


def unpack(packed: Packed, numel: int) -> Tensor:
    """Returns the first `numel` bits as a flat boolean tensor on the CPU."""
    return torch.from_numpy(np.unpackbits(packed, count=numel, bitorder="little").view(np.bool_))


def popcount(packed: Packed) -> int:
    """Number of bits that are set."""
    whole = len(packed) // 8 * 8  # eight bytes at a time
    words, tail = np.ascontiguousarray(packed[:whole]).view(np.uint64), packed[whole:]
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(tail).sum(dtype=np.int64))


def num_bytes(numel: int) -> int:
    """Bytes that `numel` packed bits take."""
    return (numel + 7) // 8


def cut(packed: Packed, box: Box) -> Packed:
    """Cuts the bits of one box out of the packed bits of the whole weight; bit 0 is the box's first cell."""
    if box.numel == 0:
        return np.zeros(0, dtype=np.uint8)
    first = box.first
    if first is None:
        with real_tensors():  # `dcft plan` has bits, too
            return pack(unpack(packed, prod(box.grid)).view(box.grid)[box.slices()])
    if first % 8 == 0:
        piece = packed[first // 8 : num_bytes(first + box.numel)].copy()
        if box.numel % 8:
            piece[-1] &= (1 << (box.numel % 8)) - 1
        return piece
    covering = packed[first // 8 : num_bytes(first + box.numel)]
    with real_tensors():
        return pack(unpack(covering, first % 8 + box.numel)[first % 8 :])


def paste(piece: Packed, box: Box, whole: Packed) -> None:
    """Sets the bits of one box in `whole`, the packed bits of the whole weight. Clears no bit."""
    if box.numel == 0:
        return
    bits = unpack(piece, box.numel)
    first = box.first
    if first is None:
        grid = torch.zeros(box.grid, dtype=torch.bool)
        grid[box.slices()] = bits.view(box.size)
        whole |= pack(grid)
        return
    lead = first % 8
    shifted = pack(torch.cat([torch.zeros(lead, dtype=torch.bool), bits]))
    whole[first // 8 : first // 8 + len(shifted)] |= shifted
