"""Between logs a step of the trainer reads no number of its own: on a GPU each such read would wait for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcft_dist.cli import main
from dcft_dist.distributed.late import LateSum
from dcft_dist.method import score_batches
from dcft_dist.train.steps import Training

from ..ranks import run_ranks
from .test_run import encoder, tiny

__all__ = ["encoder", "tiny"]

READS = ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__", "__format__")


def readers() -> str:
    """The function of this package that reads a number, or an empty string for one of torch."""
    frame = sys._getframe(2)
    name = frame.f_code.co_filename
    return f"{Path(name).name}:{frame.f_code.co_name}" if "dcft_dist" in Path(name).parts else ""


def reads_by_step(settings: list[str]) -> tuple[dict[int, list[str]], set[int]]:
    """A short training: the reads in each step, and the steps that are logged."""
    found: dict[int, list[str]] = {}
    logged: set[int] = set()
    now: list[int] = []
    patch = pytest.MonkeyPatch()

    def noted(method: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if now and (reader := readers()) and not reader.startswith("late.py"):
                found[now[-1]].append(reader)
            return method(self, *args, **kwargs)

        return call

    for name in READS:
        patch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    step = Training.step

    def watched(self: Training, number: int, total: int, groups: Any) -> Any:
        now.append(number)
        found[number] = []
        if groups is not None:
            logged.add(number)
        try:
            return step(self, number, total, groups)
        finally:
            now.pop()

    patch.setattr(Training, "step", watched)
    try:
        assert main(["train", *settings]) == 0
    finally:
        patch.undo()
    return found, logged


@pytest.mark.parametrize(
    "more", [[], ["--optimizer.name", "sgd", "--penalty.level", "gradient"], ["--penalty.schedule", "cosine"]]
)
def test_a_step_reads_nothing_between_logs(tiny: Path, tmp_path: Path, more: list[str]) -> None:
    words = [
        str(tiny),
        "--runs_dir",
        str(tmp_path),
        "--engine",
        "single",
        "--train.epochs",
        "8",
        "--log_every",
        "100",
        "--checkpoint.every",
        "100",
        *more,
    ]
    found, logged = reads_by_step(words)
    steps = sorted(found)
    between = {n: reads for n, reads in found.items() if n not in logged}
    # At the update level the optimizer is tried at steps 1 to 6, 8, 16 and so on, at the first one after a log, and what it
    # leaves is looked at in the step that follows.
    tried = {n for n in found if n < 6 or ((n + 1) & n) == 0 or n - 1 in logged}
    checked = tried | {n + 1 for n in tried}
    assert len(between) > 10 and len(set(between) - checked) > 5, (steps, logged)
    assert {n: set(reads) for n, reads in between.items() if reads and n not in checked} == {}
    if "gradient" in more:
        assert not any(between.values())


def sums() -> list[Any]:
    late: LateSum[str] = LateSum("test")
    rank = torch.distributed.get_rank()
    first = late.push(torch.tensor([1.0 + rank, 2.0], dtype=torch.float64), "a")
    second = late.push(torch.tensor([10.0, 20.0], dtype=torch.float64), "b")
    return [first, second, late.flush(), late.flush()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_come_one_call_later(ranks: int) -> None:
    total = 1.0 if ranks == 1 else 3.0
    for found in run_ranks(ranks, sums):
        assert found == [None, ([total, 2.0 * ranks], "a"), ([10.0 * ranks, 20.0 * ranks], "b"), None]


def test_scoring_compares_numbers_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer says how many items there are, so no score batch waits for the ranks to compare."""
    lengths: list[int] = []
    read = score_batches._length
    monkeypatch.setattr(score_batches, "_length", lambda batches: lengths.append(read(batches)) or lengths[-1])
    assert main(["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single", "--until", "score"]) == 0
    assert lengths == [32 // 4]  # examples, micro-batch
