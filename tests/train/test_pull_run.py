"""Runs with a pull by importance: the same under every engine, after an interruption, and beside a penalty."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.errors import ConfigError
from dcft_dist.files import read_lines

from .test_run import encoder, tiny, train

__all__ = ["encoder", "tiny"]

PULL = ["--optimizer.lr", "0.002", "--optimizer.pull_to_start", "200", "--train.fall_back", "false"]
PULL += ["--optimizer.pull_by_importance", "0.5", "--removal.fractions", "[]"]
ENGINES: dict[str, tuple[int, list[str]]] = {
    "fsdp2": (2, []),
    "fsdp2 of four": (4, ["--engine", "fsdp2"]),
    "zero3": (2, ["--engine", "deepspeed", "--sharding.zero_stage", "3"]),
}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted((run / "model").rglob("*.safetensors")) for k, v in load_file(f).items() if v.dim()}


def same(one: Path, other: Path, atol: float = 2e-4) -> None:
    here, there = weights(one), weights(other)
    assert here.keys() == there.keys()
    for name, weight in here.items():
        torch.testing.assert_close(there[name].float(), weight.float(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def same_course(one: Path, other: Path, rel: float = 0.0) -> None:
    """The same losses at every step: the best epoch alone may lie before the point from which a run went on."""
    here, there = (read_lines(run / "metrics.jsonl") for run in (one, other))
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for row, again in zip(here, there, strict=True):
        losses = {key: value for key, value in row.items() if key.endswith("/loss")}
        assert losses == pytest.approx({key: again[key] for key in losses}, rel=rel, abs=0.0), row["step"]


@pytest.mark.parametrize("method", ["full", "dcft"])
def test_a_run_with_a_pull(tiny: Path, tmp_path: Path, method: str) -> None:
    """Alone, on two and four ranks, and under DeepSpeed: the same levels, and the same weights to rounding."""
    words = [*PULL, "--method", method]
    train(tiny, tmp_path, *words, "--engine", "single", "--name", "one", ranks=1)
    one = tmp_path / "one"
    levels = load_file(one / "levels.safetensors")
    assert all(v.dtype == torch.uint8 for v in levels.values()) and (one / "fundamental.safetensors").exists() is (
        method == "dcft"
    )
    for engine, (ranks, more) in ENGINES.items():
        if engine == "fsdp2" and method == "dcft":
            continue  # four ranks say as much
        other = tmp_path / engine.replace(" ", "_")
        train(tiny, tmp_path, *words, *more, "--name", other.name, ranks=ranks)
        for name, level in load_file(other / "levels.safetensors").items():  # scores may differ in their last digit
            off = (level.int() - levels[name].int()).abs()
            assert off.max() <= 1 and off.float().mean() < 0.01
        same(one, other)
    plain = [*words, "--optimizer.pull_by_importance", "0.0", "--engine", "single", "--name", "plain"]
    train(tiny, tmp_path, *plain, ranks=1)
    assert not (tmp_path / "plain/levels.safetensors").exists()
    with pytest.raises(AssertionError):
        same(one, tmp_path / "plain", atol=1e-6)
    assert main(["verify", str(one)]) == 0


def test_a_run_goes_on_with_its_levels(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PULL, "--method", "full", "--engine", "single", "--checkpoint.keep_last", "9"]
    train(tiny, tmp_path, *words, ranks=1)
    run, whole = tmp_path / "tiny", tmp_path / "whole"
    shutil.copytree(run, whole)
    for folder in sorted((run / "checkpoints").glob("*_*")):
        if int(folder.name.rpartition("_")[2]) > 5:
            shutil.rmtree(folder)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    train(tiny, tmp_path, *words, ranks=1)
    assert read_lines(run / "attempts.jsonl")[-1]["at"] == "step 5"
    same(whole, run, atol=0.0)
    same_course(whole, run)

    (run / "summary.json").unlink()
    data = bytearray((run / "levels.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "levels.safetensors").write_bytes(bytes(data))
    assert main(["train", str(tiny), "--runs_dir", str(tmp_path), *words]) != 0
    assert "levels.safetensors" in capsys.readouterr().err
    dist.destroy_process_group()


def test_levels_are_permuted_within_magnitudes(tiny: Path, tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        more = ["--optimizer.pull_levels", "permuted", "--engine", "single" if ranks == 1 else "fsdp2", "--name", name]
        train(tiny, tmp_path, *PULL, *more, "--method", "full", ranks=ranks)
    train(tiny, tmp_path, *PULL, "--method", "full", "--engine", "single", "--name", "plain", ranks=1)
    one, two, plain = (load_file(tmp_path / name / "levels.safetensors") for name in ("one", "two", "plain"))
    for name, levels in plain.items():
        assert torch.equal(one[name], two[name]) and not torch.equal(one[name], levels)
        assert torch.equal(one[name].reshape(-1).sort().values, levels.reshape(-1).sort().values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.pull_by_importance", "0.5"], "set optimizer.pull_to_start too"),
        (["--optimizer.pull_selective", "true"], "set optimizer.pull_to_start too"),
        (["--optimizer.pull_to_start", "1", "--optimizer.pull_levels", "permuted"], "without it there are no levels"),
        ([*PULL, "--method", "lora"], "is for methods full, dcft and equal_displacement, not for 'lora'"),
        ([*PULL, "--optimizer.pull_to_start", "400"], "1.2 of the way to the start at each step"),
        ([*PULL, "--optimizer.pull_to_start", "0.8", "--optimizer.pull_selective", "true"], "1.2 of the way to the start"),
    ],
)
def test_what_is_refused(tiny: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(tiny, words)
