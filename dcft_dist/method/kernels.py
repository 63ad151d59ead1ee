"""The operations of `Multipliers` and `AddressTable` as Triton kernels, for GPUs.

A kernel reads the packed bits directly, in one pass over the weights. The torch code unpacks them first. The numbers are
read from memory, so a captured CUDA graph goes on with a new factor. Only code that runs on a GPU with Triton imports this
module; torch's CUDA builds include Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bits import BLOCK, Blocks, ScoreBlocks

PROGRAMS = 1024  # of a kernel that keeps its counts in registers


def scale(gradient: Tensor, octets: Tensor, numbers: Tensor, high: int, low: int, out: Tensor) -> None:
    """out <- m * gradient, where m is one of the numbers.

    Args:
        gradient: flat, float32 or a shorter floating-point type.
        octets: packed bits, uint8 [ceil(numel / 8)].
        numbers: float32.
        high: position of m among the numbers where the bit is set (fundamental weights).
        low: the same where it is not.
        out: flat, of the size of `gradient`; may be `gradient`. Products are computed in float32 and rounded once.
    """
    _scale[_grid(out)](gradient, octets, out, out.numel(), numbers, high, low, BLOCK=BLOCK)


def shorten(start: Tensor, octets: Tensor, numbers: Tensor, high: int, low: int, new: Tensor) -> None:
    """new <- start + m * (new - start), in place: exactly `start` where m is 0, exactly `new` where m is 1.

    Args:
        start: flat float32 weights before the step.
        octets, numbers, high, low: as for `scale`.
        new: flat float32 weights after the step, changed in place.
    """
    _shorten[_grid(new)](start, octets, new, new.numel(), numbers, high, low, BLOCK=BLOCK)


def scale_many(blocks: Blocks, numbers: Tensor) -> None:
    """Multiplies the tensors of a table by factor, rest or unscored, in place.

    Args:
        blocks: the tensors, float32.
        numbers: factor, rest and unscored, float32.
    """
    _scale_many[(blocks[3].numel(),)](*blocks, numbers, BLOCK=BLOCK)


def save_many(blocks: Blocks, saved_at: Tensor, copy: Tensor, packed: bool) -> None:
    """Copies the tensors of a table one after the other.

    Args:
        blocks: the tensors, float32.
        saved_at: where the cells of each block begin in the copy.
        copy: flat float32.
        packed: True: only cells with a bit are copied, without gaps.
    """
    _save_many[(blocks[3].numel(),)](*blocks, saved_at, copy, PACKED=packed, BLOCK=BLOCK)


def shorten_many(blocks: Blocks, numbers: Tensor, saved_at: Tensor, copy: Tensor, packed: bool) -> None:
    """Shortens the steps of the tensors of a table since `save_many`, in place.

    Args:
        blocks, saved_at, copy, packed: as for `save_many`.
        numbers: as for `scale_many`.
    """
    _shorten_many[(blocks[3].numel(),)](*blocks, numbers, saved_at, copy, PACKED=packed, BLOCK=BLOCK)


def count_digits(blocks: ScoreBlocks, prefix: Tensor, counts: Tensor, shift: int, bits: int) -> None:
    """Adds a histogram of one digit of the keys of scores.

    Args:
        blocks: the scores, float32.
        prefix: int64 [1]; only keys that begin with these digits count, if `shift + bits < 32`.
        counts: int64 [2048], in place.
        shift, bits: the digit is `(key >> shift) % 2^bits`.
    """
    programs = min(blocks[2].numel(), PROGRAMS)
    _count_digits[(programs,)](*blocks, blocks[2].numel(), prefix, counts, SHIFT=shift, BITS=bits, BLOCK=BLOCK)


def pack_above(
    blocks: ScoreBlocks, places: Tensor, key: Tensor, octets: Tensor, counts: Tensor, ties: Tensor | None
) -> None:
    """Packs the bits of scores with at least a certain key, and lists those that have just this key.

    Args:
        blocks: the scores, float32.
        places: where the octets of each block begin, int64.
        key: int64 [1].
        octets: packed bits, uint8, in place.
        counts: int64 [shards]: how many bits are set is added, in place.
        ties: int64, zeros [1 + scores that have the key]: their number, and their positions among the packed bits, in any
            order; None: they are not listed.
    """
    listed = ties is not None
    _pack_above[(blocks[2].numel(),)](
        *blocks, places, key, octets, counts, counts if ties is None else ties, LISTED=listed, BLOCK=BLOCK
    )


def _grid(cells: Tensor) -> tuple[int]:
    return (triton.cdiv(cells.numel(), BLOCK),)


# The kernels have no annotations: Triton would look up their names while compiling, and knows only its own.


@triton.jit
def _bits(octets, cells, inside):
    octet = tl.load(octets + cells // 8, mask=inside, other=0).to(tl.int32)
    return (octet >> (cells % 8).to(tl.int32)) & 1


@triton.jit
def _between(old, new, m):
    # Like torch.lerp, start from the nearer end, so that both ends are exact.
    return tl.where(m < 0.5, old + m * (new - old), new - (new - old) * (1.0 - m))


@triton.jit
def _scale(source, octets, target, numel, numbers, high, low, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < numel
    m = tl.where(_bits(octets, cells, inside) == 1, tl.load(numbers + high), tl.load(numbers + low))
    value = tl.load(source + cells, mask=inside, other=0).to(tl.float32)
    tl.store(target + cells, (m * value).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _shorten(source, octets, target, numel, numbers, high, low, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < numel
    m = tl.where(_bits(octets, cells, inside) == 1, tl.load(numbers + high), tl.load(numbers + low))
    old = tl.load(source + cells, mask=inside, other=0)
    new = tl.load(target + cells, mask=inside, other=0)
    tl.store(target + cells, _between(old, new, m), mask=inside)


@triton.jit
def _block(addresses, octets, sizes, block_entry, block_first, BLOCK: tl.constexpr):
    """Tensor, cells, mask of the cells inside, whether the weight is scored, and bits of one block."""
    block = tl.program_id(0)
    entry = tl.load(block_entry + block)
    cells = tl.load(block_first + block) + tl.arange(0, BLOCK)
    size = tl.load(sizes + entry)
    inside = cells < size
    tensor = tl.load(addresses + entry).to(tl.pointer_type(tl.float32))
    at = tl.load(octets + entry)
    scored = at != 0
    bits = _bits(at.to(tl.pointer_type(tl.uint8)), cells, cells < tl.where(scored, size, 0))
    return tensor, cells, inside, scored, bits


@triton.jit
def _numbers(numbers, scored, bits):
    low = tl.where(scored, tl.load(numbers + 1), tl.load(numbers + 2))
    return tl.where(bits == 1, tl.load(numbers), low)


@triton.jit
def _saved(inside, bits, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Which cells of a block are saved, and where, counted from the block's first place."""
    if PACKED:
        wanted = inside & (bits == 1)
        place = tl.cumsum(bits, 0) - bits
    else:
        wanted = inside
        place = tl.arange(0, BLOCK)
    return wanted, place


@triton.jit
def _scale_many(addresses, octets, sizes, block_entry, block_first, numbers, BLOCK: tl.constexpr):
    tensor, cells, inside, scored, bits = _block(addresses, octets, sizes, block_entry, block_first, BLOCK)
    m = _numbers(numbers, scored, bits)
    value = tl.load(tensor + cells, mask=inside, other=0)
    tl.store(tensor + cells, m * value, mask=inside)


@triton.jit
def _save_many(
    addresses, octets, sizes, block_entry, block_first, saved_at, copy, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, cells, inside, _scored, bits = _block(addresses, octets, sizes, block_entry, block_first, BLOCK)
    first = tl.load(saved_at + tl.program_id(0))
    wanted, place = _saved(inside, bits, PACKED, BLOCK)
    tl.store(copy + first + place, tl.load(tensor + cells, mask=wanted, other=0), mask=wanted)


@triton.jit
def _shorten_many(
    addresses,
    octets,
    sizes,
    block_entry,
    block_first,
    numbers,
    saved_at,
    copy,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, cells, inside, scored, bits = _block(addresses, octets, sizes, block_entry, block_first, BLOCK)
    first = tl.load(saved_at + tl.program_id(0))
    wanted, place = _saved(inside, bits, PACKED, BLOCK)
    old = tl.load(copy + first + place, mask=wanted, other=0)
    new = tl.load(tensor + cells, mask=wanted, other=0)
    tl.store(tensor + cells, _between(old, new, _numbers(numbers, scored, bits)), mask=wanted)


@triton.jit
def _scores(addresses, sizes, block_entry, block_first, block, BLOCK: tl.constexpr):
    """Keys of the scores of one block, which sort as the scores do; mask of the cells inside; number of the shard."""
    entry = tl.load(block_entry + block)
    cells = tl.load(block_first + block) + tl.arange(0, BLOCK)
    inside = cells < tl.load(sizes + entry)
    scores = tl.load(tl.load(addresses + entry).to(tl.pointer_type(tl.float32)) + cells, mask=inside, other=0)
    bits = tl.where(scores == 0, 0.0, scores).to(tl.uint32, bitcast=True)  # -0 is 0
    key = tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF).to(tl.int64)
    return key, inside, entry


@triton.jit
def _count_digits(
    addresses,
    sizes,
    block_entry,
    block_first,
    num_blocks,
    prefix,
    counts,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wanted = tl.load(prefix)
    total = tl.zeros((2048,), dtype=tl.int32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        key, inside, _entry = _scores(addresses, sizes, block_entry, block_first, block, BLOCK)
        if SHIFT + BITS < 32:
            inside = inside & ((key >> (SHIFT + BITS)) == wanted)
        digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        total += tl.histogram(digit, 2048, mask=inside)
    tl.atomic_add(counts + tl.arange(0, 2048), total.to(tl.int64))


@triton.jit
def _pack_above(
    addresses,
    sizes,
    block_entry,
    block_first,
    places,
    key,
    octets,
    counts,
    ties,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    keys, inside, entry = _scores(addresses, sizes, block_entry, block_first, block, BLOCK)
    chosen = (inside & (keys >= tl.load(key))).to(tl.int32)
    rows = tl.reshape(chosen, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    packed = tl.sum(rows, 1)
    number = tl.sum(inside.to(tl.int32), 0)
    octet = tl.arange(0, BLOCK // 8)
    place = tl.load(places + block)
    tl.store(octets + place + octet, packed.to(tl.uint8), mask=octet < (number + 7) // 8)
    if LISTED:
        equal = inside & (keys == tl.load(key))
        found = equal.to(tl.int64)
        first = tl.atomic_add(ties, tl.sum(found, 0))
        tl.store(ties + first + tl.cumsum(found, 0), place * 8 + tl.arange(0, BLOCK), mask=equal)
    tl.atomic_add(counts + entry, tl.sum(chosen, 0).to(tl.int64))
