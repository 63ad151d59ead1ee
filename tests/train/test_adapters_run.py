"""Adapters in the trainer: the same numbers on sharded weights, small checkpoints, and merged weights in the export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .test_recipes import SMALL, instructions_7b
from .test_tensor_parallel_run import losses, trained

OPTIONS = [
    "--train.precision",
    "fp32",
    "--train.epochs",
    "2",
    "--log_every",
    "1",
    "--method",
    "lora",
    "--optimizer.lr",
    "0.01",
]
OPTIONS += ["--checkpoint.every", "1", "--checkpoint.keep_last", "99", "--lora.rank", "2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SMALL, *instructions_7b(tmp_path_factory.mktemp("data")), *OPTIONS]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v
        for file in (folder / "it/model").glob("*.safetensors")
        for k, v in load_file(file).items()
        if v.is_floating_point()
    }


def test_the_same_on_sharded_weights(recipe: list[str], tmp_path: Path) -> None:
    """One process, DDP, FSDP2 on two and four ranks, a run that goes on elsewhere."""
    one = trained(recipe, tmp_path / "one", 1, "--engine", "single")
    expected, weights = losses(tmp_path / "one"), exported(tmp_path / "one")
    start = load_file(Path(recipe[recipe.index("--model.weights") + 1]) / "model.safetensors")
    moved = [name for name, weight in weights.items() if not torch.equal(weight, start[name])]
    assert moved and all("proj" in name or name == "lm_head.weight" for name in moved), "layers with adapters, or a head"
    assert not any("lora" in name or "base_layer" in name for name in weights), "merged, under their former names"
    stored = [load_file(file) for file in (tmp_path / "one/it/checkpoints").glob("step_*/*.safetensors")]
    assert stored and all(".lora_" in name for part in stored for name in part if name.startswith("model."))
    saving = [
        "--train.activation_checkpointing",
        "blocks",
        "--train.activations_on_host",
        "true",
        "--sharding.reduce",
        "each",
    ]
    for ranks, engine, more in ((2, "ddp", []), (2, "fsdp2", []), (4, "fsdp2", saving)):
        folder = tmp_path / f"{engine}{ranks}"
        found = trained(recipe, folder, ranks, "--engine", engine, *more)
        assert losses(folder) == pytest.approx(expected, rel=1e-4), folder
        assert found["test"] == pytest.approx(one["test"], rel=1e-3)
        for name, weight in exported(folder).items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-4)
    run = tmp_path / "fsdp22/it"
    (run / "summary.json").unlink()
    for later in sorted((run / "checkpoints").glob("step_*"))[2:]:
        shutil.rmtree(later)
    found = trained(recipe, tmp_path / "fsdp22", 1, "--engine", "single")
    assert found["test"] == pytest.approx(one["test"], rel=1e-3)
    assert losses(tmp_path / "fsdp22") == pytest.approx(expected, rel=1e-4)
