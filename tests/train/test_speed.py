"""How fast a run is: what is counted and logged, the line of each epoch, the profile of chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcft_dist.cli import main
from dcft_dist.files import read_json, read_lines
from dcft_dist.reports.render import test_line as line_of_test
from dcft_dist.train import speed
from dcft_dist.train.speed import Clock, Speed, flops_of, tokens_in

from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]

CPU = torch.device("cpu")


def test_operations_are_counted_once_and_without_compilation() -> None:
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    net.compile(backend="aot_eager")
    x, seen = torch.randn(5, 8), list[bool]()
    net.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    # A product of [n, k] and [k, m] has 2 n k m operations; the backward has twice as many as the forward.
    assert flops_of(lambda: net(x)) == 3 * 2 * 5 * (8 * 16 + 16 * 4)
    assert seen == [False]


def test_the_clock_gives_each_part_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    clock = Clock(CPU)
    for part in ("", "data", "forward", "backward", "", "data"):
        clock.mark(part)
    assert clock.read() == {"data": 1.25, "forward": 2.0, "backward": 0.5}, "not what passes between two steps"
    assert clock.read() == {}


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Speed(CPU, samples=32, flops_per_sample=1e9, peak=4e10)
    monkeypatch.setattr(measured.clock, "read", lambda: {"data": 1.0, "forward": 2.0, "backward": 4.0, "step": 1.0})
    for _ in range(2):
        measured.step(tokens_in([{"input_ids": torch.zeros(4, 10)}, {"input_ids": torch.zeros(4, 10)}]))
    found = measured.report(ranks=2)
    assert found.pop("memory/peak_gib") > 0.05
    assert found == {
        "speed/data_s": 0.5,
        "speed/forward_s": 1.0,
        "speed/backward_s": 2.0,
        "speed/step_s": 0.5,
        "speed/samples_per_s": 8.0,
        "speed/tokens_per_s": 40.0,
        "speed/mfu": 0.2,  # 8 samples of 10^9 operations a second, of 4 x 10^10
    }
    assert tokens_in([{"pixel_values": torch.zeros(1)}]) == 0 and set(measured.report(2)) == {"memory/peak_gib"}


def test_what_a_run_says(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """On a machine of which the peak is known the model makes one forward more, which changes nothing."""
    words = [
        "train",
        str(tiny),
        "--engine",
        "single",
        "--removal.fractions",
        "[]",
        "--log_every",
        "2",
        "--train.profile",
        "[2,3]",
    ]
    assert main([*words, "--runs_dir", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out.splitlines()
    before, first, second = (line for line in out if line.startswith("epoch "))
    assert before.startswith("epoch 0/2 | validation accuracy ") and before.endswith(" | before fine-tuning")
    assert first.startswith("epoch 1/2 | training loss ") and " | validation accuracy " in first and first.endswith(" left")
    assert " samples/s | " in first and " tokens/s | " in first and "left" not in second
    assert [line for line in out if line.startswith("test, epoch ") and "loss" in line and "[" in line]
    rows = read_lines(tmp_path / "a/tiny/speed.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10]
    assert all(row["speed/forward_s"] > 0 and row["speed/samples_per_s"] > 0 and "speed/mfu" not in row for row in rows)
    trace, collectives = sorted((tmp_path / "a/tiny/profile").iterdir(), key=lambda file: file.suffix)
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert trace.name == "steps_2_to_3_rank_0.json.gz" and "aten::addmm" in names
    assert read_json(collectives)["collectives"] == {}, "one process sends nothing"

    monkeypatch.setitem(speed.PEAKS, "cpu", (1.0, 0.5))
    assert main([*words, "--runs_dir", str(tmp_path / "b")]) == 0
    rows = read_lines(tmp_path / "b/tiny/speed.jsonl")
    assert all(0 < row["speed/mfu"] < 1 for row in rows) and "% of the peak" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / f"{run}/tiny/summary.json").read_text())["weights_checksum"] for run in "ab")
    assert a == b


def test_only_one_rank_speaks(tiny: Path, tmp_path: Path) -> None:
    words = ["--removal.fractions", "[]", "--train.epochs", "1", "--train.profile", "[1, 1]"]
    train(tiny, tmp_path, *words)
    rows = read_lines(tmp_path / "tiny/speed.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    found = {file.name for file in (tmp_path / "tiny/profile").iterdir()}
    ends = ("_collectives.json", ".json.gz")
    assert found == {f"steps_1_to_1_rank_{rank}{end}" for rank in (0, 1) for end in ends}
    times = read_json(tmp_path / "tiny/profile/steps_1_to_1_rank_0_collectives.json")
    assert times["collectives"]["gloo:all_gather"] > 0 and times["seconds"] > 0


def test_the_line_of_the_test() -> None:
    summary = {"best_epoch": 3, "test": {"loss": 0.5, "accuracy": 0.75, "f1": 0.5, "auroc": 0.9}}
    assert line_of_test(summary) == "test, epoch 3: loss 0.5, accuracy 0.75, f1 0.5"
    assert line_of_test(summary | {"test_intervals": {"loss": [0.4, 0.6]}}).startswith(
        "test, epoch 3: loss 0.5 [0.4, 0.6], "
    )
    assert line_of_test({"best_epoch": 3}) == ""
