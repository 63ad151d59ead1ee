"""One multiplier per weight, stored as one bit: applies the penalty to gradients and to steps.

A byte of eight bits indexes a table of 256 x 8 multipliers. A new factor therefore rebuilds only these 2,048 numbers. Bits
are unpacked one chunk at a time. Products are computed in float32 (float64 for float64 tensors) and rounded once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..distributed import collectives
from .bits import Packed, num_bytes, step_of


class Multipliers:
    """The multipliers of all penalised weights.

    Attributes:
        bits: name -> the packed bits that this rank stores, or None for an unscored weight.
        factor: multiplier of fundamental weights.
        rest: multiplier of the other eligible weights.
        unscored: multiplier of unscored weights.
        watch: True: sum up `proposed` and `applied`.
        proposed, applied: sums of squares over the fundamental weights, before and after multiplying.
    """

    def __init__(
        self, bits: Mapping[str, Packed | None], device: torch.device, rest: float, unscored: float, shared: bool = False
    ) -> None:
        """Moves the bits to the device; the factor is 1 until `set_factor`.

        Args:
            bits: name -> packed bits of the cells to multiply (with `shared`: of the whole weight); None if unscored.
            device: where the bits are stored.
            rest: multiplier of eligible weights that are not fundamental.
            unscored: multiplier of unscored weights.
            shared: True: each rank stores an equal part of each weight's bits. All ranks gather them when they are needed,
                and must need them in the same order.
        """
        self.bits = {
            n: None if b is None else torch.from_numpy(_part(b) if shared else b).to(device) for n, b in bits.items()
        }
        self._shared = shared
        self.factor, self.rest, self.unscored = 1.0, rest, unscored
        self.watch = False
        self.proposed: Tensor | float = 0.0
        self.applied: Tensor | float = 0.0
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def set_factor(self, factor: float) -> None:
        """Changes the multiplier of fundamental weights."""
        self.factor = factor
        self._tables.clear()

    def scale(self, name: str, gradient: Tensor) -> None:
        """gradient <- m * gradient, in place, m being the multipliers of the weight."""
        with _as_flat(gradient) as flat:
            self.scale_into(name, flat, flat)

    def scale_into(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """out <- m * gradient; both are flat, and `out` may be `gradient`."""
        octets = self._octets(name)
        if octets is not None and not self.watch and _fused(gradient, octets):
            from . import kernels  # late: needs Triton

            kernels.scale(gradient, octets, self.factor, self.rest, out)
            return
        parts = zip(out.split(step_of(out.device)), self._parts(octets, gradient), strict=True)
        for target, (part, m, chosen) in parts:
            self._watched(part, None, chosen, "proposed")
            torch.mul(part, m, out=target)
            self._watched(target, None, chosen, "applied")

    def shorten(self, name: str, old: Tensor, new: Tensor) -> None:
        """new <- old + m * (new - old), in place.

        The result is exactly `old` where m is 0 (-0 may become 0), and exactly `new` where m is 1.
        """
        starts, octets = old.contiguous().view(-1), self._octets(name)
        with _as_flat(new) as flat:
            if octets is not None and not self.watch and _fused(flat, octets):
                from . import kernels  # late: needs Triton

                kernels.shorten(starts, octets, self.factor, self.rest, flat)
                return
            parts = zip(starts.split(step_of(old.device)), self._parts(octets, flat), strict=True)
            for start, (part, m, chosen) in parts:
                self._watched(part, start, chosen, "proposed")
                torch.lerp(start, part, m, out=part)
                self._watched(part, start, chosen, "applied")

    def only_chosen(self, name: str, values: Tensor) -> Tensor:
        """The values of fundamental cells, and zero elsewhere; flat, except for unscored weights."""
        octets = self.bits[name]
        if octets is None:
            return torch.zeros_like(values)
        return torch.where(_unpacked(octets)[: values.numel()].to(values.device), values.reshape(-1), 0.0)

    def _octets(self, name: str) -> Tensor | None:
        """The packed bits of a weight; collective if they are shared."""
        own = self.bits[name]
        return collectives.all_gather_equal(own, what=f"bits of {name}") if self._shared and own is not None else own

    def _parts(self, octets: Tensor | None, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yields pieces of a tensor with their multipliers and, if `watch` is on, their masks of fundamental cells."""
        end = 0
        for part in flat.split(step_of(flat.device)):
            begin, end = end, end + part.numel()
            if octets is None:
                yield part, torch.full((), self.unscored, dtype=_wide(part), device=part.device), None
            else:
                rows = octets[begin // 8 : num_bytes(end)].to(part.device)
                m = _rows(self._table(_wide(part), part.device), rows).view(-1)[: part.numel()]
                yield part, m, _unpacked(rows)[: part.numel()] if self.watch else None

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The multipliers of every value of a byte, [256, 8]."""
        if (dtype, device) not in self._tables:
            octet = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
            values = torch.tensor([self.rest, self.factor], dtype=torch.float64)
            self._tables[dtype, device] = values[octet].to(device=device, dtype=dtype)
        return self._tables[dtype, device]

    def _watched(self, part: Tensor, start: Tensor | None, chosen: Tensor | None, total: str) -> None:
        """Adds the squares of the fundamental cells of `part` (minus `start`) to the attribute named `total`."""
        if chosen is not None:
            moved = part.double() if start is None else part.double() - start.double()
            # On a GPU, indexing or reading a number would wait for the device, once per weight.
            fundamental = torch.where(chosen, moved, 0.0) if moved.is_cuda else moved[chosen]
            setattr(self, total, getattr(self, total) + fundamental.square().sum())


def _part(packed: Packed) -> Packed:
    """This rank's part of the bits: one equal part per rank, the last ones padded with zeros."""
    size = -(-len(packed) // collectives.world_size())
    mine = packed[collectives.rank() * size :][:size]
    return np.concatenate([mine, np.zeros(size - len(mine), np.uint8)])


def _fused(flat: Tensor, octets: Tensor) -> bool:
    """Whether the Triton kernels can be used. If weights are offloaded, the bits may be on the CPU."""
    on_one_gpu = flat.is_cuda and octets.device == flat.device
    return on_one_gpu and type(flat) is Tensor and flat.dtype != torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _unpacked(octets: Tensor) -> Tensor:
    """The bits as a flat boolean tensor."""
    bit_positions = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return ((octets.unsqueeze(1) >> bit_positions) & 1).view(-1).bool()


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """The multipliers of the packed bits `rows`, from a table that `_table` returned."""
    if table.device.type == "cpu" and type(table) is Tensor:  # numpy copies short rows faster than torch
        return torch.from_numpy(table.numpy().take(rows.numpy(), axis=0, mode="clip"))
    return torch.where(_unpacked(rows), table[255, 0], table[0, 0])  # a GPU is slow to gather short rows


def _wide(tensor: Tensor) -> torch.dtype:
    """The type to compute products in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def _as_flat(tensor: Tensor) -> Iterator[Tensor]:
    """A flat row-major view to change in place. If the memory has another layout: a copy, which is written back."""
    flat = tensor.detach().contiguous().view(-1)
    yield flat
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))
