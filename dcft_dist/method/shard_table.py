"""Multiplies the reduced gradients, or the steps, of many shards at once: bits and addresses are looked up only once.

At the update level the old weights are needed until the step is made. Where every number but the factor is 1, only the cells
of fundamental weights are saved: on a CPU by their index, on a GPU packed by a kernel (`address_table`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from ..compat.pytorch import has_values, is_capturing
from ..engines.base import Shard, gradients_of, overlap
from ..errors import PenaltyError
from .address_table import AddressTable, usable
from .bits import Packed, popcount, unpack
from .multipliers import Job, Multipliers, Plane, on, unpacked

_KEPT = 16  # combinations of weights with a gradient for which addresses are kept
_DENSE = 0.25  # share of fundamental cells from which on a pass over all cells is faster than an index


@dataclass(frozen=True)
class CellBits:
    """The bits of one shard, in the form in which they are used.

    Attributes:
        plane: packed bits; no bits for an unscored weight.
        chosen: number of bits that are set.
        index: int32 positions of the bits that are set, if only these cells are saved; otherwise None.
    """

    plane: Plane
    chosen: int = 0
    index: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the bits on this rank."""
        return self.plane.num_bytes + (self.index.nbytes if self.index is not None else 0)


def cell_bits(packed: Packed | None, shard: Shard, by_index: bool) -> CellBits:
    """Puts the bits of a shard on its device.

    Args:
        packed: the bits; None for an unscored weight.
        shard: the shard.
        by_index: whether only fundamental cells are saved before a step.
    """
    if packed is None:
        return CellBits(Plane(None, "unscored", "unscored"))
    local, chosen = shard.local, popcount(packed)
    plane = Plane(on(local.device, packed), "factor", "rest")
    sparse = by_index and chosen <= _DENSE * local.numel() and local.numel() < 1 << 31
    if not sparse or local.device.type != "cpu" or not has_values(local) or not local.is_contiguous():
        return CellBits(plane, chosen)
    positions = np.flatnonzero(unpack(packed, local.numel()).numpy()).astype(np.int32)
    return CellBits(plane, chosen, torch.from_numpy(positions))


@dataclass
class Entry:
    """One shard of the table.

    Attributes:
        shard: the shard.
        bits: the bits of its cells.
        flat: its values, flat; None if its memory has another layout.
        old: what was saved before the step.
        indexed: whether only fundamental cells were saved.
    """

    shard: Shard
    bits: CellBits
    flat: Tensor | None
    old: Tensor | None = None
    indexed: bool = False


class ShardTable:
    """The penalised shards that one optimizer steps, in model order."""

    def __init__(self, shards: Sequence[Shard], bits: Mapping[str, CellBits], multipliers: Multipliers) -> None:
        """
        Args:
            shards: the shards.
            bits: their bits, by name.
            multipliers: the numbers.
        """
        self._multipliers = multipliers
        self.entries = [Entry(s, bits[s.name], _flat(s.local)) for s in shards]
        self._tables: dict[tuple[int, ...], AddressTable | None] = {}  # numbers of the entries -> their table
        self._saving: AddressTable | None = None

    def move(self, shards: Mapping[str, Shard]) -> None:
        """Notes where the shards are now; what was saved stays valid."""
        for entry in self.entries:
            entry.shard = shards[entry.shard.name]
            entry.flat = _flat(entry.shard.local)
        for numbers, table in self._tables.items():
            if table is not None:
                flats = [flat for number in numbers if (flat := self.entries[number].flat) is not None]
                if len(flats) < len(numbers):
                    raise PenaltyError(
                        "the optimizer has put tensors with gaps into the parameters, which kernels cannot read"
                    )
                table.move(flats)

    def with_gradient(self) -> tuple[list[int], list[Tensor]]:
        """Numbers of the entries that have a gradient, and their gradients on this rank."""
        found = gradients_of(map(_shard, self.entries))
        numbers = [number for number, gradient in enumerate(found) if gradient is not None]
        return numbers, [gradient for gradient in found if gradient is not None]

    def scale(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Multiplies the reduced gradients of these entries, in place."""
        if overlap(gradients):
            gradients = self._apart(numbers, gradients)
        table = self._table(numbers)
        if table is not None and not self._multipliers.watch and usable(gradients):
            table.scale(gradients)
            return
        jobs, copies = list[Job](), list[tuple[Tensor, Tensor]]()
        for number, gradient in zip(numbers, gradients, strict=True):
            flat = gradient.detach().contiguous().view(-1)
            jobs.append((flat, self.entries[number].bits.plane, flat, None))
            if not gradient.is_contiguous():
                copies.append((gradient, flat))
        self._multipliers.multiply(jobs)
        for gradient, flat in copies:
            gradient.detach().copy_(flat.view(gradient.shape))

    def _apart(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gives weights whole gradients of their own, where autograd lets several share one."""
        copies = []
        for number, gradient in zip(numbers, gradients, strict=True):
            parameter = self.entries[number].shard.parameter
            copies.append(gradient.clone() if parameter.grad is gradient else gradient)
            if parameter.grad is gradient:
                parameter.grad = copies[-1]
        return copies

    def save(self, numbers: Sequence[int], whole: bool) -> None:
        """Notes the weights of these entries before the step, as far as they are needed after it.

        Args:
            numbers: the entries.
            whole: whether `shorten` will be asked for the proposal.
        """
        table = self._table(numbers)
        self._saving = table if table and not whole and (table.packed or not self._multipliers.watch) else None
        if self._saving is not None:
            self._saving.save()
            return
        for number in numbers:
            entry = self.entries[number]
            entry.indexed = entry.bits.index is not None and entry.flat is not None
            if entry.bits.index is not None and entry.flat is not None:
                entry.old = entry.flat.index_select(0, entry.bits.index)
            else:
                entry.old = entry.shard.local.detach().clone()

    def shorten(self, numbers: Sequence[int], proposal: dict[str, Tensor] | None) -> None:
        """Shortens the step of the entries that were saved.

        The result is exactly the old weight where the multiplier is 0 (-0 may become 0), and exactly the new one where it
        is 1.

        Args:
            numbers: the entries.
            proposal: gets the proposed step of each weight, with zeros where it is not fundamental; None: not wanted.
        """
        if self._saving is not None:
            self._saving.shorten()
            return
        multipliers, factors, lerp = self._multipliers, dict[torch.dtype, Tensor](), torch.lerp
        for number in numbers:  # calls no function of Python for the usual entry
            entry = self.entries[number]
            old, index, flat, entry.old = entry.old, entry.bits.index, entry.flat, None
            if old is None:
                raise PenaltyError(f"{entry.shard.name} was not saved before the step")
            if index is None or not entry.indexed:
                self._shorten_whole(entry, old, proposal)
                continue
            local = entry.shard.local
            if flat is None:  # the optimizer has put a tensor there that has another order in memory
                flat = local.detach().contiguous().view(-1)
            if flat.dtype not in factors:
                factors[flat.dtype] = multipliers.number("factor", flat)
            new, positions = flat.index_select(0, index), index.long()
            shortened = lerp(old, new, factors[flat.dtype])
            if proposal is not None:
                proposal[entry.shard.name] = torch.zeros_like(flat).index_copy_(0, positions, new - old)
            if multipliers.watch:
                multipliers.add_squares(new.double() - old.double(), shortened.double() - old.double())
            flat.index_copy_(0, positions, shortened)
            if entry.flat is None:
                local.detach().copy_(flat.view(local.shape))

    def _shorten_whole(self, entry: Entry, old: Tensor, proposal: dict[str, Tensor] | None) -> None:
        local, plane = entry.shard.local.detach(), entry.bits.plane
        start, new = old.contiguous().view(-1), local.contiguous().view(-1)
        if proposal is not None:
            proposal[entry.shard.name] = _only_chosen(plane, new - start)
        self._multipliers.multiply([(new, plane, new, start)])
        if not local.is_contiguous():
            local.copy_(new.view(local.shape))

    def _table(self, numbers: Sequence[int]) -> AddressTable | None:
        """The addresses of these entries, where kernels can use them."""
        key = tuple(numbers)
        if key not in self._tables:
            if is_capturing():  # a table cannot be built now
                return None
            if len(self._tables) > _KEPT:
                self._tables.clear()
            entries = [self.entries[number] for number in numbers]
            flats = [entry.flat for entry in entries if entry.flat is not None]
            planes = [(entry.bits.plane, entry.bits.chosen) for entry in entries]
            fits = len(flats) == len(entries) and usable(flats)
            self._tables[key] = AddressTable(flats, planes, self._multipliers) if fits else None
        return self._tables[key]


_shard = attrgetter("shard")


def _flat(local: Tensor) -> Tensor | None:
    return local.detach().view(-1) if local.is_contiguous() else None


def _only_chosen(plane: Plane, values: Tensor) -> Tensor:
    """The values of fundamental cells, and zero elsewhere; flat."""
    if not isinstance(plane.octets, Tensor):
        return torch.zeros_like(values)
    return torch.where(unpacked(plane.octets)[: values.numel()].to(values.device), values, 0.0)
