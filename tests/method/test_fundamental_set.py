"""The fundamental set as a file and as an object: round trips, damage, comparisons."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.engines.box import Box
from dcft_dist.errors import DcftError, FundamentalSetError
from dcft_dist.method.bits import cut, num_bytes, pack, paste, unpack

from ..nets import HEAD, make_net, wrap
from ..ranks import run_ranks


def chosen_set(engine: str = "single", fraction: float = 0.1) -> FundamentalSet:
    model = wrap(make_net(), engine)
    return select_fundamental(score_importance(model, None, None, head=HEAD, criterion="random"), fraction)


def test_from_masks_and_queries() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    chosen = FundamentalSet.from_masks({"a": mask, "b": torch.zeros(9, dtype=torch.bool)}, head="head")
    assert chosen.names == ("a", "b") and chosen.num_selected == 2 and chosen.num_eligible == 15
    assert chosen.fraction == pytest.approx(2 / 15) and chosen.threshold is None
    assert torch.equal(chosen.mask("a"), mask) and chosen.mask("b").shape == (9,)
    other = FundamentalSet.from_masks({"a": ~mask, "b": torch.zeros(9, dtype=torch.bool)})
    assert chosen.jaccard(chosen) == 1.0 and chosen.jaccard(other) == 0.0
    assert chosen.jaccard(other, ["b"]) == 1.0 and chosen.jaccard(other, ["a"]) == 0.0
    with pytest.raises(FundamentalSetError, match="did you mean 'a'"):
        chosen.mask("aa")
    with pytest.raises(FundamentalSetError, match="the two sets differ in a, c"):
        chosen.jaccard(FundamentalSet.from_masks({"c": mask, "b": torch.zeros(9, dtype=torch.bool)}))
    with pytest.raises(FundamentalSetError, match="boolean tensors: a"):
        FundamentalSet.from_masks({"a": mask.int()})
    with pytest.raises(FundamentalSetError, match="none was given"):
        FundamentalSet.from_masks({})


def save_here(engine: str, path: str) -> tuple[list[int], dict[str, Any]]:
    chosen = chosen_set(engine)
    chosen.save(path)
    masks = {n: chosen.mask(n) for n in chosen.names}
    return list(Path(path).read_bytes()), masks


def load_here(path: str, engine: str) -> float:
    return FundamentalSet.load(path).jaccard(chosen_set(engine))


def test_one_file_for_every_engine_and_number_of_ranks(tmp_path: Path) -> None:
    """The same bytes from 1 and 4 ranks; loads on 1, 2 and 4 ranks under other engines."""
    one = run_ranks(1, save_here, "single", str(tmp_path / "one"))[0]
    for data, masks in run_ranks(4, save_here, "fsdp2", str(tmp_path / "four")):
        assert data == one[0]
        assert all(torch.equal(masks[n], m) for n, m in one[1].items())
    for ranks, engine in ((1, "single"), (2, "ddp"), (4, "fsdp2")):
        assert run_ranks(ranks, load_here, str(tmp_path / "four"), engine) == [1.0] * ranks
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_the_file_is_safetensors_with_one_bit_a_weight(tmp_path: Path) -> None:
    chosen = chosen_set()
    chosen.save(tmp_path / "set")
    loaded = FundamentalSet.load(tmp_path / "set")
    assert loaded.info == chosen.info and loaded.names == chosen.names
    assert loaded.info.criterion == "random" and loaded.info.head == (HEAD,) and loaded.threshold == chosen.threshold
    assert {"blocks.0.norm.weight", "frozen.weight"} <= set(loaded.info.unscored)
    with safe_open(tmp_path / "set", framework="numpy") as file:
        for name, shape in chosen.info.shapes.items():
            bits = file.get_tensor(name)
            assert bits.dtype == np.uint8 and len(bits) == num_bytes(int(np.prod(shape)))
            assert torch.equal(unpack(bits, int(np.prod(shape))).view(shape), chosen.mask(name))
        metadata = file.metadata()
    assert json.loads(metadata["info"])["fraction"] == 0.1 and len(metadata["sha256"]) == 64


def test_damage_is_noticed(tmp_path: Path) -> None:
    chosen_set().save(tmp_path / "set")
    good = (tmp_path / "set").read_bytes()
    header = struct.unpack("<Q", good[:8])[0]
    damaged = {
        "flipped bit": good[:-3] + bytes([good[-3] ^ 4]) + good[-2:],
        "other fraction": good.replace(b'\\"fraction\\": 0.1', b'\\"fraction\\": 0.2'),
        "truncated bits": good[:-5],
        "truncated header": good[: header // 2],
        "empty": b"",
        "not safetensors": b"hello, this is no set at all",
    }
    for what, data in damaged.items():
        assert data != good, what
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(FundamentalSetError, match=r"truncated or damaged|altered"):
            FundamentalSet.load(tmp_path / "bad")
    with pytest.raises(FundamentalSetError, match="no fundamental set at"):
        FundamentalSet.load(tmp_path / "nothing")


def unwritable() -> str:
    chosen = chosen_set("ddp")
    with pytest.raises(DcftError) as error:
        chosen.save("/proc/no/such/place")
    return f"{dist.get_rank()} {error.value}"


def test_a_failed_save_is_an_error_on_every_rank() -> None:
    messages = run_ranks(2, unwritable)
    assert all("/proc/no" in m for m in messages) and "rank 0" in messages[1]


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), seed=st.integers(0, 99), data=st.data()
)  # fmt: skip
def test_cut_and_paste(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    """Any box of any weight, at any bit offset."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True))
    box = Box(shape, start, size)
    piece = cut(pack(mask), box)
    assert torch.equal(unpack(piece, box.numel), mask[box.slices()].reshape(-1))
    whole = np.zeros(num_bytes(mask.numel()), dtype=np.uint8)
    paste(piece, box, whole)
    expected = torch.zeros_like(mask)
    expected[box.slices()] = mask[box.slices()]
    assert torch.equal(unpack(whole, mask.numel()).view(shape), expected)


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    """The bits stay in the file, which a later training may have replaced by those of another set."""
    one, other = ({"w": torch.arange(16).view(4, 4) % 4 == k} for k in (0, 1))
    FundamentalSet.from_masks(one).save(tmp_path / "set.safetensors")
    opened = FundamentalSet.load(tmp_path / "set.safetensors")
    FundamentalSet.from_masks(one).save(tmp_path / "set.safetensors")  # the same set again
    assert torch.equal(opened.mask("w"), one["w"])
    FundamentalSet.from_masks(other).save(tmp_path / "set.safetensors")
    with pytest.raises(FundamentalSetError, match=r"set.safetensors was replaced by another set after it was opened"):
        opened.mask("w")
