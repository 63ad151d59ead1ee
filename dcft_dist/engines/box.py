"""Boxes inside weights: which elements of a weight a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


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
