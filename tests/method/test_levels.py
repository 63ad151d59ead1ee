"""Levels: exact quantiles of the whole model's scores, the same for every engine and number of ranks, with ties too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcft_dist import Scores, score_importance
from dcft_dist.controls.control_sets import permuted_levels
from dcft_dist.engines.find import find_engine
from dcft_dist.errors import ScoreError
from dcft_dist.method.levels import LEVELS, Levels, levels_of, load_levels, save_levels
from dcft_dist.method.scores import ScoreShard, save_scores

from ..nets import HEAD, make_net
from ..prepared import prepare
from ..ranks import run_ranks

KINDS = ("random", "ties", "zeros", "one value", "few")


def some_scores(model: Any, kind: str) -> Scores:
    """The same for every sharding, since random scores depend on the place in the weight alone."""
    some = {"eligible": ["conv.weight"]} if kind == "few" else {}
    scores = score_importance(model, None, None, head=HEAD, criterion="random", seed=3, **some)
    change = {
        "random": lambda v: v - 0.5,
        "ties": lambda v: (v * 7).floor(),
        "zeros": lambda v: torch.where(v < 0.4, 0.0, v),
        "one value": torch.zeros_like,
        "few": lambda v: v,
    }[kind]
    return replace(scores, shards={n: ScoreShard(s.box, change(s.values)) for n, s in scores.shards.items()})


def of_ranks(engine: str, folder: str) -> dict[str, Any]:
    model = prepare(make_net, engine, lambda p: torch.optim.SGD(p, lr=0.1)).model if engine != "single" else make_net()
    found = {}
    for kind in KINDS:
        scores = some_scores(model, kind)
        levels = levels_of(scores)
        save_scores(scores, f"{folder}/scores {kind}")
        save_levels(levels, f"{folder}/levels {kind}")
        again = load_levels(f"{folder}/levels {kind}", model)
        assert all(torch.equal(again.shards[n].values, s.values) for n, s in levels.shards.items())
        shards = {s.name: s for s in find_engine(model).shards()}
        local = levels.of(shards)
        assert all(local[n].shape == shards[n].local.shape and local[n].dtype == torch.uint8 for n in local)
        found[kind] = {n: (shards[n].box.flat_index(0, shards[n].box.numel), v.view(-1)) for n, v in local.items()}
    return found


def expected(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """By sorting: of equal scores the earlier one, in the order of names and then of elements, ranks higher."""
    names = sorted(scores, key=lambda name: name.encode())
    values = torch.cat([scores[name].reshape(-1) for name in names]).double()
    order = torch.argsort(values.flip(0), stable=True)  # lowest first; of equal ones the last first
    level = torch.empty(len(values), dtype=torch.int64)
    level[len(values) - 1 - order] = torch.arange(len(values)) * LEVELS // len(values)
    parts = level.split([scores[name].numel() for name in names])
    return {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2-hybrid", 4), ("fsdp1-full-flat", 2), ("zero3", 2)],
)
def test_levels_are_exact(engine: str, ranks: int, tmp_path: Path) -> None:
    results = run_ranks(ranks, of_ranks, engine, str(tmp_path))
    for kind in KINDS:
        right = expected(load_file(tmp_path / f"scores {kind}"))
        stored = load_file(tmp_path / f"levels {kind}")
        assert stored.keys() == right.keys()
        assert all(torch.equal(stored[name].to(torch.int64), level) for name, level in right.items()), kind
        counts = torch.bincount(torch.cat([v.reshape(-1) for v in right.values()]), minlength=LEVELS)
        assert counts.max() - counts.min() <= 1
        for found in results:  # also the cells that other ranks own
            for name, (cells, local) in found[kind].items():
                assert torch.equal(local, stored[name].reshape(-1)[cells])


def test_strengths_have_mean_one() -> None:
    for kind in ("random", "few"):
        levels = levels_of(some_scores(make_net(), kind))
        strengths = torch.from_numpy(levels.strengths())
        every = torch.cat([strengths[s.values.to(torch.int64)] for s in levels.shards.values()])
        assert float(every.mean()) == pytest.approx(1.0, abs=1e-12)
        assert strengths.diff().min() > 0 and strengths[0] > 0 and strengths[-1] < 2.1


def permuted(engine: str, folder: str) -> None:
    model = prepare(make_net, engine, lambda p: torch.optim.SGD(p, lr=0.1)).model if engine != "single" else make_net()
    levels = levels_of(some_scores(model, "random"))
    save_levels(levels, f"{folder}/levels")
    for seed in (0, 1):
        save_levels(permuted_levels(model, levels, seed), f"{folder}/{seed}")


def test_permuted_levels_stay_within_their_magnitudes(tmp_path: Path) -> None:
    found = {}
    for engine, ranks in (("single", 1), ("ddp", 2), ("fsdp2", 4), ("zero3", 2)):
        (tmp_path / engine).mkdir()
        run_ranks(ranks, permuted, engine, str(tmp_path / engine))
        found[engine] = [load_file(tmp_path / engine / name) for name in ("levels", "0", "1")]
    before, first, second = found["single"]
    for name, level in before.items():
        bins = make_net().get_parameter(name).detach().abs().view(torch.int32) >> 21
        for number in bins.unique():
            assert torch.equal(first[name][bins == number].sort().values, level[bins == number].sort().values)
        assert not torch.equal(first[name], level) and not torch.equal(first[name], second[name])
        for engine in found:
            assert torch.equal(found[engine][1][name], first[name]), "the same for every number of ranks"


def test_files_that_are_no_levels(tmp_path: Path) -> None:
    net, file = make_net(), tmp_path / "levels"
    save_levels(levels_of(some_scores(net, "random")), file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered").write_bytes(bytes(data))
    save_file({"other.weight": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "other", {"levels": "256"})
    save_scores(some_scores(net, "random"), tmp_path / "scores")
    for name, text in {
        "altered": "was altered",
        "other": "levels of other.weight",
        "scores": "not a file of levels",
    }.items():
        with pytest.raises(ScoreError, match=text):
            load_levels(tmp_path / name, net)
    broken = some_scores(net, "random")
    broken.shards["mix.weight"].values[0] = float("nan")
    with pytest.raises(ScoreError, match=r"NaN or infinite in mix.weight"):
        levels_of(broken)
    assert isinstance(load_levels(file, net), Levels)
