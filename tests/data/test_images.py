"""The user's images: every kind of file is read alike, variants are functions of the seed, bad files are named."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.images import UserImageProcessor, read_image
from dcft_dist.data.splits import Split
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError, DataError

from ..processes import dcft
from .tables import picture, table

# -- images --------------------------------------------------------------------------------------------------------------


def test_images_of_every_kind_are_the_same(tmp_path: Path) -> None:
    values = (np.arange(64, dtype=np.uint8) * 4).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([values] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(np.stack([values] * 3 + [np.full_like(values, 7)], -1)).save(tmp_path / "rgba.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.save(tmp_path / "array.npy", values.astype(np.float32) / 255)
    wanted = torch.from_numpy(values / 255.0).float().expand(3, -1, -1)
    for name in ("grey.png", "rgb.png", "rgba.png", "deep.png", "array.npy"):
        torch.testing.assert_close(read_image(tmp_path / name, 3), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(read_image(values, 3), wanted, rtol=0, atol=1e-6)


def random_flip(image: torch.Tensor) -> torch.Tensor:
    """By all three generators that transforms use: each one alone changes it."""
    drawn = (float(torch.rand(())), np.random.rand(), random.random())
    return image.flip(-1) if sum(x < 0.5 for x in drawn) % 2 else image


@pytest.mark.parametrize("bright", ["MONOCHROME1", "MONOCHROME2"])
def test_a_picture_of_dicom_as_it_is_meant_to_be_seen(bright: str, tmp_path: Path) -> None:
    """A radiograph of twelve bits with a window: below it black, above it white; the other way round in MONOCHROME1."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    values = np.arange(0, 4000, 40, dtype=np.uint16).reshape(10, 10)
    data, meta = pydicom.Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.file_meta = meta
    data.Rows = data.Columns = 10
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, bright, 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelData = 16, 12, 11, values.tobytes()
    data.RescaleSlope, data.RescaleIntercept, data.WindowCenter, data.WindowWidth = 2, -1000, 3000, 2001
    data.save_as(tmp_path / "scan", enforce_file_format=True)  # as they often come, without a suffix
    wanted = np.clip((2.0 * values - 1000 - 2000) / 2000, 0, 1)
    wanted = 1 - wanted if bright == "MONOCHROME1" else wanted
    found = read_image(tmp_path / "scan", 1)[0].numpy()
    assert np.abs(found - wanted).max() < 2e-3 and found.min() == 0 and found.max() == 1
    data.NumberOfFrames = 2
    data.PixelData = values.tobytes() * 2
    data.save_as(tmp_path / "film", enforce_file_format=True)
    with pytest.raises(DataError, match="film: cannot be read as an image: the file has 2 frames, not one"):
        read_image(tmp_path / "film", 1)


def test_variants_are_functions_of_seed_epoch_and_example(tmp_path: Path) -> None:
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"input": f"{i % 8}.png", "label": i % 2, "n": i} for i in range(20)]
    how = ["--data.path", str(table(tmp_path, rows)), "--task.name", "own", "--model.image_size", "8"]
    vary = ["--data.transform", "tests.data.test_images.random_flip", "--import_roots", '["."]']
    config = load_config("mri.toml", [*how, *vary])
    examples = UserImageProcessor(config)(user_task(config).train)
    plain, first, later = (examples.inputs(range(8), d)["pixel_values"] for d in (None, 1, 2))
    for reset in (random.seed, np.random.seed, torch.manual_seed):  # whatever state the generators are in
        reset(99)
    again = examples.inputs(range(8), 1)["pixel_values"]
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, plain)
    assert torch.equal(examples.inputs([3], 2)["pixel_values"][0], later[3])  # whatever else is in the batch
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, first, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, plain, first, strict=True)) and 0 < sum(flipped) < 8
    vary = ["--data.transform", "monai.transforms.RandFlip", "--data.transform_args.prob", "0.5"]
    config = load_config("mri.toml", [*how, *vary, "--data.transform_args.spatial_axis", "1"])
    examples = UserImageProcessor(config)(user_task(config).train)
    a, b = (examples.inputs(range(8), d)["pixel_values"] for d in (1, 1))
    assert torch.equal(a, b)
    # As it comes from numpy, with steps that go backwards; and one that fails.
    config = load_config("mri.toml", [*how, "--data.transform", "numpy.fliplr"])
    UserImageProcessor(config)(user_task(config).train).inputs([0], 1)
    config = load_config("mri.toml", [*how, "--data.transform", "numpy.loadtxt"])
    task = user_task(config)
    with pytest.raises(ConfigError, match=r"data.transform: numpy.loadtxt fails: (Type|Value)Error: "):
        UserImageProcessor(config).check([task.train, task.validation, task.test], 0, 1)


def test_bad_images_are_found_before_the_run(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / f"image{i}.png", size=16)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "image3.png")
    (tmp_path / "image3.png").write_bytes((tmp_path / "image3.png").read_bytes()[:2000])
    pixels = np.ones((4, 4), np.float32)
    pixels[1, 2] = np.nan
    np.save(tmp_path / "nan.npy", pixels)
    np.save(tmp_path / "deep.npy", np.ones((4, 4, 9), np.float32))
    rows = [{"input": f"image{i}.png", "label": i % 2} for i in range(40)] + [{"input": "nan.npy", "label": 0}]
    file = table(tmp_path, rows)
    words = ["--task.name", "own", "--data.path", str(file), "--runs_dir", str(tmp_path / "runs")]
    words += ["--train.global_batch", "8", "--importance.num_samples", "16", "--importance.score_batch", "8"]
    done, checked = dcft("train", "mri.toml", *words), dcft("check", "--data", "mri.toml", *words)
    for found in (done, checked):
        assert found.returncode == 2 and "2 of 41 images" in found.stderr
        assert "image3.png: cannot be read as an image" in found.stderr
        assert "nan.npy: 1 of its pixel values are NaN or infinite" in found.stderr
    with pytest.raises(DataError, match=r"pixels of int64 do not say which value is white"):
        read_image(np.full((4, 4), 255), 3)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.npy: cannot be read as an image"):
        read_image(tmp_path / "empty.npy", 3)
    with pytest.raises(DataError, match=r"deep.npy: an image of shape \[4, 4, 9\] does not fit 3 channels"):
        read_image(tmp_path / "deep.npy", 3)


def test_arrays_are_named_by_their_place() -> None:
    pixels = np.ones((4, 4), np.float32)
    pixels[0, 0] = np.nan
    processor = UserImageProcessor(load_config("mri.toml", ["--task.name", "own", "--data.path", "x"]))
    splits = [Split([pixels * 0, good], [0, 0], ["a", "b"]) for good in (pixels * 0 + 1, pixels, pixels)]
    with pytest.raises(DataError, match="validation example 1: array: 1 of its pixel values are NaN or infinite"):
        processor.check([Split([np.nan_to_num(x) for x in splits[0].inputs], [0, 0], ["a", "b"]), *splits[1:]], 0, 1)
    deep = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(DataError, match="values from 70000 to 70000 do not fit into 16 bits"):
        read_image(deep, 3)
