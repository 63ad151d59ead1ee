"""Optimal brain surgeon with a block-diagonal empirical Fisher matrix: the criterion of the public code of DCFT.

Notation: g_1..g_m are the gradients of m score batches, and the rows of G. A block is B consecutive weights of a tensor.
d is the damping. The Fisher matrix of a block is

    F = d I + 1/m sum_b g_b g_b^T

Suppose weight w_i is removed, and the other weights of its block move to their best values. The loss then rises by

    w_i^2 / (2 [F^-1]_ii)

(Hassibi and Stork 1993; in blocks: Kurtic et al. 2022, "The Optimal BERT Surgeon"). Woodbury's identity gives the diagonal
of the inverse from one m x m matrix per block, in float64:

    [F^-1]_ii = 1/d (1 - sum_bc G_bi [(d m I + G G^T)^-1]_bc G_ci)

Memory: 4 m bytes per weight that is scored at the same time. Weights that do not fit into `limit_bytes` are scored in
further passes, and each pass runs all score batches again.
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

Gradients = Callable[[], Iterator[dict[str, Tensor]]]  # per score batch one dictionary: name -> flat local gradient


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of one weight: the local elements `begin:end`.

    Only the elements `owned` are scored: a range [first, last), counted from `begin`.
    """

    name: str
    begin: int
    end: int
    owned: tuple[int, int]


def blocks_of(shard: Shard, block: int, most: int) -> Iterator[Blocks]:
    """Yields the blocks that contain this rank's owned part of a weight.

    Args:
        shard: this rank's part of the weight.
        block: weights per block.
        most: elements per piece at most, but at least one block.

    Raises:
        EngineError: this rank has only a part of a block.
    """
    start, numel = shard.box.first, prod(shard.box.grid)
    if shard.owned[0] == shard.owned[1]:
        return
    if start is None:
        raise EngineError(
            f"{shard.name}: this rank's part of the weight is not a range of rows, but criterion 'obs' needs whole blocks: "
            "use another criterion, or DDP"
        )
    first = (start + shard.owned[0]) // block * block - start
    last = min(-(-(start + shard.owned[1]) // block) * block, numel) - start
    if first < 0 or last > shard.local.numel():
        raise EngineError(
            f"{shard.name}: blocks of {block} weights are cut by the sharding: use a block that divides the rows, or DDP"
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
    """Scores all blocks and writes the scores into `values`. Collective.

    Args:
        shards: this rank's shards to score, by name.
        values: name -> flat scores of this rank's owned part, filled in place.
        gradients: runs all score batches and yields the gradients of each.
        num_batches: number of score batches (m).
        block: weights per block.
        damping: added to the diagonal of the Fisher matrix.
        limit_bytes: memory for gradients; sets how many weights are scored in one pass.
        num_passes: this rank's number of passes -> the largest number of all ranks.
    """
    most = limit_bytes // (4 * num_batches)
    with collectives.agreed("blocks of the Fisher matrix"):
        pieces = [piece for shard in shards.values() for piece in blocks_of(shard, block, most)]
    passes = _passes(pieces, most)
    for index in range(num_passes(len(passes))):
        own_pieces = passes[index] if index < len(passes) else []
        tables = {piece: torch.zeros(num_batches, piece.end - piece.begin) for piece in own_pieces}
        for b, batch_gradients in enumerate(gradients()):
            for piece, table in tables.items():
                if piece.name in batch_gradients:
                    table[b] = batch_gradients[piece.name][piece.begin : piece.end]
        for piece, table in tables.items():
            shard = shards[piece.name]
            weight = shard.local.detach().reshape(-1)[piece.begin : piece.end]
            scores = block_scores(table.to(weight.device), weight, block, damping)[slice(*piece.owned)]
            offset = piece.begin + piece.owned[0] - shard.owned[0]
            values[piece.name][offset : offset + len(scores)] = scores


def _passes(pieces: list[Blocks], most: int) -> list[list[Blocks]]:
    """Groups the pieces into passes of at most `most` elements each."""
    passes: list[list[Blocks]] = []
    free = 0
    for piece in pieces:
        size = piece.end - piece.begin
        if not passes or size > free:
            passes.append([])
            free = max(most, size)
        passes[-1].append(piece)
        free -= size
    return passes


def block_scores(gradients: Tensor, weight: Tensor, block: int, damping: float) -> Tensor:
    """Scores consecutive whole blocks of one weight; the last block may be shorter.

    Args:
        gradients: [m, n], one row per score batch.
        weight: [n], flat.
        block: weights per block.
        damping: added to the diagonal of the Fisher matrix.

    Returns:
        float32 [n].
    """
    m, n = gradients.shape
    pad = -n % block
    table = torch.nn.functional.pad(gradients, (0, pad)).view(m, -1, block).transpose(0, 1)  # [blocks, m, block]
    diagonal = torch.cat([_inverse_diagonal(blocks.double(), damping) for blocks in table.split(256)]).view(-1)[:n]
    return (weight.double().square() / (2 * diagonal)).float()


def _inverse_diagonal(g: Tensor, damping: float) -> Tensor:
    """Diagonals of the inverse Fisher matrices, [blocks, block], from gradients [blocks, m, block]."""
    m = g.shape[1]
    inner = g @ g.transpose(1, 2) + damping * m * torch.eye(m, dtype=g.dtype, device=g.device)
    solved = torch.cholesky_solve(g, torch.linalg.cholesky(inner))
    return (1 - (g * solved).sum(1)) / damping
