"""Boxes inside weights, and one bit per weight: the geometry and the packing that everything else shares.

Bit `i` of a packed array is bit `i % 8` (least significant first) of byte `i // 8`, `i` being the flat row-major index.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.box import Box

Packed = NDArray[np.uint8]


CHUNK = 1 << 20  # elements handled at a time: bounds the extra memory of a pass over the weights


STEP = {"cpu": 1 << 18, "cuda": 1 << 22}  # where speed counts: what stays in a core's cache, what keeps a GPU busy


def step_of(device: torch.device) -> int:
    return STEP.get(device.type, CHUNK)


def pack(mask: Tensor) -> Packed:
    """A boolean tensor of any shape -> ceil(numel / 8) bytes."""
    flat = mask.detach().reshape(-1)
    if flat.device.type == "cpu":
        return np.packbits(flat.numpy(), bitorder="little")
    rows = torch.nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)  # there: an eighth to send
    places = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (rows << places).sum(1, dtype=torch.uint8).cpu().numpy()


def unpack(packed: Packed, numel: int) -> Tensor:
    """The first `numel` bits as a flat boolean tensor."""
    return torch.from_numpy(np.unpackbits(packed, count=numel, bitorder="little").view(np.bool_))


def popcount(packed: Packed) -> int:
    whole = len(packed) // 8 * 8  # eight bytes at a time
    words, rest = np.ascontiguousarray(packed[:whole]).view(np.uint64), packed[whole:]
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(rest).sum(dtype=np.int64))


def num_bytes(numel: int) -> int:
    return (numel + 7) // 8


def cut(packed: Packed, box: Box) -> Packed:
    """The bits of one box out of the packed bits of the whole weight, packed again from the box's first cell on."""
    if box.numel == 0:
        return np.zeros(0, dtype=np.uint8)
    first = box.first
    if first is None:
        return pack(unpack(packed, prod(box.grid)).view(box.grid)[box.slices()])
    if first % 8 == 0:
        piece = packed[first // 8 : num_bytes(first + box.numel)].copy()
        if box.numel % 8:
            piece[-1] &= (1 << (box.numel % 8)) - 1
        return piece
    covering = packed[first // 8 : num_bytes(first + box.numel)]
    return pack(unpack(covering, first % 8 + box.numel)[first % 8 :])


def paste(piece: Packed, box: Box, whole: Packed) -> None:
    """Sets in `whole` (packed bits of the whole weight) the bits of one box; the other bits stay."""
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
