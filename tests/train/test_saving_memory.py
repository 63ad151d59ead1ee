"""Settings of a run that save memory or time: the results stay the same, and a run may go on with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcft_dist.cli import main
from dcft_dist.files import read_lines
from dcft_dist.train import steps

from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]

EXACT = {
    "blocks": ["--train.activation_checkpointing", "blocks"],
    "selective": ["--train.activation_checkpointing", "selective"],
    "on the host": ["--train.activation_checkpointing", "blocks", "--train.activations_on_host", "true"],
}
ROUNDED = {
    "compiled": ["--train.compile", "aot_eager"],
    "fused": ["--optimizer.fused", "true"],
    "reduced early": ["--sharding.reduce", "each", "--sharding.prefetch", "1"],
}
PLAIN = ["--train.epochs", "1", "--train.micro_batch", "2", "--removal.fractions", "[]"]


def alone(tiny: Path, runs: Path, *words: str) -> dict[str, Any]:
    """A run in this process, under no engine."""
    assert main(["train", str(tiny), "--runs_dir", str(runs), "--engine", "single", *PLAIN, *words]) == 0
    summary: dict[str, Any] = json.loads((runs / "tiny/summary.json").read_text())
    return summary


def losses(runs: Path) -> list[float]:
    return [row["train/loss"] for row in read_lines(runs / "tiny/metrics.jsonl") if "train/loss" in row]


def test_alone(tiny: Path, tmp_path: Path) -> None:
    plain = alone(tiny, tmp_path / "plain")
    for name, words in EXACT.items():
        assert alone(tiny, tmp_path / name, *words)["weights_checksum"] == plain["weights_checksum"], name
    for name, words in ROUNDED.items():
        alone(tiny, tmp_path / name, *words)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4), name


def test_on_two_ranks(tiny: Path, tmp_path: Path) -> None:
    plain = train(tiny, tmp_path / "plain", *PLAIN)
    blocks = train(tiny, tmp_path / "blocks", *PLAIN, *EXACT["blocks"])
    assert blocks["weights_checksum"] == plain["weights_checksum"]
    train(tiny, tmp_path / "all", *PLAIN, *EXACT["selective"], *(word for words in ROUNDED.values() for word in words))
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_on_four_ranks(tiny: Path, tmp_path: Path, engine: str) -> None:
    """All keys at once that must not change a bit."""
    options = [*PLAIN, "--engine", engine, "--sharding.zero_stage", "3", "--checkpoint.every", "2"]
    plain = train(tiny, tmp_path / "plain", *options, ranks=4)
    beside = ["--checkpoint.background", "true", "--checkpoint.staging", str(tmp_path / "node"), "--sharding.prefetch", "1"]
    shown = ["--trackers", '["wandb", "mlflow"]', "--train.profile", "[2, 3]"]
    found = train(tiny, tmp_path / "all", *options, *EXACT["on the host"], *beside, *shown, ranks=4)
    assert found["weights_checksum"] == plain["weights_checksum"] and found["test"] == plain["test"]
    assert losses(tmp_path / "all") == losses(tmp_path / "plain") != []


def test_a_run_goes_on_with_other_settings(tiny: Path, tmp_path: Path) -> None:
    """Asked to stop in its first step, and again in the next, each time with other settings."""
    plain, runs = alone(tiny, tmp_path / "plain"), tmp_path / "stopped"
    words = ["train", str(tiny), "--runs_dir", str(runs), "--engine", "single", *PLAIN]
    for settings in (EXACT["blocks"], [*EXACT["selective"], "--sharding.reduce", "each"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "stop_requested", lambda: True)
            assert main([*words, *settings]) == 0
        dist.destroy_process_group()  # a process that was asked to stop ends
        assert not (runs / "tiny/summary.json").exists()
    assert main(words) == 0
    assert json.loads((runs / "tiny/summary.json").read_text())["weights_checksum"] == plain["weights_checksum"]
    begun = [start["at"] for start in read_lines(runs / "tiny/attempts.jsonl")]
    assert len(begun) == 3 and all(at.startswith("step") for at in begun[1:]) and begun[1] != begun[2], begun
