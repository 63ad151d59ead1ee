"""Whole runs on volumes and masks: warm-up of a decoder, masks of predictions, volumes with a diagnosis."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from PIL import Image
from safetensors.torch import load_file

from dcft_dist.config.toml import load_config
from dcft_dist.data.user_task import user_task
from dcft_dist.data.volumes import LabelledVolumeProcessor
from dcft_dist.errors import DataError
from dcft_dist.files import write_json
from dcft_dist.models.build import build_model

from ..data.volume_words import KEYS
from ..own import slabs
from ..processes import dcft, output_of


def swin(folder: Path) -> list[str]:
    """A small SwinUNETR of MONAI with random weights, and slabs of a brain."""
    words = [*KEYS, "--data.path", str(slabs(folder)), "--runs_dir", str(folder), "--name", "run"]
    words += ["--model.build", "monai.networks.nets.SwinUNETR", "--model.head", '["encoder*", "decoder*", "out"]']
    args = {"in_channels": "1", "out_channels": "num_outputs", "feature_size": "12", "spatial_dims": "3"}
    for key, value in {**args, "depths": "[1, 1, 1, 1]", "num_heads": "[1, 2, 4, 8]"}.items():
        words += [f"--model.args.{key}", value]
    words += ["--data.patch", "[64, 32, 32]", "--train.global_batch", "2", "--train.micro_batch", "1", "--train.epochs", "1"]
    words += ["--importance.num_samples", "4", "--importance.score_batch", "2", "--head_warmup.max_epochs", "2"]
    return [*words, "--removal.fractions", "[]", "--test_resamples", "5", "--penalty.factor", "0.0"]


def test_the_decoder_is_warmed_up_and_the_encoder_stays(tmp_path: Path) -> None:
    """One process; under a sharding engine: test_recipes. The export is what MONAI reads."""
    words = [*swin(tmp_path), "--engine", "single", "--method", "linear_probe"]
    output_of("train", "mri.toml", *words)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"dice", "hd95", "dice_grey", "dice_white"} <= summary["test"].keys()
    assert "One of 3 classes for each voxel" in (tmp_path / "run/model/README.md").read_text()
    net = build_model(load_config("mri.toml", words), 3).module
    before = {name: value.clone() for name, value in net.state_dict().items()}  # from the seed
    after = load_file(tmp_path / "run/model/model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("encoder", "decoder", "out")) for name in moved)
    assert sum(name.startswith("decoder") for name in moved) > 10
    net.load_state_dict(after)
    check_masks(tmp_path)


def test_a_warm_up_that_diverges_is_said(tmp_path: Path) -> None:
    """All four slabs in one step, so that the validation is the first to see it."""
    words = [*swin(tmp_path), "--train.global_batch", "4", "--head_warmup.lr", "1e30"]
    done = dcft("train", "mri.toml", *words, "--engine", "single")
    assert "dcft: error: the validation loss is nan after epoch 1 of the head's warm-up" in done.stderr


def check_masks(folder: Path) -> None:
    """Masks of images that have none, on two ranks: on the grids of their files, with the Dice of `dcft evaluate`."""
    run, asked = folder / "run", folder / "asked"
    asked.mkdir()
    for i in range(3):
        shutil.copy(folder / f"image{i}.nii.gz", asked)
    for kind in ("image", "mask"):  # axes in another order
        image = nibabel.load(folder / f"{kind}0.nii.gz")
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(("P", "I", "L"))
        )
        nibabel.save(image.as_reoriented(turn), (asked if kind == "image" else folder) / f"{kind}0.nii.gz")
    (asked / "other").mkdir()
    shutil.copy(folder / "image1.nii.gz", asked / "other/image2.nii.gz")  # two files of one name
    names = ["image0.nii.gz", "image1.nii.gz", "image2.nii.gz", "other/image2.nii.gz"]
    (asked / "asked.csv").write_text("\n".join(["image", *names]) + "\n")
    words = ["predict", run, "--data.path", asked / "asked.csv", "--engine", "fsdp2"]
    done = dcft(*words, ranks=2)
    assert done.returncode and "predictions of a segmentation are masks: say where they go, --masks FOLDER" in done.stderr
    words += ["--masks", folder / "masks", "--out", folder / "said.csv"]
    output_of(*words, ranks=2)
    rows = list(csv.DictReader((folder / "said.csv").open()))
    files = [f"{i:05d}_image{i}_mask.nii.gz" for i in (0, 1, 2)] + ["00003_image2_mask.nii.gz"]
    assert [row["mask"] for row in rows] == [str(folder / "masks" / name) for name in files]
    again = dcft(*words, ranks=2)
    assert again.returncode and "would be overwritten" in again.stderr
    (folder / "two.csv").write_text(f"image,mask\n{asked}/image0.nii.gz,mask0.nii.gz\nimage1.nii.gz,mask1.nii.gz\n")
    found = json.loads(output_of("evaluate", run, "--data.path", folder / "two.csv", "--test_resamples", "0"))
    dice = []
    for row, i in zip(rows[:2], (0, 1), strict=True):
        made, wanted = nibabel.load(row["mask"]), nibabel.load(folder / f"mask{i}.nii.gz")
        assert np.array_equal(made.affine, wanted.affine) and made.shape == wanted.shape
        mine, right = (np.asarray(image.dataobj) for image in (made, wanted))
        dice.append([2 * np.sum((mine == c) & (right == c)) / (np.sum(mine == c) + np.sum(right == c)) for c in (1, 2)])
        assert float(row["ml(grey)"]) == np.sum(mine == 1) / 1000  # voxels of 1 mm
    assert found["metrics"]["dice"] == pytest.approx(np.mean(dice), abs=1e-6)


def losses_fall(run: Path) -> bool:
    """Whether the mean training loss of the last third of a run is well below that of its first third."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    third = len(losses) // 3
    return float(np.mean(losses[-third:])) < 0.9 * float(np.mean(losses[:third]))


def flat_images(folder: Path) -> Path:
    """Middle slices of the slabs as PNG files with their masks, and their table."""
    slabs(folder)
    rows = ["image,square,mask,split"]
    for i in range(6):
        image, mask = (nibabel.load(folder / f"{kind}{i}.nii.gz").get_fdata()[..., 4] for kind in ("image", "mask"))
        image /= image.max()
        for name, values in (("image", image * 255), ("square", image**2 * 255), ("mask", mask)):
            Image.fromarray(values.astype(np.uint8)).save(folder / f"{name}{i}.png")
        split = ["train", "train", "train", "train", "val", "test"][i]
        rows.append(f"image{i}.png,square{i}.png,mask{i}.png,{split}")
    (folder / "flat.csv").write_text("\n".join(rows) + "\n")
    return folder / "flat.csv"


def test_flat_images_are_segmented(tmp_path: Path) -> None:
    """A U-Net of MONAI of two channels on two ranks; the masks that are predicted have the Dice of the run."""
    words = [*KEYS, "--data.path", str(flat_images(tmp_path)), "--data.patch", "[32, 32]"]
    words += ["--model.build", "monai.networks.nets.UNet", "--model.head", '["model.2"]', "--engine", "fsdp2"]
    words += ["--data.input", '["image", "square"]', "--data.transform", "monai.transforms.RandFlipd"]
    words += ["--data.transform_args", '{keys = ["image", "mask"], prob = 0.5, spatial_axis = 0}']
    args = {"spatial_dims": "2", "in_channels": "2", "out_channels": "num_outputs", "channels": "[8, 16]", "strides": "[2]"}
    words += [word for key, value in {**args, "norm": "batch"}.items() for word in (f"--model.args.{key}", value)]
    words += ["--importance.num_samples", "4", "--importance.score_batch", "4", "--train.global_batch", "4"]
    words += ["--train.epochs", "12", "--head_warmup.max_epochs", "2", "--optimizer.lr", "1e-2", "--removal.fractions", "[]"]
    output_of("train", "mri.toml", *words, "--runs_dir", tmp_path, "--name", "run", "--test_resamples", "0", ranks=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert losses_fall(tmp_path / "run") and summary["num_selected"] > 0
    (tmp_path / "asked.csv").write_text("image,square\nimage5.png,square5.png\n")
    words = ["predict", tmp_path / "run", "--data.path", tmp_path / "asked.csv"]
    output_of(*words, "--masks", tmp_path / "said", "--out", tmp_path / "said.csv")
    found, wanted = (np.asarray(Image.open(f)) for f in (tmp_path / "said/image5_mask.png", tmp_path / "mask5.png"))
    assert found.shape == wanted.shape == (44, 40)
    dice = [2 * np.sum((found == c) & (wanted == c)) / (np.sum(found == c) + np.sum(wanted == c)) for c in (1, 2)]
    assert summary["test"]["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "said.csv").open()))
    assert float(rows[0]["pixels(grey)"]) == np.sum(found == 1)
    output_of("report", tmp_path / "run", "--examples", "2")
    report = (tmp_path / "run/report.html").read_text()
    (dice,) = re.findall(r"<b>Dice grey ([\d.]+), Dice white ([\d.]+)</b><br>(\S+image4.png)", report)
    validation = summary["validation"]
    assert [float(value) for value in dice[:2]] == pytest.approx(
        [validation["dice_grey"], validation["dice_white"]], abs=5e-3
    )
    (drawn,) = re.findall(r'<figure><img alt="" src="[^,]+,([^"]+)', report)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn)))).astype(int)
    coloured = (pixels.max(2) != pixels.min(2)).sum(1)  # above the given mask, below the predicted one
    coloured = [coloured[: len(coloured) // 2].sum(), coloured[len(coloured) // 2 :].sum()]
    assert coloured[0] == np.sum(np.asarray(Image.open(tmp_path / "mask4.png")) > 0) and 0 < coloured[1] != coloured[0]
    # MONAI and plain torch alone: the exported network by a sliding window gives that mask, and the loss of the run.
    net = UNet(2, 2, 3, [8, 16], [2], norm="batch").eval()
    net.load_state_dict(load_file(tmp_path / "run/model/model.safetensors"))
    pixels = [np.asarray(Image.open(tmp_path / f"{name}5.png"), np.float32) for name in ("image", "square")]
    image = torch.stack([torch.from_numpy((p - p.mean()) / p.std()) for p in pixels])
    with torch.no_grad():
        logits = sliding_window_inference(image.unsqueeze(0), (32, 32), 1, net, overlap=0.25, mode="gaussian")
    assert np.mean(logits[0].argmax(0).numpy() != found) < 1e-3
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(wanted.astype(np.int64)).unsqueeze(0))
    assert summary["test"]["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_structure_that_no_training_mask_has(tmp_path: Path) -> None:
    """Named on every rank, whichever masks it has read."""
    words = [*KEYS, "--data.path", str(flat_images(tmp_path)), "--data.patch", "[32, 32]", "--engine", "fsdp2"]
    words += ["--data.classes", '["none", "grey", "white", "tumour"]', "--model.build", "monai.networks.nets.UNet"]
    args = {"spatial_dims": "2", "in_channels": "1", "out_channels": "num_outputs", "channels": "[8, 16]", "strides": "[2]"}
    words += [word for key, value in args.items() for word in (f"--model.args.{key}", value)]
    words += ["--model.head", '["model.2"]', "--importance.num_samples", "4", "--importance.score_batch", "4"]
    words += ["--train.global_batch", "4", "--runs_dir", str(tmp_path)]
    done = dcft("train", "mri.toml", *words, ranks=2)
    assert done.returncode and "no training mask has tumour: leave it out of data.classes" in done.stderr


def test_volumes_with_a_diagnosis(tmp_path: Path) -> None:
    """NIfTI files of several sizes and their classes, a ResNet of MONAI on two ranks; other volumes are predicted."""
    slabs(tmp_path)
    rows = ["scan,finding,case,split"]
    for i in range(18):
        image = nibabel.load(tmp_path / f"image{i % 6}.nii.gz")
        values = image.get_fdata().astype(np.float32) + i  # no copy of a volume is in another split
        if i % 3 == 0:
            values[12:30, 12:28] = values.max()  # a bright block
        nibabel.save(nibabel.Nifti1Image(values, image.affine), tmp_path / f"scan{i}.nii.gz")
        rows.append(f"scan{i}.nii.gz,{['block', 'none'][i % 3 > 0]},{i},{['train', 'val', 'test'][i // 6 if i > 5 else 0]}")
    (tmp_path / "scans.csv").write_text("\n".join(rows).replace(",val", ",train", 2) + "\n")
    words = ["--task.name", "own", "--data.path", str(tmp_path / "scans.csv"), "--data.modality", "volume"]
    words += ["--data.input", "scan", "--data.label", "finding", "--data.group", "case", "--data.split", "split"]
    words += ["--data.patch", "[40, 40, 8]", "--model.build", "monai.networks.nets.ResNet", "--engine", "fsdp2"]
    args = {"block": "basic", "layers": "[1, 1, 1, 1]", "block_inplanes": "[8, 8, 8, 8]", "spatial_dims": "3"}
    args |= {"n_input_channels": "1", "num_classes": "num_outputs"}
    words += [word for key, value in args.items() for word in (f"--model.args.{key}", value)]
    words += ["--data.transform", "monai.transforms.RandFlipd", "--data.transform_args", '{keys = ["image"], prob = 0.5}']
    words += ["--importance.num_samples", "4", "--importance.score_batch", "4", "--train.global_batch", "4"]
    words += ["--train.epochs", "20", "--optimizer.lr", "1e-2", "--removal.fractions", "[]", "--test_resamples", "0"]
    output_of("train", "mri.toml", *words, "--runs_dir", tmp_path, "--name", "run", ranks=2)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert losses_fall(tmp_path / "run") and summary["labels"]["names"] == ["block", "none"]
    tested = list(csv.DictReader((tmp_path / "run/predictions.csv").open()))
    (tmp_path / "asked.csv").write_text("\n".join(["scan,case", *(f"scan{i}.nii.gz,{i}" for i in range(12, 18))]) + "\n")
    out = output_of("predict", tmp_path / "run", "--data.path", tmp_path / "asked.csv")  # the test data again, unlabelled
    predicted = [row["predicted"] for row in csv.DictReader(out.splitlines())]
    write_json(tmp_path / "run/summary.json", summary | {"reading": 1})  # voxels of 0 were left out then
    done = dcft("predict", tmp_path / "run", "--data.path", tmp_path / "asked.csv")
    assert done.returncode == 2 and "trained before voxels of 0 were normalised" in done.stderr
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    assert [Path(row["file"]).name for row in tested] == [f"scan{i}.nii.gz" for i in range(12, 18)]
    assert predicted == [row["predicted"] for row in tested] and {row["label"] for row in tested} == {"block", "none"}
    assert summary["test"]["accuracy"] == pytest.approx(np.mean([row["predicted"] == row["label"] for row in tested]))
    config = load_config("mri.toml", words)
    task = user_task(config)
    processor = LabelledVolumeProcessor(config)
    assert processor(task.train).inputs([0, 1])["image"].shape == (2, 1, 40, 40, 8)
    plain = processor.image(task.train.inputs[0])
    varied = [processor(task.train).inputs([0], draw)["image"][0] for draw in range(9)]
    same = [torch.equal(image, plain) for image in varied]
    assert type(plain) is torch.Tensor and same[0] and 1 < sum(same) < 9  # draw 0 is for scoring: no variants
    (tmp_path / "scan3.nii.gz").write_bytes(b"no volume")
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9, 2)), np.eye(4)), tmp_path / "scan7.nii.gz")
    with pytest.raises(DataError, match=r"2 of 18 volumes .*scan3.nii.gz: cannot be read.* 2 channels, but other volumes 1"):
        processor.check([task.train, task.validation, task.test], 0, 1)
    flat = load_config("mri.toml", [*words, "--data.patch", "[40, 40]"])
    with pytest.raises(DataError, match=r"scan12.nii.gz has shape \[\d+, \d+, 8\] .*, but data.patch is \[40, 40\]"):
        LabelledVolumeProcessor(flat).check([task.test], 0, 1)
