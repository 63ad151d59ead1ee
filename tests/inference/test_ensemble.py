"""The mean of several runs: their probabilities, and metrics of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from PIL import Image
from safetensors.torch import load_file

from dcft_dist.cli import main
from dcft_dist.inference.ensemble import _MEANS

from ..data.volume_words import KEYS
from ..objectives.test_losses import ROWS
from ..processes import output_of
from ..train.test_run import encoder, tiny, train
from ..train.test_segmentation_run import flat_images
from .test_export import images

__all__ = ["encoder", "tiny"]


def test_folds_predict_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for fold in (0, 1):
        run = images(tmp_path, "--data.folds", "2", "--data.fold", str(fold), "--name", f"fold{fold}")
        runs.append(str(tmp_path / f"fold{fold}"))
        assert run.name == "images"
    more = ["--data.build", "blobs.rows", "--import_roots", f'["{tmp_path}"]']

    def rows_of(*names: str) -> list[dict[str, str]]:
        data = [] if "--data.build" in names else more
        assert main(["predict", *names, *data, "--out", str(tmp_path / "out.csv")]) == 0
        with (tmp_path / "out.csv").open() as file:
            return list(csv.DictReader(file))

    one, two, both = rows_of(runs[0]), rows_of(runs[1]), rows_of(*runs)
    columns = [name for name in both[0] if name.startswith("p(")]
    assert len(columns) == 4 and len(both) == 96
    for a, b, mean in zip(one, two, both, strict=True):
        for name in columns:
            assert float(mean[name]) == pytest.approx((float(a[name]) + float(b[name])) / 2, abs=2e-6)
        assert mean["predicted"] == max(columns, key=lambda name: float(mean[name]))[2:-1]
    assert any(a[columns[0]] != b[columns[0]] for a, b in zip(one, two, strict=True))
    capsys.readouterr()
    assert main(["evaluate", *runs, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    right = sum(row["predicted"] == "abcd"[i % 4] for i, row in enumerate(both))
    assert found["metrics"]["accuracy"] == pytest.approx(right / 96) and found["examples"] == 96

    mirrored = ROWS.replace("(28, 28, 3), dtype=np.uint8)", "(28, 28, 3), dtype=np.uint8)[:, ::-1].copy()")
    (tmp_path / "turned.py").write_text(mirrored)
    turned = rows_of(runs[0], "--data.build", "turned.rows", "--import_roots", f'["{tmp_path}"]')
    for a, b, mean in zip(one, turned, rows_of(runs[0], "--flips"), strict=True):
        for name in columns:
            assert float(mean[name]) == pytest.approx((float(a[name]) + float(b[name])) / 2, abs=2e-6)

    (tmp_path / "doses.py").write_text((tmp_path / "blobs.py").read_text().replace('"abcd"[i % 4]', "float(i % 4)"))
    images(tmp_path, "--data.build", "doses.rows", "--task.kind", "regression", "--name", "other")
    assert main(["predict", runs[0], str(tmp_path / "other"), *more]) == 2
    dist.destroy_process_group()
    assert "differs from" in capsys.readouterr().err


def test_the_mean_of_confident_models_is_a_number() -> None:
    logits = torch.tensor([[[900.0, 0.0, -3.0]], [[0.0, 1.0, 0.5]]], dtype=torch.float64)
    found = _MEANS["single_label"](logits)
    torch.testing.assert_close(found.softmax(-1), logits.softmax(-1).mean(0))
    assert found.isfinite().all() and _MEANS["single_label"](logits[:1]).isfinite().all()
    findings = torch.tensor([[[40.0, -40.0]], [[40.0, 0.3]]], dtype=torch.float64)
    found = _MEANS["multi_label"](findings)
    torch.testing.assert_close(found.sigmoid(), findings.sigmoid().mean(0))
    torch.testing.assert_close(_MEANS["multi_label"](findings[:1]), findings[0])


def test_runs_with_other_test_texts_have_no_mean(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engine", "single", "--train.epochs", "1", "--removal.fractions", "[]", "--method", "linear_probe"]
    for seed in ("1", "2"):
        train(tiny, tmp_path, *words, "--task.split_seed", seed, "--name", f"split{seed}", ranks=1)
    runs = [str(tmp_path / "split1"), str(tmp_path / "split2")]
    assert main(["predict", *runs]) == 2
    dist.destroy_process_group()
    assert "have other examples or labels, of which no mean can be taken" in capsys.readouterr().err
    assert main(["predict", runs[0], runs[0], "--masks", "somewhere"]) == 2
    dist.destroy_process_group()
    assert "--masks is for a segmentation" in capsys.readouterr().err


def test_masks_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two U-Nets and of mirrored images, on two ranks; MONAI and plain torch alone give the same mask."""
    words = [*KEYS, "--data.path", str(flat_images(tmp_path)), "--data.patch", "[32, 32]", "--runs_dir", str(tmp_path)]
    words += ["--model.build", "monai.networks.nets.UNet", "--model.head", '["model.2"]', "--engine", "single"]
    args = {"spatial_dims": "2", "in_channels": "1", "out_channels": "num_outputs", "channels": "[8, 16]", "strides": "[2]"}
    words += [word for key, value in args.items() for word in (f"--model.args.{key}", value)]
    words += ["--train.global_batch", "4", "--train.epochs", "2", "--optimizer.lr", "1e-2", "--method", "full"]
    words += [
        "--importance.num_samples",
        "4",
        "--importance.score_batch",
        "4",
        "--test_resamples",
        "0",
        "--head_warmup.max_epochs",
        "1",
    ]
    runs, nets = [tmp_path / "one", tmp_path / "two"], []
    for seed, run in enumerate(runs):
        assert main(["train", "mri.toml", *words, "--name", run.name, "--seed", str(seed)]) == 0
        nets.append(UNet(2, 1, 3, [8, 16], [2]).eval())
        nets[-1].load_state_dict(load_file(run / "model/model.safetensors"))
    (tmp_path / "asked.csv").write_text("image,mask\nimage5.png,mask5.png\nimage4.png,mask4.png\n")
    asked = [*runs, "--flips", "--data.path", tmp_path / "asked.csv"]
    output_of("predict", *asked, "--masks", tmp_path / "said", "--engine", "fsdp2", ranks=2)
    found = np.asarray(Image.open(tmp_path / "said/image5_mask.png"))
    pixels = np.asarray(Image.open(tmp_path / "image5.png"), np.float32)
    image = torch.from_numpy((pixels - pixels.mean()) / pixels.std())[None, None]
    with torch.no_grad():
        seen = [(net, axes) for net in nets for axes in ((), (-1,))]
        alone = [
            sliding_window_inference(image.flip(axes), (32, 32), 1, net, overlap=0.25, mode="gaussian").flip(axes).softmax(1)
            for net, axes in seen
        ]
    mean = torch.stack(alone).mean(0)[0]
    assert np.mean(mean.argmax(0).numpy() != found) < 1e-3
    assert all(np.mean(one[0].argmax(0).numpy() != found) > 1e-3 for one in alone)  # none of them alone
    capsys.readouterr()
    assert main(["evaluate", *map(str, asked)]) == 0
    metrics, wanted = json.loads(capsys.readouterr().out)["metrics"], np.asarray(Image.open(tmp_path / "mask5.png"))
    both = [(found, wanted), *[(np.asarray(Image.open(tmp_path / f)) for f in ("said/image4_mask.png", "mask4.png"))]]
    dice = [[2 * np.sum((a == c) & (b == c)) / (np.sum(a == c) + np.sum(b == c)) for c in (1, 2)] for a, b in both]
    assert metrics["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert main(["train", "mri.toml", *words, "--name", "odd", "--data.window", "[0, 200]"]) == 0
    assert main(["evaluate", str(runs[0]), str(tmp_path / "odd"), "--data.path", str(tmp_path / "asked.csv")]) == 2
    assert "differs from" in (said := capsys.readouterr().err) and "data.window" in said
    dist.destroy_process_group()
