"""One kernel for many shards on a GPU: a table of their addresses, cut into blocks of equal size.

A step of a large model has hundreds of weights, and a launch for each of them keeps the GPU waiting for the host. The tables
are built once; only the addresses of gradients are looked at again in each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compat.pytorch import has_values, is_capturing
from .bits import BLOCK, Blocks
from .multipliers import Multipliers, Plane, is_fused


def usable(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels can read these flat tensors by their addresses. On tensors without memory, none will run."""
    if not tensors:
        return False
    first = tensors[0]
    if not has_values(first):
        return True
    alike = all(t.dtype == torch.float32 and t.device == first.device and t.is_contiguous() for t in tensors)
    return alike and is_fused(first, first)


class AddressTable:
    """Flat float32 shards, their bits, and what of them is saved before a step.

    Attributes:
        packed: whether only fundamental cells are saved. Then `shorten` can also sum up what it does.
    """

    def __init__(self, flats: Sequence[Tensor], planes: Sequence[tuple[Plane, int]], multipliers: Multipliers) -> None:
        """
        Args:
            flats: the shards.
            planes: the bits of each, and how many of them are set.
            multipliers: the numbers.
        """
        self._multipliers, self._device = multipliers, flats[0].device
        self._flats, self._planes = list(flats), [plane for plane, _ in planes]
        self.packed = multipliers.rest == 1.0 and multipliers.unscored == 1.0
        sizes = [flat.numel() for flat in flats]
        self._num_saved = sum(chosen for _, chosen in planes) if self.packed else sum(sizes)
        self._old: Tensor | None = None
        self._real = has_values(flats[0])
        self._gradients: tuple[list[int], Tensor] | None = None
        if self._real:
            self._build(sizes)

    def _build(self, sizes: list[int]) -> None:
        from . import kernels  # late: needs Triton

        self._kernels = kernels
        self._addresses = self._on_device([flat.data_ptr() for flat in self._flats])
        octets = [plane.octets for plane in self._planes]
        self._octets = self._on_device([o.data_ptr() if isinstance(o, Tensor) else 0 for o in octets])
        self._sizes = self._on_device(sizes)
        blocks = [-(-size // BLOCK) for size in sizes]
        counts = torch.tensor(blocks)
        self._block_entry = torch.arange(len(sizes)).repeat_interleave(counts).to(self._device)
        first = torch.cat([torch.arange(n) * BLOCK for n in blocks])
        self._block_first = first.to(self._device)
        saved = [
            self._chosen(o, n) if self.packed else self._all(size, n)
            for o, size, n in zip(octets, sizes, blocks, strict=True)
        ]
        ends = torch.cat(saved).cumsum(0)
        self._block_saved = torch.cat([ends.new_zeros(1), ends[:-1]]).to(self._device)

    def _chosen(self, octets: object, blocks: int) -> Tensor:
        """Number of bits that are set in each block."""
        if not isinstance(octets, Tensor):
            return torch.zeros(blocks, dtype=torch.int64)
        table = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.int64)
        padded = torch.nn.functional.pad(octets.cpu(), (0, blocks * (BLOCK // 8) - octets.numel()))
        return table[padded.long()].view(blocks, -1).sum(1)

    def _all(self, size: int, blocks: int) -> Tensor:
        """Number of cells in each block."""
        cells = torch.full((blocks,), BLOCK)
        if blocks:
            cells[-1] = size - (blocks - 1) * BLOCK
        return cells

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)

    def move(self, flats: Sequence[Tensor]) -> None:
        """Notes where the shards are now."""
        self._flats = list(flats)
        if self._real:
            self._addresses = self._on_device([flat.data_ptr() for flat in flats])

    def scale(self, gradients: Sequence[Tensor]) -> None:
        """Multiplies gradients in the order of the shards, in place. One launch."""
        if not self._real:
            return
        places = list(map(Tensor.data_ptr, gradients))
        if is_capturing():  # the graph has gradients of its own, and nothing can be copied from the host
            addresses = torch.empty(len(places), dtype=torch.int64, device=self._device)
            for address, place in zip(addresses.unbind(), places, strict=True):
                address.fill_(place)
        else:
            if self._gradients is None or self._gradients[0] != places:
                self._gradients = places, self._on_device(places)
            addresses = self._gradients[1]
        self._kernels.scale_many(self._blocks(addresses), self._multipliers.numbers(torch.float32, self._device))

    def save(self) -> None:
        """Copies the weights that are needed after the step. One launch."""
        self._old = self._copied()

    def shorten(self) -> None:
        """Shortens the step since `save`. One launch; a second one and some sums if the multipliers are watched."""
        old, self._old = self._old, None
        if not self._real or old is None:
            return
        if self._multipliers.watch:
            new = self._copied()
            shortened = torch.lerp(old, new, self._multipliers.number("factor", old))
            self._multipliers.add_squares(new.double() - old.double(), shortened.double() - old.double())
        numbers = self._multipliers.numbers(torch.float32, self._device)
        self._kernels.shorten_many(self._blocks(self._addresses), numbers, self._block_saved, old, self.packed)

    def _copied(self) -> Tensor:
        """The weights that are needed after the step, one after the other."""
        copy = torch.empty(self._num_saved, dtype=torch.float32, device=self._device)
        if self._real:
            self._kernels.save_many(self._blocks(self._addresses), self._block_saved, copy, self.packed)
        return copy

    def _blocks(self, addresses: Tensor) -> Blocks:
        return addresses, self._octets, self._sizes, self._block_entry, self._block_first
