"""Boxes inside weights, and one bit per weight: the geometry and the packing that everything else shares.

Bit `i` of a packed array is bit `i % 8` (least significant first) of byte `i // 8`, `i` being the flat row-major index.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Packed = NDArray[np.uint8]
CHUNK = 1 << 20  # elements handled at a time: bounds the extra memory of a pass over the weights
STEP = {"cpu": 1 << 18, "cuda": 1 << 22}  # where speed counts: what stays in a core's cache, what keeps a GPU busy


def step_of(device: torch.device) -> int:
    return STEP.get(device.type, CHUNK)


@dataclass(frozen=True)
class Box:
    """A block of a row-major grid whose cells are the elements of one weight.

    `grid` is the weight's shape, or `(numel,)` where a rank holds a flat range; `start` and `size` are per dimension.
    """

    grid: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box(shape, (0,) * len(shape), shape)

    @staticmethod
    def flat(numel: int, start: int, size: int) -> Box:
        return Box((numel,), (start,), (size,))

    @property
    def numel(self) -> int:
        return prod(self.size)

    @property
    def first(self) -> int | None:
        """Flat index of the first cell if the cells are one contiguous flat range, else None."""
        lead = next((d for d, n in enumerate(self.size) if n != 1), len(self.size))
        if self.size[lead + 1 :] != self.grid[lead + 1 :] and self.numel:
            return None
        return sum(s * prod(self.grid[d + 1 :]) for d, s in enumerate(self.start))

    def flat_index(self, begin: int, end: int, device: torch.device | str = "cpu") -> Tensor:
        """Flat indices (int64) in the whole weight of this box's cells `begin:end`, in the box's row-major order."""
        local = torch.arange(begin, end, dtype=torch.int64, device=device)
        first = self.first
        if first is not None:
            return local + first
        index = torch.zeros_like(local)
        for dim in reversed(range(len(self.grid))):
            index += (local % self.size[dim] + self.start[dim]) * prod(self.grid[dim + 1 :])
            local = local // self.size[dim]
        return index

    def num_before(self, flat: int) -> int:
        """How many of this box's cells have a flat index below `flat`: row-major order is that of the flat index."""
        if not self.grid:
            return int(flat > 0)
        before, cells = 0, self.numel
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            row, cells = prod(self.grid[dim + 1 :]), cells // max(size, 1)
            place, flat = divmod(flat, row)
            before += min(max(place - start, 0), size) * cells
            if not start <= place < start + size:
                break
        return before

    def share(self, index: int, count: int) -> tuple[tuple[int, int], Box]:
        """The `index`-th of `count` parts: its range of this box's cells in row-major order, and those cells as a box."""
        first = self.first
        if count == 1:
            return (0, self.numel), self
        if first is not None:
            begin, end = self.numel * index // count, self.numel * (index + 1) // count
            return (begin, end), Box.flat(prod(self.grid), first + begin, end - begin)
        top, bottom = self.size[0] * index // count, self.size[0] * (index + 1) // count  # whole rows
        row = prod(self.size[1:])
        part = Box(self.grid, (self.start[0] + top, *self.start[1:]), (bottom - top, *self.size[1:]))
        return (top * row, bottom * row), part

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.size, strict=True))


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
