"""Optimal brain surgeon on a block-diagonal empirical Fisher matrix: the criterion of the public code of DCFT.

With g_1..g_m the gradients of m score batches, B consecutive weights of a tensor a block, and damping d, the Fisher matrix
of a block is F = d I + 1/m sum_b g_b g_b^T. Removing weight w_i and moving the others of its block to the best
place raises the loss by w_i^2 / (2 [F^-1]_ii) (Hassibi and Stork 1993; in blocks: Kurtic et al. 2022, "The Optimal BERT
Surgeon"). The diagonal of the inverse comes from Woodbury's identity, in float64, with an m x m matrix a block:

    [F^-1]_ii = 1/d (1 - sum_bc G_bi [(d m I + G G^T)^-1]_bc G_ci)

Takes 4 m bytes for each weight that is at work; where that is more than `limit_bytes`, the batches are gone through again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..distributed import collectives
from ..engines.base import Shard
from ..errors import EngineError

Gradients = Callable[[], Iterator[dict[str, Tensor]]]  # one dictionary a score batch: flat local gradients by name


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of one weight: local elements `begin:end`, of which `owned` (counted from `begin`) are to be scored."""

    name: str
    begin: int
    end: int
    owned: tuple[int, int]


def blocks_of(shard: Shard, block: int, most: int) -> Iterator[Blocks]:
    """The blocks that this rank's owned part of a weight touches, in pieces of at most `most` elements (at least a block).

    Raises:
        EngineError: a block is not whole on this rank.
    """
    start, numel = shard.box.first, prod(shard.box.grid)
    if shard.owned[0] == shard.owned[1]:
        return
    if start is None:
        raise EngineError(f"{shard.name}: this rank's part is no range of rows, so its blocks are not whole (criterion obs)")
    first = (start + shard.owned[0]) // block * block - start
    last = min(-(-(start + shard.owned[1]) // block) * block, numel) - start
    if first < 0 or last > shard.local.numel():
        raise EngineError(
            f"{shard.name}: blocks of {block} weights are cut by the sharding; take a block that divides the rows, or DDP"
        )
    step = max(most // block, 1) * block
    for begin in range(first, last, step):
        end = min(begin + step, last)
        yield Blocks(shard.name, begin, end, (max(shard.owned[0] - begin, 0), min(shard.owned[1], end) - begin))


def score_blocks(
    shards: dict[str, Shard],
    values: dict[str, Tensor],
    gradients: Gradients,
    num_batches: int,
    *,
    block: int,
    damping: float,
    limit_bytes: int,
    num_passes: Callable[[int], int],
) -> None:
    """Fills `values` (flat, owned part, by name). `num_passes` makes ranks agree: own count -> the largest."""
    most = limit_bytes // (4 * num_batches)
    with collectives.agreed("blocks of the Fisher matrix"):
        pieces = [piece for shard in shards.values() for piece in blocks_of(shard, block, most)]
    passes = _passes(pieces, most)
    for turn in range(num_passes(len(passes))):
        mine = passes[turn] if turn < len(passes) else []
        kept = {piece: torch.zeros(num_batches, piece.end - piece.begin) for piece in mine}
        for b, found in enumerate(gradients()):
            for piece, table in kept.items():
                if piece.name in found:
                    table[b] = found[piece.name][piece.begin : piece.end]
        for piece, table in kept.items():
            shard = shards[piece.name]
            weight = shard.local.detach().reshape(-1)[piece.begin : piece.end]
            scores = block_scores(table.to(weight.device), weight, block, damping)[slice(*piece.owned)]
            place = piece.begin + piece.owned[0] - shard.owned[0]
            values[piece.name][place : place + len(scores)] = scores


def _passes(pieces: list[Blocks], most: int) -> list[list[Blocks]]:
    passes: list[list[Blocks]] = []
    room = 0
    for piece in pieces:
        size = piece.end - piece.begin
        if not passes or size > room:
            passes.append([])
            room = max(most, size)
        passes[-1].append(piece)
        room -= size
    return passes


def block_scores(gradients: Tensor, weight: Tensor, block: int, damping: float) -> Tensor:
    """Scores of a flat run of whole blocks (the last may be shorter): `gradients` [m, n], `weight` [n] -> float32 [n]."""
    m, n = gradients.shape
    pad = -n % block
    table = torch.nn.functional.pad(gradients, (0, pad)).view(m, -1, block).transpose(0, 1)  # [blocks, m, block]
    diagonal = torch.cat([_inverse_diagonal(part.double(), damping) for part in table.split(256)]).view(-1)[:n]
    return (weight.double().square() / (2 * diagonal)).float()


def _inverse_diagonal(g: Tensor, damping: float) -> Tensor:
    """[blocks, m, block] -> the diagonals of the inverse Fisher matrices, [blocks, block]."""
    m = g.shape[1]
    inner = g @ g.transpose(1, 2) + damping * m * torch.eye(m, dtype=g.dtype, device=g.device)
    solved = torch.cholesky_solve(g, torch.linalg.cholesky(inner))
    return (1 - (g * solved).sum(1)) / damping
