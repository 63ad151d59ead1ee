"""A checksum is the same under every engine and number of ranks; a changed replica is found, with its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dcft_dist.distributed import collectives
from dcft_dist.engines.checksum import check_replicas, own_checksums, weight_checksums
from dcft_dist.engines.find import find_engine
from dcft_dist.errors import TemporaryError

from ..nets import make_net
from ..ranks import run_ranks
from .cases import get


def by_hand(values: Any) -> int:
    """The formula in the module's docstring, with numbers without bounds."""
    bits = np.ascontiguousarray(values.detach().cpu().numpy()).reshape(-1)
    total = sum((2 * i + 1) * int(b) for i, b in enumerate(bits.view(f"int{8 * bits.itemsize}").tolist()))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def sums_of(engine: str) -> dict[str, int]:
    return weight_checksums(get(engine).model)


def test_it_is_the_formula() -> None:
    net = make_net()
    wanted = {name: by_hand(p) for name, p in net.named_parameters()}
    assert own_checksums(net) == wanted
    half = torch.nn.Linear(3, 70_000).bfloat16()  # two bytes, and more than one chunk
    assert own_checksums(half)["weight"] == by_hand(half.weight.view(torch.int16))
    bits = half.weight.detach().view(torch.int16)
    bits[69_999, 2] ^= 1
    assert own_checksums(half)["weight"] == by_hand(bits)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-hybrid", "fsdp2-shard1", "fsdp1-full-flat", "zero1", "zero3"])
def test_it_does_not_depend_on_engine_and_ranks(engine: str) -> None:
    wanted = {name: by_hand(p) for name, p in make_net().named_parameters()}
    for ranks in (2, 4) if "hybrid" in engine else (1, 2, 3):
        assert run_ranks(ranks, sums_of, engine) == [wanted] * ranks


def after_a_flip(engine: str, rank: int, position: int) -> tuple[int, str, int]:
    """Copies before the flip, the message after it, and the collectives of a check that finds nothing."""
    model = get(engine).model
    with collectives.counted() as count:
        before = check_replicas(model)
    shard = next(s for s in find_engine(model).shards() if s.box.numel > 1)
    if dist.get_rank() == rank:
        shard.local.view(-1).view(torch.int32)[position] ^= 1  # the lowest bit of one weight
    try:
        check_replicas(model)
    except TemporaryError as error:
        return before, str(error), count.calls
    return before, "", count.calls


@pytest.mark.parametrize(
    ("engine", "ranks"), [("ddp", 3), ("fsdp2-hybrid", 4), ("fsdp1-hybrid-flat", 4), ("fsdp1-none-orig", 3)]
)
def test_one_flipped_bit_is_found_wherever_it_is(engine: str, ranks: int) -> None:
    for rank, position in ((1, 0), (1, -1), (2, 0)):  # the element is owned by this rank, or by another one
        rows = run_ranks(ranks, after_a_flip, engine, rank, position)
        assert len({text for _, text, _ in rows}) == 1 and all(calls == 2 and copies for copies, _, calls in rows)
        found = rows[0][1]  # of two copies nobody knows which is right
        assert f"rank {rank} has other values of " in found or ("hybrid" in engine and f"than rank {rank}," in found), found
        assert "start again to go on from the last checkpoint" in found


def test_what_is_stored_once_has_no_copies() -> None:
    for copies, text, calls in run_ranks(2, after_a_flip, "fsdp2", 1, 0):
        assert (copies, text, calls) == (0, "", 1)
