"""NaN in weights, data, gradients or results is never silent: the message says where it is."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ..own import slabs
from ..processes import dcft
from .test_handshake import Net, pictures, weights, words


class Fragile(Net):
    """Divides by the spread of each picture, which is zero for a black one."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values / pixel_values.flatten(1).std(1).view(-1, 1, 1, 1))


class Steep(Net):
    """A finite loss with an infinite gradient after the first steps."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        out = super().forward(pixel_values)
        return out + torch.sqrt((self.body.weight * 0).sum()) * 0 if self.training and torch.is_grad_enabled() else out


def said_by(*command: str, ranks: int = 1) -> str:
    done = dcft("train", "smoke.toml", *command, ranks=ranks)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp2", 2), ("deepspeed", 2)])
def test_nan_in_a_file_of_weights(tmp_path: Path, engine: str, ranks: int) -> None:
    pictures(tmp_path / "pictures")
    state = load_file(weights(tmp_path / "net.safetensors"))
    state["body.weight"][3, 5:7] = float("nan")
    save_file(state, tmp_path / "net.safetensors")
    said = said_by(*words(tmp_path, "--engine", engine), ranks=ranks)
    assert "net.safetensors: 2 elements of body.weight are NaN or infinite" in said, said[-500:]


def split_pictures(folder: Path, black: str) -> None:
    """Pictures in folders of splits; one of the split `black` has no spread."""
    pictures(folder / "all")
    for i, file in enumerate(sorted((folder / "all").rglob("*.bmp"), key=lambda f: f.name)):
        split = ["train", "train", "train", "val", "test"][i // 2 % 5]
        place = folder / "pictures" / split / file.parent.name
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / file.name)
    file = sorted((folder / "pictures" / black).rglob("*.bmp"))[1]
    Image.new("RGB", (250, 250)).save(file)


@pytest.mark.parametrize(("split", "name"), [("test", "test"), ("val", "validation")])
def test_nan_outputs_are_named(tmp_path: Path, split: str, name: str) -> None:
    split_pictures(tmp_path, split)
    weights(tmp_path / "net.safetensors")
    own = words(tmp_path, "--engine", "single", "--model.build", "tests.train.test_numbers.Fragile", "--method", "full")
    said = said_by(*own, "--data.mean", "[0.0, 0.0, 0.0]")
    found = said.partition("the model's output is NaN for ")[2]
    assert found.startswith((f"1 of 6 {name} examples, first for example 1 ", f"example 1 of {name}: ")), found
    assert not (tmp_path / "runs/smoke/summary.json").exists()


def test_a_nan_voxel_without_a_check(tmp_path: Path) -> None:
    file = slabs(tmp_path / "slabs", side=16)
    image = nibabel.load(tmp_path / "slabs/image1.nii.gz")
    values = np.asarray(image.dataobj).copy()
    values[values > np.median(values)] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), tmp_path / "slabs/image1.nii.gz")
    own = ["--runs_dir", str(tmp_path), "--engine", "single", "--method", "full", "--data.path", str(file)]
    own += ["--data.modality", "volume", "--task.kind", "segmentation", "--data.classes", '["none", "grey", "white"]']
    own += ["--data.input", "image", "--data.label", "mask", "--data.split", "split", "--data.group", "patient"]
    own += ["--model.build", "monai.networks.nets.UNet", "--data.patch", "[8, 8, 8]", "--data.check", "false"]
    args = '{spatial_dims = 3, in_channels = 1, out_channels = "num_outputs", channels = [4, 8], strides = [2]}'
    own += ["--model.args", args, "--model.head", '["model.2.*"]', "--train.global_batch", "2", "--train.epochs", "1"]
    own += ["--importance.num_samples", "2", "--importance.score_batch", "2", "--head_warmup.max_epochs", "0"]
    said = said_by(*own)
    assert "image1.nii.gz" in said and "NaN or infinite" in said, said[-600:]


def test_deepspeed_leaves_no_step_out_in_silence(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    weights(tmp_path / "net.safetensors")
    own = words(tmp_path, "--engine", "deepspeed", "--model.build", "tests.train.test_numbers.Steep", "--method", "full")
    said = said_by(*own, "--train.precision", "bf16", ranks=2)
    assert "a gradient is NaN or infinite, so DeepSpeed has left out this step" in said, said[-600:]
