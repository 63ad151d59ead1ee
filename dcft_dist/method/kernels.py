"""The two products of `multiplier` as Triton kernels, which read packed bits where the torch path unpacks them first.

Imported on GPUs with Triton alone (torch's CUDA builds bring it). Each is one pass over the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # cells of one program


def scale(gradient: Tensor, octets: Tensor, factor: float, rest: float, out: Tensor) -> None:
    """out <- m * gradient, m being `factor` where the bit is set and `rest` elsewhere; flat, computed in float32."""
    _scale[_grid(out)](gradient, octets, out, out.numel(), factor, rest, BLOCK=BLOCK)


def shorten(start: Tensor, octets: Tensor, factor: float, rest: float, new: Tensor) -> None:
    """new <- start + m * (new - start), flat, float32, in place: exactly `start` where m is 0, `new` where it is 1."""
    _shorten[_grid(new)](start, octets, new, new.numel(), factor, rest, BLOCK=BLOCK)


def _grid(cells: Tensor) -> tuple[int]:
    return (triton.cdiv(cells.numel(), BLOCK),)


# Without annotations: Triton looks up their names as it compiles, and finds only its own.


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
    # As torch.lerp: from the nearer end, so that both ends are exact.
    value = tl.where(m < 0.5, old + m * (new - old), new - (new - old) * (1.0 - m))
    tl.store(target + cells, value, mask=inside)
