"""The recipes whose libraries need torchvision, in an environment of their own (tests/run.sh): timm and open_clip."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcft_dist.cli import main
from dcft_dist.config.toml import load_config
from dcft_dist.data.augment import Augmentation
from dcft_dist.data.images import UserImageProcessor
from dcft_dist.data.library_processor import as_picture
from dcft_dist.data.mixing import mixed
from dcft_dist.data.presets import preset
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError
from dcft_dist.models.build import build_model
from dcft_dist.seeds import seed_of, seeded

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

NUMBER, SIDE, MEAN, STD = 50, 32, 0.4, 0.3
SMALL = ["--train.global_batch", "8", "--train.micro_batch", "4", "--importance.num_samples", "16", "--train.epochs", "1"]
SMALL += ["--importance.score_batch", "8", "--removal.fractions", "[]", "--test_resamples", "0", "--train.precision", "fp32"]
SMALL += ["--data.mean", str([MEAN] * 3), "--data.std", str([STD] * 3)]


def photographs(folder: Path, label: str, side: int = SIDE) -> Path:
    """Brighter from grade to grade, two of each patient."""
    random, rows = np.random.default_rng(0), []
    for i in range(NUMBER):
        pixels = random.integers(0, 60, (side, side, 3)) + 40 * (i // 2 % 5)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append([f"{i}.png", i // 2 % 5, f"patient{i // 2}"])
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", label, "patient"], *rows])
    return folder / "images.csv"


def adapted(folder: Path, recipe: str, words: list[str]) -> tuple[dict[str, Any], list[dict[str, str]], Tensor]:
    """A recipe trained on two ranks: its summary, what `dcft predict` says of all images, and the images as it saw them."""
    words = [*SMALL, *words, "--data.path", str(folder / "images.csv"), "--runs_dir", str(folder), "--name", "toy"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}
    begin = [[*launcher, "dcft_dist.cli", "train", recipe, *words], [sys.executable, "-m", "dcft_dist.cli", "predict"]]
    begin[1] += [str(folder / "toy"), "--data.path", str(folder / "images.csv")]
    said = ""
    for command in begin:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    pixels = [np.asarray(Image.open(folder / f"{i}.png"), dtype=np.float32) / 255 for i in range(NUMBER)]
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - MEAN) / STD
    summary = json.loads((folder / "toy/summary.json").read_text())
    assert summary["ranks"] == 2 and summary["num_selected"] == round(0.1 * summary["num_eligible"]) > 0
    return summary, list(csv.DictReader(said.splitlines())), images


@pytest.mark.parametrize(("recipe", "weights"), [("retina_vit_large", 303e6), ("biomed_clip", 86e6)])
def test_recipes_at_true_size(recipe: str, weights: float, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train.micro_batch", "4", "--ranks", "8", "--json"]
    assert main(["plan", "--model", f"configs/{recipe}.toml", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == pytest.approx(weights, rel=0.01) and found["fits"] and found["bits"] > 0


@pytest.mark.parametrize("kind", ["single_label", "regression"])
def test_a_masked_autoencoder_of_timm_grades(kind: str, tmp_path: Path) -> None:
    """As RETFound comes: in a .pth with the decoder of its training, without the norm after the pooling."""
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    torch.manual_seed(0)
    net = timm.create_model("vit_large_patch16_224", num_classes=0, global_pool="token", **sizes)
    state = {**net.state_dict(), "decoder_embed.weight": torch.zeros(3), "mask_token": torch.zeros(1)}
    torch.save({"model": state, "epoch": 799}, tmp_path / "RETFound.pth")
    photographs(tmp_path, "grade")
    words = [w for key, value in sizes.items() for w in (f"--model.args.{key}", str(value))]
    words += ["--model.image_size", str(SIDE)]
    words += ["--task.kind", kind, "--train.metric", "quadratic_kappa"] if kind == "regression" else []
    summary, said, images = adapted(
        tmp_path, "retina_vit_large.toml", [*words, "--model.weights", str(tmp_path / "RETFound.pth")]
    )
    assert sorted(summary["loading"]["fresh"]) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert {"mae", "quadratic_kappa"} <= summary["validation"].keys() or kind == "single_label"
    outputs = 5 if kind == "single_label" else 1
    exported = timm.create_model("vit_large_patch16_224", num_classes=outputs, global_pool="avg", **sizes)
    exported.load_state_dict(load_file(tmp_path / "toy/model/model.safetensors"))
    with torch.no_grad():
        found = exported.eval()(images)
    if kind == "single_label":
        for grade in range(5):
            shares = found.softmax(-1)[:, grade].tolist()
            assert [float(row[f"p({grade})"]) for row in said] == pytest.approx(shares, abs=1e-5)
        return
    outputs = found.squeeze(1) * summary["labels"]["std"] + summary["labels"]["mean"]
    assert [float(row["predicted"]) for row in said] == pytest.approx(outputs.tolist(), abs=1e-5)
    assert f"multiply it by {summary['labels']['std']} and add" in (tmp_path / "toy/model/README.md").read_text()


def test_the_norm_before_a_classifier_is_not_part_of_it(tmp_path: Path) -> None:
    """ConvNeXt keeps both under `head`; the norm is pre-trained."""
    torch.manual_seed(0)
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    net = timm.create_model("convnext_atto", num_classes=7, **sizes)
    nn.init.uniform_(net.head.norm.weight)
    save_file(net.state_dict(), tmp_path / "convnext.safetensors")
    words = ["--model.build", "timm.create_model", "--model.args.model_name", "convnext_atto"]
    words += ["--model.args.num_classes", "num_outputs", "--model.weights", str(tmp_path / "convnext.safetensors")]
    words += [w for key, value in sizes.items() for w in (f"--model.args.{key}", json.dumps(value))]
    found = build_model(load_config("mri.toml", ["--task.name", "own", "--data.path", "x", *words]), 4)
    assert found.head == ("head.fc",) and found.loading is not None
    found.loading.into_whole(found.module, torch.device("cpu"))
    read = found.module.state_dict()
    assert torch.equal(read["head.norm.weight"], net.head.norm.weight) and read["head.fc.weight"].shape == (4, 16)


def test_the_image_tower_of_a_clip_classifies(tmp_path: Path) -> None:
    """The tower of words is built by the library, and left aside."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    sizes: dict[str, Any] = {"vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}, "embed_dim": 24}
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-16", **sizes)
    torch.save(clip.state_dict(), tmp_path / "clip.bin")
    photographs(tmp_path, "finding", 224)
    words = ["--model.args.embed_dim", "24", "--model.args.vision_cfg.timm_model_name", "vit_tiny_patch16_224"]
    words += [w for key, value in sizes["text_cfg"].items() for w in (f"--model.args.text_cfg.{key}", str(value))]
    words += ["--model.weights", str(tmp_path / "clip.bin"), "--model.width", "24"]
    summary, said, images = adapted(tmp_path, "biomed_clip.toml", words)
    assert sorted(summary["loading"]["fresh"]) == ["head.bias", "head.weight"]
    assert all("visual" not in name for name in summary["loading"]["matched"])
    clip.visual.load_state_dict(load_file(tmp_path / "toy/model/model.safetensors"))
    head = nn.Linear(24, 5)
    head.load_state_dict(load_file(tmp_path / "toy/model/head/model.safetensors"))
    with torch.no_grad():
        shares = head(clip.visual.eval()(images)).softmax(-1)
    for grade in range(5):
        assert [float(row[f"p({grade})"]) for row in said] == pytest.approx(shares[:, grade].tolist(), abs=1e-5)


def of_timm(folder: Path) -> Any:
    """What is in a folder of the hub beside the weights."""
    facts = {
        "input_size": [3, SIDE, SIDE],
        "interpolation": "bicubic",
        "crop_pct": 0.8,
        "mean": [0.7, 0.5, 0.6],
        "std": [0.2] * 3,
    }
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": facts}))
    return timm.data.create_transform(**{**facts, "input_size": (3, SIDE, SIDE)})


def of_open_clip(folder: Path) -> Any:
    facts = {"mean": [0.48, 0.45, 0.4], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
    sizes = {"vision_cfg": {"image_size": SIDE}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": facts}))
    return open_clip.image_transform(SIDE, is_train=False, **facts)


@pytest.mark.parametrize("make", [of_timm, of_open_clip])
def test_the_preprocessing_of_their_hubs(make: Any, tmp_path: Path) -> None:
    """Mean and deviation always, resizing and cropping if asked; the export says the same."""
    theirs, colours = make(tmp_path), np.random.default_rng(0).integers(0, 256, (53, 75, 3)).astype(np.uint8)
    words = ["--task.name", "own", "--data.path", "x", "--model.image_size", str(SIDE), "--model.build", "json.loads"]
    words += ["--model.weights", str(tmp_path / "weights.bin")]
    squared = UserImageProcessor(load_config("mri.toml", words))
    mine = UserImageProcessor(load_config("mri.toml", [*words, "--data.processor", "true"]))
    torch.testing.assert_close(mine.image(colours), theirs(Image.fromarray(colours)))
    small = colours[:SIDE, :SIDE]
    wanted = (torch.from_numpy(small).permute(2, 0, 1) / 255 - torch.tensor(mine.mean).view(3, 1, 1)) / mine.std[0]
    torch.testing.assert_close(squared.image(small)[0], wanted[0])
    (tmp_path / "export").mkdir()
    mine.save(tmp_path / "export")
    (said,) = (tmp_path / "export").iterdir()
    assert said.read_bytes() == (tmp_path / said.name).read_bytes()


def test_mixed_images_are_those_of_torchvision() -> None:
    from torchvision.transforms import v2

    images = torch.randn(4, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 2])
    batch = {"pixel_values": images, "labels": labels, "index": torch.arange(4), "real": torch.ones(4, dtype=torch.bool)}
    blended = mixed(batch, mixup=0.4, cutmix=0.0, classes=3, seed=5)
    lam = float(np.random.default_rng(5).beta(0.4, 0.4))
    transform: Any = v2.MixUp(num_classes=3)
    for name, value in (("pixel_values", images), ("labels", labels)):
        expected = transform.transform(value, {"labels": labels, "batch_size": 4, "lam": lam})
        torch.testing.assert_close(blended[name], expected)
    pasted = mixed(batch, mixup=0.0, cutmix=1.0, classes=3, seed=5)
    foreign = (pasted["pixel_values"] != images)[0, 0]
    (top, left), (low, right) = foreign.nonzero().amin(0).tolist(), (foreign.nonzero().amax(0) + 1).tolist()
    share = 1.0 - (low - top) * (right - left) / 600
    transform = v2.CutMix(num_classes=3)
    options = {"labels": labels, "batch_size": 4, "box": (left, top, right, low), "lam_adjusted": share}
    for name, value in (("pixel_values", images), ("labels", labels)):
        torch.testing.assert_close(pasted[name], transform.transform(value, options))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original-mstd0.5"])
def test_variants_are_those_of_timm(policy: str, tmp_path: Path) -> None:
    """The policy that timm's own `create_transform` takes, from the seed of (seed, epoch, example)."""
    photographs(tmp_path, "label")
    words = ["--task.name", "own", "--data.path", str(tmp_path / "images.csv"), "--model.image_size", str(SIDE)]
    words += ["--data.input", "path", "--data.augment", policy]
    config = load_config("mri.toml", words)
    examples = UserImageProcessor(config)(user_task(config).train)
    plain, first, again, later = (examples.inputs(range(6), draw)["pixel_values"] for draw in (None, 1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, plain)
    given = {"auto_augment": policy, "interpolation": "random", "mean": tuple(config.data.mean)}  # as its training script
    theirs = timm.data.create_transform(SIDE, is_training=True, **given).transforms
    (wanted,) = (t for t in theirs if type(t).__module__ == "timm.data.auto_augment")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
    for i, image in enumerate(plain * std + mean):
        with seeded(seed_of(config.seed, f"1:{i}")):
            varied = torch.from_numpy(np.array(wanted(as_picture(image)))).permute(2, 0, 1) / 255
        torch.testing.assert_close((varied - mean) / std, first[i], atol=1e-5, rtol=0)


def test_a_policy_that_timm_does_not_know() -> None:
    words = ["--task.name", "own", "--data.path", "x", "--data.augment"]
    for name in ("Light", "rand-m9-foo", "v0"):  # the last one asks Pillow for 0 bits, now and then
        with pytest.raises(ConfigError, match=f"augment = '{name}': there are none, light, strong, and timm's policies"):
            load_config("mri.toml", [*words, name])
    with pytest.raises(ConfigError, match="timm does not know 'augmix-n3'"):
        preset(load_config("mri.toml", [*words, "augmix-n3"]), [0.5])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "augmix-m3", "original", "originalr", "v0r", "3a"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_policy_takes_grey_and_coloured_images(policy: str, channels: int) -> None:
    config = load_config("mri.toml", ["--task.name", "own", "--data.path", "x", "--data.augment", policy])
    vary = Augmentation(config, [0.5] * channels)
    image = torch.rand(channels, 24, 24, generator=torch.Generator().manual_seed(0))
    for draw in range(60):
        found = vary(image, str(draw))
        assert found.shape == image.shape and found.min() >= 0 and found.max() <= 1
