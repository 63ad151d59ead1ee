"""Checksums of weights that do not depend on the engine or the number of ranks, and a check that replicas are equal.

The checksum of a weight is the sum over its elements of (2 i + 1) times the element's bits as an integer, modulo 2^64; i is
the element's index in the flattened weight. Any rank can therefore add its part. One changed element always changes the sum,
since an odd number times a difference below 2^64 is not 0 modulo 2^64.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..errors import TemporaryError
from .base import Shard
from .box import Box
from .find import find_engine

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integer of that size
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements: fits in a core's cache; keeps a GPU busy


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """The checksum of every weight over all ranks, by canonical name. Collective: 8 bytes for each weight.

    Args:
        model: the wrapped or plain model, with memory.

    Returns:
        Signed 64-bit numbers, equal for every engine and number of ranks.
    """
    shards = find_engine(model).shards()
    sums = collectives.all_reduce(_on_cpu([_of_owned(shard) for shard in shards]), what="checksums of the weights")
    return {shard.name: int(value) for shard, value in zip(shards, sums.tolist(), strict=True)}


def own_checksums(module: nn.Module) -> dict[str, int]:
    """The checksums of a plain module's weights, as on this rank alone. No communication."""
    return {
        name: int(checksum(p.detach(), Box.flat(p.numel(), 0, p.numel())))
        for name, p in module.named_parameters()
        if not p.is_meta
    }


def check_replicas(model: nn.Module) -> int:
    """Checks that ranks which store the same elements (DDP, hybrid sharding) store the same values. Collective.

    One collective of 8 bytes for each weight; where several ranks store a weight, a second of 16 bytes and a pass over its
    values. A replica can differ after a fault of the memory, or where ranks compute on different hardware.

    Args:
        model: the wrapped model.

    Returns:
        Number of weights that several ranks store.

    Raises:
        TemporaryError: a rank has other values; the message names the weight and the rank.
    """
    engine = find_engine(model)
    shards = engine.shards()
    sizes = collectives.all_reduce(torch.tensor([s.box.numel for s in shards]), what="sizes of the replicas").tolist()
    copies = [total // max(prod(s.box.grid), 1) for total, s in zip(sizes, shards, strict=True)]
    several = [(shard, n) for shard, n in zip(shards, copies, strict=True) if n > 1]
    if not several:
        return 0
    # Every element is owned once and stored `n` times: if copies are equal, all stored ones sum up to n times the owned.
    parts = _on_cpu([part for shard, _ in several for part in _owned_and_stored(shard)])
    sums = collectives.all_reduce(parts.view(-1, 2), what="checksums of the replicas").tolist()
    for (shard, n), (owned, stored) in zip(several, sums, strict=True):
        if (n * owned - stored) % (1 << 64):
            raise TemporaryError(_disagreement(shard))
    return len(several)


def _on_cpu(scalars: list[Tensor]) -> Tensor:
    """Scalars of any devices as one tensor on the CPU: offloaded weights lie elsewhere than frozen ones."""
    out = torch.zeros(len(scalars), dtype=torch.int64)
    for device in {scalar.device for scalar in scalars}:
        places = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        out[places] = torch.stack([scalars[i] for i in places]).cpu()
    return out


def _disagreement(shard: Shard) -> str:
    """Names the rank that differs from most ranks with the same elements. Collective."""
    here = hash((shard.box.start, shard.box.size)) & (1 << 62) - 1
    rows = collectives.all_gather_ints([here, int(checksum(shard.local, shard.box))], what=f"copies of {shard.name}")
    for place in dict.fromkeys(place for place, _ in rows):
        values = [value for other, value in rows if other == place]
        usual = max(values, key=values.count)
        if odd := [rank for rank, row in enumerate(rows) if row[0] == place and row[1] != usual]:
            others = ", ".join(str(rank) for rank, row in enumerate(rows) if row == [place, usual])
            return (
                f"rank {odd[0]} has other values of {shard.name} than rank {others}, though all are copies: a fault of the "
                "memory, different hardware, or gradients that were not averaged (DDP with a tied weight under reentrant "
                "checkpointing); start again to go on from the last checkpoint"
            )
    return f"the copies of {shard.name} differ"


def _of_owned(shard: Shard) -> Tensor:
    return checksum(shard.local, shard.box, *shard.owned)


def _owned_and_stored(shard: Shard) -> tuple[Tensor, Tensor]:
    """The checksums of the owned elements and of all elements of a shard, in one pass over them."""
    begin, end = shard.owned
    owned = _of_owned(shard)
    rest = checksum(shard.local, shard.box, 0, begin) + checksum(shard.local, shard.box, end)
    return owned, owned + rest


@torch.no_grad()
def checksum(values: Tensor, box: Box, begin: int = 0, end: int | None = None) -> Tensor:
    """The part of a weight's checksum that some elements contribute: a scalar int64 tensor on their device.

    Args:
        values: the elements of `box`, in row-major order.
        box: which elements of the weight they are.
        begin, end: the range of the elements of `box` to use; None: to the last.
    """
    flat, total = values.detach().reshape(-1), torch.zeros((), dtype=torch.int64, device=values.device)
    chunk, end = _CHUNK.get(flat.device.type, 1 << 20), len(flat) if end is None else end
    first, odd = box.first, 2 * torch.arange(min(chunk, end - begin), device=flat.device) + 1
    for at in range(begin, end, chunk):
        bits = flat[at : min(at + chunk, end)].contiguous().view(_BITS[flat.element_size()]).to(torch.int64)
        if first is None:
            index = box.flat_index(at, at + len(bits), flat.device)
            total += (bits * (2 * index + 1)).sum()
        else:
            total += (bits * odd[: len(bits)]).sum() + 2 * (first + at) * bits.sum()
    return total
