"""The numbers that gradients and steps are multiplied by, and the multiplication of flat tensors by them.

A weight has one bit, so a byte of eight bits indexes a table of 256 x 8 multipliers. Bits are unpacked one chunk at a time.
Products are computed in float32 (float64 for float64 tensors) and rounded once. On a GPU a kernel reads bits and numbers
directly. A new factor is written into the same memory, so a captured CUDA graph sees it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compat.pytorch import has_values
from ..distributed.gathered import Gathered
from .bits import STEP, Packed, step_of

Number = Literal["factor", "rest", "unscored", "one"]  # which number a cell is multiplied by


_NUMBERS: tuple[Number, ...] = ("factor", "rest", "unscored", "one")


@dataclass(frozen=True)
class Plane:
    """The bits of one flat tensor, and what they stand for.

    Attributes:
        octets: packed bits, uint8 [ceil(numel / 8)], whole or spread over the ranks; None: every bit is set.
        high: the number where the bit is set.
        low: the number where it is not.
    """

    octets: Tensor | Gathered | None
    high: Number
    low: Number

    @property
    def num_bytes(self) -> int:
        """Memory of the bits on this rank."""
        mine = self.octets.mine if isinstance(self.octets, Gathered) else self.octets
        return mine.numel() if mine is not None else 0


# (source, plane, target, start), all flat: target <- m * source; with `start`: target <- start + m * (source - start).
# The target may be the source.
Job = tuple[Tensor, Plane, Tensor, Tensor | None]


class Multipliers:
    """The factor and the other multipliers of one penalty.

    Attributes:
        factor: multiplier of fundamental weights.
        rest: multiplier of the other eligible weights.
        unscored: multiplier of unscored weights.
        one: 1.
        watch: True: sum up `proposed` and `applied`.
        proposed, applied: sums of squares over the fundamental weights, before and after multiplying.
    """

    def __init__(self, factor: float, rest: float, unscored: float) -> None:
        """
        Args:
            factor: multiplier of fundamental weights.
            rest: multiplier of eligible weights that are not fundamental.
            unscored: multiplier of unscored weights.
        """
        self.factor, self.rest, self.unscored, self.one = factor, rest, unscored, 1.0
        self.watch = False
        self.proposed: Tensor | float = 0.0
        self.applied: Tensor | float = 0.0
        self._tables: dict[tuple[Number, Number, torch.dtype], NDArray[Any]] = {}
        self._numbers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def set_factor(self, factor: float) -> None:
        """Changes the multiplier of fundamental weights, in the memory that kernels read."""
        self.factor = factor
        for numbers in self._numbers.values():
            numbers[0].fill_(factor)
        self._tables.clear()

    def numbers(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Factor, rest, unscored and one, [4], on a device; always the same tensor."""
        if (dtype, device) not in self._numbers:
            values = [getattr(self, name) for name in _NUMBERS]
            self._numbers[dtype, device] = torch.tensor(values, dtype=dtype, device=device)
        return self._numbers[dtype, device]

    def number(self, name: Number, like: Tensor) -> Tensor:
        """One of the numbers, as a tensor without dimensions, in the type to compute in."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.numbers(wide, like.device)[_NUMBERS.index(name)]

    def multiply(self, jobs: Iterable[Job]) -> None:
        """Multiplies flat tensors, or shortens steps. Collective where bits are spread over the ranks.

        On a CPU the loop itself does all: a call for each of hundreds of weights would cost as much as their arithmetic.
        """
        tables, step = self._tables, STEP["cpu"]
        for source, plane, target, start in jobs:
            octets = plane.octets
            if (
                type(octets) is not Tensor
                or type(target) is not Tensor
                or target.is_cuda
                or (self.watch and octets is not None)
            ):
                self._elsewhere(source, plane, target, start)
                continue
            key = plane.high, plane.low, target.dtype
            if key not in tables:
                tables[key] = self._table(*key)
            table, rows, numel = tables[key], octets.numpy(), target.numel()
            if numel <= step:
                m = torch.from_numpy(table.take(rows, axis=0, mode="clip")).view(-1)[:numel]
                torch.mul(source, m, out=target) if start is None else torch.lerp(start, source, m, out=target)
                continue
            for begin in range(0, numel, step):
                end = min(begin + step, numel)
                # numpy copies short rows faster than torch.
                m = torch.from_numpy(table.take(rows[begin // 8 : (end + 7) // 8], axis=0, mode="clip")).view(-1)
                part, out = source[begin:end], target[begin:end]
                if start is None:
                    torch.mul(part, m[: end - begin], out=out)
                else:
                    torch.lerp(start[begin:end], part, m[: end - begin], out=out)

    def _elsewhere(self, source: Tensor, plane: Plane, target: Tensor, start: Tensor | None) -> None:
        """Does a job on a GPU, with numbers to watch, with bits that are spread over the ranks, or without bits."""
        if isinstance(plane.octets, Gathered):
            self.multiply([(source, Plane(plane.octets.whole(), plane.high, plane.low), target, start)])
        elif plane.octets is None:
            number = self.number(plane.high, target)
            torch.mul(source, number, out=target) if start is None else torch.lerp(start, source, number, out=target)
        elif not self._is_watched(plane) and is_fused(target, plane.octets):
            self._launch(source, plane, plane.octets, target, start)
        elif has_values(target):
            self._by_chunks(source, plane, plane.octets, target, start)

    def _is_watched(self, plane: Plane) -> bool:
        return self.watch and plane.high == "factor"

    def _launch(self, source: Tensor, plane: Plane, octets: Tensor, target: Tensor, start: Tensor | None) -> None:
        from . import kernels  # late: needs Triton

        numbers = self.numbers(torch.float32, target.device)
        high, low = _NUMBERS.index(plane.high), _NUMBERS.index(plane.low)
        if start is None:
            kernels.scale(source, octets, numbers, high, low, target)
        else:
            kernels.shorten(start, octets, numbers, high, low, target)

    def _by_chunks(self, source: Tensor, plane: Plane, octets: Tensor, target: Tensor, start: Tensor | None) -> None:
        """Unpacks the bits of a chunk, since a GPU is slow to gather short rows."""
        numel, step, watched = target.numel(), step_of(target.device), self._is_watched(plane)
        high, low = self.number(plane.high, target), self.number(plane.low, target)
        for begin in range(0, numel, step):
            end = min(begin + step, numel)
            chosen = unpacked(octets[begin // 8 : (end + 7) // 8].to(target.device))[: end - begin]
            part, out = source[begin:end], target[begin:end]
            first = start[begin:end] if start is not None else None
            if watched:  # indexing would wait for the device
                self.add_squares(torch.where(chosen, _moved(part, first), 0.0), None)
            m = torch.where(chosen, high, low)
            torch.mul(part, m, out=out) if first is None else torch.lerp(first, part, m, out=out)
            if watched:
                self.add_squares(None, torch.where(chosen, _moved(out, first), 0.0))

    def add_squares(self, proposed: Tensor | None, applied: Tensor | None) -> None:
        """Adds the squares of steps or gradients of fundamental cells to the sums."""
        if proposed is not None:
            self.proposed = self.proposed + proposed.double().square().sum()
        if applied is not None:
            self.applied = self.applied + applied.double().square().sum()

    def _table(self, high: Number, low: Number, dtype: torch.dtype) -> NDArray[Any]:
        """The multipliers of every value of a byte, [256, 8], for tensors of this type."""
        octet = (np.arange(256)[:, None] >> np.arange(8)) & 1
        values = np.array([getattr(self, low), getattr(self, high)], np.float64 if dtype == torch.float64 else np.float32)
        table: NDArray[Any] = values[octet]
        return table


def is_fused(flat: Tensor, octets: Tensor) -> bool:
    """Whether the Triton kernels can be used. If weights are offloaded, the bits may be on the CPU."""
    on_one_gpu = flat.is_cuda and octets.device == flat.device
    return on_one_gpu and type(flat) is Tensor and flat.dtype != torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def unpacked(octets: Tensor) -> Tensor:
    """The bits as a flat boolean tensor."""
    bit_positions = torch.arange(8, dtype=torch.uint8, device=octets.device)
    return ((octets.unsqueeze(1) >> bit_positions) & 1).view(-1).bool()


def on(device: torch.device, packed: Packed) -> Tensor:
    """Packed bits on a device."""
    return torch.from_numpy(np.ascontiguousarray(packed)).to(device)


def _moved(values: Tensor, start: Tensor | None) -> Tensor:
    """The values, or how far they are from `start`; in float64."""
    return values.double() if start is None else values.double() - start.double()
