"""The configurations of docs/models.md at toy size: the true architectures, random weights, the engines they name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..own import drug_table, instructions, minilm_copy, mri_folder, slabs, tiny_decoder
from ..processes import output_of

SMALL = ["--train.global_batch", "8", "--train.micro_batch", "4", "--importance.num_samples", "16", "--train.epochs", "1"]
SMALL += ["--importance.score_batch", "8", "--removal.fractions", "[]", "--test_resamples", "0"]


def images(folder: Path) -> list[str]:
    patches = mri_folder(folder / "patches", 6)
    rows = [[str(f.relative_to(folder)), f.parent.name, f.name.split("_")[0]] for f in sorted(patches.rglob("*.png"))]
    with (folder / "tiles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "tissue", "patient"], *rows])
    return ["--data.path", str(folder / "tiles.csv"), "--model.image_size", "56"]


def pathology_vit_giant(folder: Path) -> list[str]:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 70, "patch_size": 14}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)).save_pretrained(
        folder / "vit"
    )  # with the names it was published with
    return [*images(folder), "--model.weights", str(folder / "vit")]


def encoder_sam(folder: Path) -> list[str]:
    from transformers import SamConfig, SamModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 64, "output_channels": 16}
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 56, "patch_size": 14, "window_size": 2, "global_attn_indexes": [2]}
    SamModel(SamConfig(vision_config=vision)).save_pretrained(folder / "sam")
    return [*images(folder), "--data.label", "tissue", "--model.weights", str(folder / "sam"), "--model.width", "16"]


def reports_bert(folder: Path) -> list[str]:
    table = drug_table(folder / "reviews.csv", 80)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "reports.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "effusion", "pneumonia", "patient"])
        for i, row in enumerate(rows):
            unknown = "" if i % 7 == 0 else int(row["rating"] == "positive")
            writer.writerow([row["review"], int(row["rating"] == "negative"), unknown, row["drug"]])
    weights = minilm_copy(folder / "bert", layers=1)
    return ["--data.path", str(folder / "reports.csv"), "--model.weights", str(weights), "--task.max_tokens", "32"]


def instructions_7b(folder: Path) -> list[str]:
    data, weights = instructions(folder / "codes.jsonl", 80), tiny_decoder(folder / "decoder")
    columns = ["--data.input", "prompt", "--data.label", "answer", "--task.max_tokens", "64"]
    return ["--data.path", str(data), "--model.weights", str(weights), *columns]


def swin_unetr(folder: Path) -> list[str]:
    from monai.networks.nets import SwinUNETR

    sizes = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 3, "depths": (1, 1, 1, 1)}
    state = SwinUNETR(**sizes, num_heads=(1, 2, 4, 8)).state_dict()
    save_file({n: v.contiguous() for n, v in state.items() if n.startswith("swinViT")}, folder / "swin.safetensors")
    words = ["--data.path", str(slabs(folder)), "--data.split", "split", "--model.weights", str(folder / "swin.safetensors")]
    words += [
        "--model.args.feature_size",
        "12",
        "--model.args.depths",
        "[1, 1, 1, 1]",
        "--model.args.num_heads",
        "[1, 2, 4, 8]",
    ]
    words += ["--train.precision", "fp32"]  # bf16 is slow here: `engines.wrap` does without oneDNN, see test_segmentation.py
    words += ["--data.patch", "[64, 32, 32]", "--head_warmup.max_epochs", "1", "--data.window", "[0, 100]"]
    return [*words, "--importance.num_samples", "4", "--importance.score_batch", "2", "--train.global_batch", "2"]


def instructions_70b(folder: Path) -> list[str]:
    return instructions_7b(folder)


def instructions_70b_lora(folder: Path) -> list[str]:
    return instructions_7b(folder)


MADE = (pathology_vit_giant, encoder_sam, reports_bert, instructions_7b, instructions_70b, instructions_70b_lora, swin_unetr)
RECIPES = {made.__name__: made for made in MADE}


ZERO3 = ["--engine", "deepspeed", "--sharding.zero_stage", "3"]


RUNS = [*((recipe, []) for recipe in RECIPES), ("instructions_7b", ZERO3), ("encoder_sam", ZERO3)]


def check_sam(folder: Path) -> None:
    """The exported encoder in transformers' own class gives what `dcft predict` says, in bfloat16 as the run."""
    from transformers import AutoModel

    out = output_of("predict", folder / "toy", "--data.path", folder / "tiles.csv")
    rows = list(csv.DictReader(out.splitlines()))[:6]
    whole, report = AutoModel.from_pretrained(folder / "toy/model", output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    net = whole.vision_encoder.eval()
    names = [key for key in rows[0] if key.startswith("p(")]
    head = torch.nn.Linear(16, len(names))
    head.load_state_dict(load_file(folder / "toy/model/head/model.safetensors"))
    facts = json.loads((folder / "toy/model/preprocessor_config.json").read_text())
    mean, std = (torch.tensor(facts[f"image_{key}"]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = [torch.from_numpy(np.array(Image.open(row["input"]).convert("RGB"))).permute(2, 0, 1) / 255 for row in rows]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sized = torch.nn.functional.interpolate(torch.stack(pixels), (56, 56), mode="bilinear", antialias=True)
        states = net((sized - mean) / std).last_hidden_state
        shares = head(states.flatten(2).mean(-1)).double().softmax(-1)
    found = torch.tensor([[float(row[name]) for name in names] for row in rows]).double()
    torch.testing.assert_close(found, shares, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("recipe", "engine"), RUNS)
def test_recipes_run_at_toy_size(recipe: str, engine: list[str], tmp_path: Path) -> None:
    """Under the engine and in the precision that they say, most in bfloat16."""
    words = [*SMALL, *RECIPES[recipe](tmp_path), "--runs_dir", str(tmp_path), "--name", "toy", *engine]
    output_of("train", f"{recipe}.toml", *words, ranks=2)
    summary = json.loads((tmp_path / "toy/summary.json").read_text())
    if summary["method"] == "dcft":
        assert summary["num_selected"] == round(0.1 * summary["num_eligible"]) > 0
    assert summary["ranks"] == 2 and summary["method"] == ("lora" if recipe.endswith("lora") else "dcft")
    assert summary["loading"]["matched"] and all(value == value for value in summary["test"].values())
    best = {"reports_bert": "auroc", "swin_unetr": "dice"}.get(recipe, "accuracy")
    best = "perplexity" if recipe.startswith("instructions") else best
    assert best in summary["validation"] and (tmp_path / "toy/report.html").exists()
    if recipe == "encoder_sam":
        check_sam(tmp_path)
    if recipe == "pathology_vit_giant":
        from transformers import AutoModel

        read, report = AutoModel.from_pretrained(tmp_path / "toy/model", output_loading_info=True)
        written = load_file(tmp_path / "toy/model/model.safetensors")
        assert not any(report.values()) and all(torch.equal(v, written[n]) for n, v in read.state_dict().items())
