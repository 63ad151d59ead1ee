"""Boxes: which elements of a weight a rank stores."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A block of elements of one weight, in row-major order.

    Attributes:
        grid: shape of the whole weight, or `(numel,)` where a rank stores a flat range of it.
        start: index of the block's first element in each dimension of `grid`.
        size: number of elements in each dimension of `grid`.
    """

    grid: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        """All elements of a weight with this shape."""
        return Box(shape, (0,) * len(shape), shape)

    @staticmethod
    def flat(numel: int, start: int, size: int) -> Box:
        """The `size` elements from flat index `start` on, of a weight with `numel` elements."""
        return Box((numel,), (start,), (size,))

    @property
    def numel(self) -> int:
        """Number of elements in the box."""
        return prod(self.size)

    @property
    def first(self) -> int | None:
        """Flat index of the first element if the elements are one contiguous flat range, else None."""
        first_long_dim = next((d for d, n in enumerate(self.size) if n != 1), len(self.size))
        if self.size[first_long_dim + 1 :] != self.grid[first_long_dim + 1 :] and self.numel:
            return None
        return sum(s * prod(self.grid[d + 1 :]) for d, s in enumerate(self.start))

    def flat_index(self, begin: int, end: int, device: torch.device | str = "cpu") -> Tensor:
        """Positions of the box's elements in the flattened weight.

        Args:
            begin: first element, counted in the box's row-major order.
            end: one past the last element, counted in the same way.
            device: device of the result.

        Returns:
            int64 tensor of shape `(end - begin,)`.
        """
        indices: Tensor = self.flat_indices(torch.arange(begin, end, dtype=torch.int64, device=device))
        return indices

    def flat_indices(self, cells: Any) -> Any:
        """Positions of some of the box's elements in the flattened weight.

        Args:
            cells: the elements, counted in the box's row-major order; an int64 tensor or numpy array of shape `(n,)`.

        Returns:
            The same kind of array, of shape `(n,)`.
        """
        first = self.first
        if first is not None:
            return cells + first
        index = 0
        for dim in reversed(range(len(self.grid))):
            index = index + (cells % self.size[dim] + self.start[dim]) * prod(self.grid[dim + 1 :])
            cells = cells // self.size[dim]
        return index

    def num_before(self, flat: int) -> int:
        """Number of the box's elements with a flat index in the weight below `flat`."""
        if not self.grid:
            return int(flat > 0)
        before, per_index = 0, self.numel  # per_index: elements of the box for one index of the current dimension
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            row, per_index = prod(self.grid[dim + 1 :]), per_index // max(size, 1)
            index, flat = divmod(flat, row)
            before += min(max(index - start, 0), size) * per_index
            if not start <= index < start + size:
                break
        return before

    def share(self, index: int, count: int) -> tuple[tuple[int, int], Box]:
        """Splits the box into `count` nearly equal parts and returns part `index`.

        Returns:
            The part's range `[begin, end)` of the box's elements in row-major order, and the part as a box.
        """
        first = self.first
        if count == 1:
            return (0, self.numel), self
        if first is not None:
            begin, end = self.numel * index // count, self.numel * (index + 1) // count
            return (begin, end), Box.flat(prod(self.grid), first + begin, end - begin)
        top, bottom = self.size[0] * index // count, self.size[0] * (index + 1) // count  # split between rows
        row = prod(self.size[1:])
        part = Box(self.grid, (self.start[0] + top, *self.start[1:]), (bottom - top, *self.size[1:]))
        return (top * row, bottom * row), part

    def slices(self) -> tuple[slice, ...]:
        """Slices that cut the box out of a tensor of shape `grid`."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.size, strict=True))
