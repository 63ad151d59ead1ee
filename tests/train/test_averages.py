"""Averages of the weights (EMA) and early stopping: in runs, under every engine, through interruptions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.data.batches import order
from dcft_dist.errors import ConfigError
from dcft_dist.files import read_json, read_lines
from dcft_dist.train.steps import Training
from dcft_dist.weights.averages import AveragedWeights

from ..ranks import run_ranks
from .test_interpolate import CONFIG, NORMALISED
from .test_pull_run import same, same_course, weights
from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]

EMA = ["--train.ema", "0.8", "--optimizer.lr", "2e-3", "--train.fall_back", "false", "--removal.fractions", "[]"]
EMA += ["--checkpoint.keep_last", "9"]


def _plain() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    net[0].bias.requires_grad_(False)
    mine, theirs = AveragedWeights(net, 0.9), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)  # its first call copies
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for step in range(5):
        optimizer.zero_grad()
        net(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        mine.update()
        theirs.update_parameters(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with mine.applied():
        for (name, p), average in zip(net.named_parameters(), theirs.module.parameters(), strict=True):
            assert torch.equal(p, average), name
            assert torch.equal(p, before[name]) is (name == "0.bias")
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert mine.values.keys() == {"0.weight", "2.weight", "2.bias"}


def test_averages_are_those_of_torch() -> None:
    run_ranks(1, _plain)


def averages_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored = load_file(checkpoint / "shard-00001-model-00001-of-00001.safetensors")
    return {name.removeprefix("average."): value for name, value in stored.items() if name.startswith("average.")}


def has_averages(run: Path, step: int) -> None:
    """The exported model has the averages of this step, and not its weights."""
    averages = {
        name.removeprefix("backbone.").removeprefix("head."): v
        for name, v in averages_of(run / f"checkpoints/step_{step:08d}").items()
    }
    exported = {name: value.flatten() for name, value in weights(run).items() if value.is_floating_point()}
    assert len(averages) > 10 and len(averages) == len(exported)
    for name, value in averages.items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=0)


def test_a_run_with_an_average(tiny: Path, tmp_path: Path) -> None:
    """What is exported is the average of the best epoch: alone, under FSDP2 and ZeRO-3, and if the best one is damaged."""
    one = tmp_path / "one"
    summary = train(tiny, tmp_path, *EMA, "--engine", "single", "--name", "one", ranks=1)
    assert summary["ema"] == 0.8 and "exponential moving average" in (one / "model/README.md").read_text()
    has_averages(one, 5 * summary["best_epoch"])
    for name, more in {"fsdp2": [], "zero3": ["--engine", "deepspeed", "--sharding.zero_stage", "3"]}.items():
        train(tiny, tmp_path, *EMA, *more, "--name", name)
        same(one, tmp_path / name)

    best = next((one / "checkpoints").glob("best_*"))
    file = next(best.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (one / "summary.json").unlink()
    again = train(tiny, tmp_path, *EMA, "--engine", "single", "--name", "one", ranks=1)
    assert "stands in for it" in str(again["changes"])
    has_averages(one, 5 * again["best_epoch"])


def test_an_average_survives_a_kill_and_another_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    words = [*EMA, "--method", "full"]
    train(tiny, tmp_path, *words)
    run, whole, moved = (tmp_path / name for name in ("tiny", "whole", "moved"))
    shutil.copytree(run, whole)
    for folder in sorted((run / "checkpoints").glob("*_*")):
        if int(folder.name.rpartition("_")[2]) > 3:  # within an epoch
            shutil.rmtree(folder)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    shutil.copytree(run, moved)
    train(tiny, tmp_path, *words)
    assert read_lines(run / "attempts.jsonl")[-1]["at"] == "step 3"
    same(whole, run, atol=0.0)
    same_course(whole, run)
    train(tiny, tmp_path, *words, "--engine", "single", "--name", "moved", ranks=1)
    same_course(whole, moved, rel=1e-4)


def test_batch_normalisation_has_the_statistics_of_the_average(tmp_path: Path) -> None:
    (tmp_path / "averaged.py").write_text(NORMALISED)
    text = CONFIG.format(folder=tmp_path).replace("normalised.", "averaged.").replace("private = true\n", "")
    text = text.replace('modality = "own"', 'modality = "own", collate = "averaged.collate"')
    (tmp_path / "bn.toml").write_text(text.replace("train = {", "train = {ema = 0.7, "))
    assert main(["train", str(tmp_path / "bn.toml")]) == 0
    found = load_file(next((tmp_path / "bn/model").rglob("model.safetensors")))
    module = sys.modules["averaged"]
    cases = [module.rows()["train"][i]["case"] for i in order(0, 0, 65)[:64]]
    inputs = torch.stack(list(module.collate(cases).values()), 1)
    before = inputs @ found["body.0.weight"].T + found["body.0.bias"]
    torch.testing.assert_close(found["body.1.running_mean"], before.mean(0), rtol=1e-4, atol=1e-5)


# -- early stopping ----------------------------------------------------------------------------------------------------


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Validation values that fall after epoch 2; the epochs that were validated."""
    seen: list[str] = []

    def value(trainer: object, metrics: dict[str, float]) -> float:
        seen.append("")
        return [0.5, 0.6, 0.7, 0.6, 0.5, 0.9, 0.95][len(seen) - 1]

    monkeypatch.setattr("dcft_dist.train.fine_tune.Trainer._validation_value", value)
    return lambda: seen


def test_a_run_stops_when_nothing_gets_better(
    tiny: Path, tmp_path: Path, worse: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single", "--method", "full", "--name", "stops"]
    words += ["--train.epochs", "6", "--train.patience", "2", "--checkpoint.keep_last", "9", "--removal.fractions", "[]"]
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert "stopped after epoch 4: none of the last 2 was better than epoch 2" in caplog.text
    run = tmp_path / "stops"
    assert read_json(run / "summary.json")["best_epoch"] == 2 and len(worse()) == 5
    rows = read_lines(run / "metrics.jsonl")
    assert rows[-1]["step"] == 20
    rates = {row["step"]: row["train/learning_rate"] for row in rows if "train/learning_rate" in row}
    assert rates[20] > 0.2 * max(rates.values())  # of all six epochs, not of four

    (run / "summary.json").unlink()  # as if it was ended right after its last checkpoint
    assert main(words) == 0
    assert len(worse()) == 5 and read_lines(run / "metrics.jsonl") == rows and (run / "summary.json").exists()


def test_a_stop_before_the_validation_changes_nothing(
    tiny: Path, tmp_path: Path, worse: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the last step of an epoch is not validated yet: who goes on from it makes up for that, and stops."""
    words = ["train", str(tiny), "--runs_dir", str(tmp_path), "--engine", "single", "--method", "full", "--name", "stops"]
    words += ["--train.epochs", "6", "--train.patience", "2", "--removal.fractions", "[]"]
    make = Training.step

    def step(training: Training, number: int, total: int, groups: Any) -> Any:
        values = make(training, number, total, groups)
        training.stopping = training.stopping or (number + 1 == 20 and len(worse()) == 4)
        return values

    monkeypatch.setattr(Training, "step", step)
    assert main(words) == 0 and len(worse()) == 4 and not (tmp_path / "stops/summary.json").exists()
    dist.destroy_process_group()  # a run that was stopped leaves it to the end of its process
    assert main(words) == 0
    assert read_json(tmp_path / "stops/summary.json")["best_epoch"] == 2 and len(worse()) == 5
    assert read_lines(tmp_path / "stops/metrics.jsonl")[-1]["step"] == 20


@pytest.mark.parametrize(("key", "value"), [("ema", "0.9"), ("max_steps", "50")])
def test_a_probe_has_no_step_to_average_or_to_time(key: str, value: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=f"train.{key} is for fine-tuning, and method = 'linear_probe' has none"):
        load_config(tiny, ["--method", "linear_probe", f"--train.{key}", value])
