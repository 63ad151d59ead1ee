"""Adapters in the trainer: the same numbers on sharded weights, small checkpoints, and merged weights in the export."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dcft_dist import FundamentalSet
from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.engines.box import Box
from dcft_dist.errors import ConfigError

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
    stages = [(2, "deepspeed", ["--sharding.zero_stage", str(stage)]) for stage in (2, 3)]
    for ranks, engine, more in ((2, "ddp", []), (2, "fsdp2", []), (4, "fsdp2", saving), *stages):
        folder = tmp_path / f"{engine}{ranks}{'-'.join(more)}"
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


def test_a_set_of_weights_that_are_trained_beside_adapters(recipe: list[str], tmp_path: Path) -> None:
    """Selected among them alone, penalised, and the same on two ranks; only the named layers have adapters."""
    more = [
        "--method",
        "lora_dcft",
        "--lora.beside",
        '["model.layers.1"]',
        "--lora.target_modules",
        '["q_proj", "*.mlp.up_proj"]',
    ]
    one = trained(recipe, tmp_path / "one", 1, "--engine", "single", *more)
    expected, weights = losses(tmp_path / "one"), exported(tmp_path / "one")
    chosen = FundamentalSet.load(tmp_path / "one/it/fundamental.safetensors")
    assert all(name.startswith("model.layers.1.") for name in chosen.names) and one["num_selected"] > 0
    start = load_file(Path(recipe[recipe.index("--model.weights") + 1]) / "model.safetensors")
    moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
    adapted = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    beside = {name for name in weights if name.startswith("model.layers.1.")}
    assert moved == adapted | beside
    for engine, words in {"fsdp2": [], "deepspeed": ["--sharding.zero_stage", "3"]}.items():
        trained(recipe, tmp_path / engine, 2, "--engine", engine, *more, *words)
        assert losses(tmp_path / engine) == pytest.approx(expected, rel=1e-4)
        for name, weight in exported(tmp_path / engine).items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-4)
        assert FundamentalSet.load(tmp_path / engine / "it/fundamental.safetensors").jaccard(chosen) == 1.0
    every = ["--importance.eligible", '["model.layers"]']  # also those that are not scored: adapters, frozen weights
    free = trained(recipe, tmp_path / "free", 1, "--engine", "single", *more, "--penalty.factor", "0.0", *every)
    chosen = FundamentalSet.load(tmp_path / "free/it/fundamental.safetensors")
    assert all(name.startswith("model.layers.1.") for name in chosen.names)
    mask = chosen.mask_in(
        "model.layers.1.mlp.up_proj.weight", Box.whole(tuple(start["model.layers.1.mlp.up_proj.weight"].shape))
    )
    frozen = (
        exported(tmp_path / "free")["model.layers.1.mlp.up_proj.weight"].flatten()
        == start["model.layers.1.mlp.up_proj.weight"].flatten()
    )
    assert free["factor"] == 0.0 and bool(frozen[mask].all()) and not bool(frozen[~mask].all())


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) % model.config.vocab_size
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_peft_reads_the_adapters(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LoRA with weights beside it, and a sparse fine-tuning as SHiRA: the outputs of the exported model."""
    base = recipe[recipe.index("--model.weights") + 1]
    beside = ["--lora.beside", '["model.layers.1.mlp", "model.norm"]', "--method", "lora_dcft"]
    trained(recipe, tmp_path / "lora", 2, "--engine", "fsdp2", *beside)
    sparse = ["--method", "dcft", "--penalty.factor", "1.0", "--penalty.rest_factor", "0", "--penalty.unscored_factor", "0"]
    fraction = ["--selection.fraction", "0.05", "--selection.cap", "0.2"]
    trained(recipe, tmp_path / "shira", 1, "--engine", "single", *sparse, *fraction)
    run = tmp_path / "shira/it"
    assert "were selected (factor 1.0, all others 0, update level), by fisher" in (run / "model/README.md").read_text()
    assert main(["shira", str(run), str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    changed = int(re.findall(r"([\d,]+) of them changed", said)[0].replace(",", ""))
    chosen = FundamentalSet.load(run / "fundamental.safetensors")
    assert 0.5 * chosen.num_selected < changed <= chosen.num_selected  # some gradients are 0

    plain = logits_of(AutoModelForCausalLM.from_pretrained(base))
    for merged, adapter in ((tmp_path / "lora/it/model", None), (run / "model", tmp_path / "adapter")):
        expected = logits_of(AutoModelForCausalLM.from_pretrained(merged))
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter or merged / "adapter")
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-3
    size = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert f"{size:,} bytes" in said and size < (run / "model/model.safetensors").stat().st_size

    assert main(["shira", str(tmp_path / "lora/it"), str(tmp_path / "no")]) == 2
    dist.destroy_process_group()
    assert "too many weights have changed for peft's SHiRA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lora_dcft"], "method 'lora_dcft' needs lora.beside"),
        (["--method", "full", "--lora.beside", '["model.norm"]'], "lora.beside has no meaning for method = 'full'"),
        (["--method", "lora_dcft", "--lora.beside", '["a"]', "--penalty.unscored_factor", "0"], "slow down the adapters"),
        (["--engine", "deepspeed", "--train.precision", "bf16"], "needs train.precision = 'fp32' under deepspeed"),
        (["--method", "bitfit", "--engine", "deepspeed", "--train.precision", "bf16"], "round the frozen weights"),
        (["--engine", "fsdp1"], "method 'lora' is not for the engine fsdp1"),
        (["--engine", "deepspeed", "--sharding.offload", "true"], "not for deepspeed with sharding.offload"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("instructions_7b.toml", ["--method", "lora", *words])
