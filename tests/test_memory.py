"""What selecting and attaching take besides their result: resident memory of real processes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcft_dist import FundamentalSet, Scores, attach_penalty, select_fundamental
from dcft_dist.distributed import collectives
from dcft_dist.engines.box import Box
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.meta import on_meta
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.method.scores import ScoreShard
from dcft_dist.weights.loading import Allowed, Loading

from .ranks import run_ranks

MIB = 2**20


def peak(call: Callable[[], Any]) -> tuple[Any, float]:
    """The call's result, and the rise of this process's resident memory during it, in MiB."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    result = call()
    return result, (status("VmHWM") - before) / 1024


def selection_memory(kind: str) -> float:
    number = 1 << 25  # 128 MiB of scores on each rank
    values = torch.rand(number) if kind == "random" else (torch.rand(number) * 4).round()
    rank, ranks = collectives.rank(), collectives.world_size()
    shards = {f"w{i}": ScoreShard(Box.flat(ranks * len(v), rank * len(v), len(v)), v) for i, v in enumerate(values.chunk(4))}
    shapes = {name: shard.box.grid for name, shard in shards.items()}
    found, rise = peak(lambda: select_fundamental(Scores("given", shapes, shards)))
    assert found.num_selected == round(0.1 * number * ranks)
    return rise - number / 8 / MIB


@pytest.mark.parametrize("kind", ["random", "tied"])
def test_selection(kind: str) -> None:
    """A copy of the scores would be 128 MiB, a mask of booleans 32."""
    assert max(run_ranks(2, selection_memory, kind)) < 30


def attach_memory(path: str) -> list[tuple[float, int]]:
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))  # 48 million weights
    masks = {f"{i}.weight": torch.zeros(2048, 2048, dtype=torch.bool).fill_diagonal_(True) for i in range(12)}
    FundamentalSet.from_masks(masks).save(path)
    del masks
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for where in ("before", "after"):
        chosen = FundamentalSet.load(path)
        penalty, rise = peak(lambda c=chosen, w=where: attach_penalty(model, c, optimizer=optimizer, where=w))  # type: ignore[misc]
        found.append((rise, penalty.mask_bytes))
        penalty.remove()
    return found


def test_attaching(tmp_path: Path) -> None:
    """A mask of booleans would be 48 MiB; the bits are 6, and so is the file."""
    for rise, mask_bytes in run_ranks(1, attach_memory, str(tmp_path / "set.safetensors"))[0]:
        assert mask_bytes == 12 * 2048 * 2048 // 8
        assert rise < 20


class Stack(nn.Module):
    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(12))  # 16 MiB each


def loading_memory(file: str, engine: str) -> float:
    """Rise of anonymous memory (not of pages of the file) over this rank's share of the weights, in MiB."""

    def load(file: str, width: int) -> Any:
        with on_meta():
            model = Stack(width)
        loading = Loading(model, Path(file), allowed=Allowed())
        plan = WrapOptions(engine, torch.device("cpu"), list(model.layers), zero_stage=3)
        prepared = prepare(model, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
        loading.into(prepared)
        return prepared

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once, and is not counted as taken
    load(file.replace("model.", "small."), 8)  # what is imported on the way
    before, highest, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(file, 2048)
    done.set()
    watcher.join()
    assert sum(shard.local.numel() for shard in find_engine(model).shards()) == 12 * 2048**2 / collectives.world_size()
    return (max(highest[0], anonymous()) - before) / 1024 - 12 * 16 / collectives.world_size()


@pytest.mark.parametrize(("engine", "ranks", "spare"), [("fsdp2", 2, 0), ("deepspeed", 8, 3 * 24)])
def test_no_rank_holds_a_model_that_is_read(engine: str, ranks: int, spare: float, tmp_path: Path) -> None:
    """Beside its share of 192 MiB: less than the largest weight, with 10 % to spare. DeepSpeed has masters, a place for
    gradients and, while it begins, a copy besides: a share each."""
    torch.manual_seed(0)
    save_file(dict(Stack().state_dict()), tmp_path / "model.safetensors")
    save_file(dict(Stack(8).state_dict()), tmp_path / "small.safetensors")
    rise = max(run_ranks(ranks, loading_memory, str(tmp_path / "model.safetensors"), engine))
    assert rise < spare + 16 + 0.1 * (192 / ranks + 16)
