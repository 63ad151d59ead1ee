"""The two operations of `Multipliers` as Triton kernels, for GPUs.

A kernel reads the packed bits directly, in one pass over the weights. The torch code unpacks them first. Only code that runs
on a GPU with Triton imports this module; torch's CUDA builds include Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # cells per program


def scale(gradient: Tensor, octets: Tensor, factor: float, rest: float, out: Tensor) -> None:
    """out <- m * gradient, where m is `factor` if the bit is set and `rest` if not.

    Args:
        gradient: flat, float32 or a shorter floating-point type.
        octets: packed bits, uint8 [ceil(numel / 8)].
        factor: multiplier of fundamental weights.
        rest: multiplier of the other weights.
        out: flat, of the size of `gradient`; may be `gradient`. Products are computed in float32 and rounded once.
    """
    _scale[_grid(out)](gradient, octets, out, out.numel(), factor, rest, BLOCK=BLOCK)


def shorten(start: Tensor, octets: Tensor, factor: float, rest: float, new: Tensor) -> None:
    """new <- start + m * (new - start), in place: exactly `start` where m is 0, exactly `new` where m is 1.

    Args:
        start: flat float32 weights before the step.
        octets: packed bits, uint8 [ceil(numel / 8)].
        factor: m where the bit is set (fundamental weights).
        rest: m where it is not.
        new: flat float32 weights after the step, changed in place.
    """
    _shorten[_grid(new)](start, octets, new, new.numel(), factor, rest, BLOCK=BLOCK)


def _grid(cells: Tensor) -> tuple[int]:
    return (triton.cdiv(cells.numel(), BLOCK),)


# The kernels have no annotations: Triton would look up their names while compiling, and knows only its own.


@triton.jit
def _multipliers(octets, cells, inside, factor, rest):
    octet = tl.load(octets + cells // 8, mask=inside, other=0).to(tl.int32)
    return tl.where((octet >> (cells % 8).to(tl.int32)) & 1 == 1, factor, rest)


@triton.jit
def _scale(source, octets, target, numel, factor, rest, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < numel
    m = _multipliers(octets, cells, inside, factor, rest)
    value = tl.load(source + cells, mask=inside, other=0).to(tl.float32)
    tl.store(target + cells, (m * value).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _shorten(source, octets, target, numel, factor, rest, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < numel
    m = _multipliers(octets, cells, inside, factor, rest)
    old = tl.load(source + cells, mask=inside, other=0)
    new = tl.load(target + cells, mask=inside, other=0)
    # Like torch.lerp, start from the nearer end, so that both ends are exact.
    value = tl.where(m < 0.5, old + m * (new - old), new - (new - old) * (1.0 - m))
    tl.store(target + cells, value, mask=inside)
