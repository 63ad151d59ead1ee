"""Volumes with masks: patches, variants, grids and DICOM series; mistakes are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.transforms import Compose, RandFlipd
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.dicom_series import stated_grid
from dcft_dist.data.user_task import user_task
from dcft_dist.data.volumes import VolumeProcessor
from dcft_dist.errors import ConfigError, DataError
from dcft_dist.seeds import seed_of

from ..own import dicom_series, slabs
from .volume_words import KEYS


def test_patches_are_functions_of_seed_epoch_and_example(tmp_path: Path) -> None:
    config = load_config("mri.toml", [*KEYS, "--data.path", str(slabs(tmp_path)), "--model.build", "json.loads"])
    examples = VolumeProcessor(config)(user_task(config).train)
    first, again, later = (examples.inputs([0, 1], draw) for draw in (1, 1, 2))
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], later["image"])
    assert first["image"].shape == first["labels"].shape == (2, 1, 32, 32, 8) and first["labels"].dtype == torch.int64
    whole = examples.inputs([1])
    assert whole["image"].shape == (1, 1, 44, 40, 8) and set(whole["labels"].unique().tolist()) <= {0, 1, 2}


def test_several_files_are_channels_of_one_image(tmp_path: Path) -> None:
    """As those of MRI sequences: turned, resampled and normalised each, cut together; a file on another grid is named."""
    slabs(tmp_path)
    rows = ["image,second,mask,split"]
    for i, split in enumerate(["train", "train", "train", "train", "val", "test"]):
        one = nibabel.load(tmp_path / f"image{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(7 + np.square(one.get_fdata()), one.affine), tmp_path / f"second{i}.nii.gz")
        rows.append(f"image{i}.nii.gz,second{i}.nii.gz,mask{i}.nii.gz,{split}")
    (tmp_path / "two.csv").write_text("\n".join(rows) + "\n")
    words = [*KEYS, "--data.path", str(tmp_path / "two.csv"), "--model.build", "json.loads", "--data.spacing", "[1, 2, 1]"]
    both = load_config("mri.toml", [*words, "--data.input", '["image", "second"]'])
    task, processor = user_task(both), VolumeProcessor(both)
    processor.check([task.train, task.validation, task.test], 0, 1)
    found = processor(task.train).inputs([0, 1], 3)
    for i, name in enumerate(("image", "second")):
        single = load_config("mri.toml", [*words, "--data.input", name])
        alone = VolumeProcessor(single)(user_task(single).train).inputs([0, 1], 3)
        assert torch.equal(found["image"][:, i : i + 1], alone["image"]) and torch.equal(found["labels"], alone["labels"])
        assert user_task(single).checksum != task.checksum
    nibabel.save(nibabel.Nifti1Image(one.get_fdata(), np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "second5.nii.gz")
    with pytest.raises(DataError, match=r"image5.nii.gz and .*second5.nii.gz have different affines"):
        VolumeProcessor(both).check([task.test], 0, 1)
    nibabel.save(nibabel.Nifti1Image(np.full(one.shape, np.nan), one.affine), tmp_path / "second5.nii.gz")
    with pytest.raises(DataError, match=r"volumes cannot be used: \S*second5.nii.gz: some voxels are NaN or infinite"):
        VolumeProcessor(both).check([task.test], 0, 1)
    (tmp_path / "second5.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of 18 files are missing: .*second5\.nii\.gz \(.*two\.csv, line 7\)"):
        user_task(both)


def flip_both(patch: dict[str, Any]) -> dict[str, Any]:
    """Written into what is given as well, as careless code does."""
    found = {key: np.flip(value.numpy().copy(), 1) for key, value in patch.items()}
    patch["image"] += 5
    return found


def emptied(patch: dict[str, Any]) -> dict[str, Any]:
    return patch | {"image": None}


def halved(patch: dict[str, Any]) -> dict[str, Any]:
    return patch | {"mask": patch["mask"] / 2}


class Flips(Compose):
    """As users write them: a chain, which hands its draws on as MONAI's cropping does."""

    def __init__(self) -> None:
        super().__init__([RandFlipd(["image", "mask"], prob=0.5, spatial_axis=0)])


def test_patches_are_varied_with_their_masks(tmp_path: Path) -> None:
    """By a function of the user, or a dictionary transform of MONAI; never where whole volumes are evaluated."""
    words = [*KEYS, "--data.path", str(slabs(tmp_path)), "--model.build", "json.loads", "--import_roots", '["."]']

    def patches(*more: str) -> list[dict[str, torch.Tensor]]:
        config = load_config("mri.toml", [*words, *more])
        examples = VolumeProcessor(config)(user_task(config).train)
        return [*(examples.inputs([0, 1, 2, 3], draw) for draw in (1, 1, 2)), examples.inputs([0]), examples.inputs([0], 0)]

    plain, mine = patches(), patches("--data.transform", "tests.data.test_volumes.flip_both")
    for before, after in zip(plain[:3], mine[:3], strict=True):
        assert all(torch.equal(before[key].flip(2), after[key]) for key in ("image", "labels"))
    assert all(torch.equal(plain[i]["image"], mine[i]["image"]) for i in (3, 4))  # nor where weights are scored
    flips = ["--data.transform", "monai.transforms.RandFlipd", "--data.transform_args.keys", '["image", "mask"]']
    theirs = patches(*flips, "--data.transform_args.prob", "0.5", "--data.transform_args.spatial_axis", "0")
    assert torch.equal(theirs[0]["image"], theirs[1]["image"])
    turned = [not torch.equal(a, b) for a, b in zip(plain[0]["image"], theirs[0]["image"], strict=True)]
    turned += [not torch.equal(a, b) for a, b in zip(plain[2]["image"], theirs[2]["image"], strict=True)]
    assert 0 < sum(turned) < 8
    for i in range(4):
        wanted = plain[0]["labels"][i].flip(1) if turned[i] else plain[0]["labels"][i]
        assert torch.equal(theirs[0]["labels"][i], wanted)
    with pytest.raises(ConfigError, match=r"returned shape \[1, 16, 16, 8\], not .* input \[1, 32, 32, 8\]"):
        patches("--data.transform", "monai.transforms.CenterSpatialCropd", *flips[2:],
                "--data.transform_args.roi_size", "[16, 16, 8]")  # fmt: skip
    with pytest.raises(ConfigError, match=r"data.transform: the mask has values 0.5, which are not classes"):
        patches("--data.transform", "tests.data.test_volumes.halved")
    with pytest.raises(ConfigError, match=r"data.transform: returned a NoneType, not an array"):
        patches("--data.transform", "tests.data.test_volumes.emptied")
    with pytest.raises(ConfigError, match=r"data.transform: it must return a dictionary with image and mask"):
        patches("--data.transform", "numpy.ndim")


def test_a_variant_does_not_depend_on_the_place_of_the_patch(tmp_path: Path) -> None:
    words = [*KEYS, "--data.path", str(slabs(tmp_path)), "--model.build", "json.loads", "--import_roots", '["."]']
    config = load_config("mri.toml", words)
    vary = load_config("mri.toml", [*words, "--data.transform", "tests.data.test_volumes.Flips"])
    (plain, varied), task = [VolumeProcessor(one) for one in (config, vary)], user_task(config)
    pair, alike = (task.train.inputs[0], task.train.labels[0]), []
    for draw in range(20):
        patches = [one.patch(pair, f"{draw}:0")[0] for one in (plain, varied)]
        flips = Flips()
        flips.set_random_state(seed_of(0, f"{draw}:0"))  # where the cropping begins
        again = flips({"image": patches[0], "mask": patches[0]})["image"]
        alike.append(torch.equal(torch.as_tensor(again), patches[1]))
    assert 0 < sum(alike) < 20


@pytest.mark.parametrize("spacing", ["[1.0, 1.0, 1.0]", "[1.0, 0.5, 1.0]"])
def test_a_mask_goes_back_to_the_grid_of_its_file(spacing: str, tmp_path: Path) -> None:
    """Axes in another order, voxels of three sizes: what was read as a mask comes back as it was."""
    table = slabs(tmp_path)
    words = [*KEYS, "--data.path", str(table), "--data.spacing", spacing, "--model.build", "json.loads"]
    processor = VolumeProcessor(load_config("mri.toml", words))
    files = [tmp_path / "odd_image.nii.gz", tmp_path / "odd_mask.nii.gz"]
    affine = np.array([[0, 0, -2.0, 5], [1.0, 0, 0, -7], [0, 3.0, 0, 1], [0, 0, 0, 1]])
    for name, file in zip(("image0", "mask0"), files, strict=True):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(tmp_path / f"{name}.nii.gz").dataobj), affine), file)
    image, mask = processor.reader.whole((files[0], files[1]))
    assert torch.equal(processor.reader.whole((files[0], None))[0], image)
    back, found = processor.reader.as_in_file(files[0], mask[0])  # type: ignore[index]
    assert np.array_equal(back, np.asarray(nibabel.load(files[1]).dataobj)) and np.allclose(found, affine)


def test_flat_images_have_rows_first(tmp_path: Path) -> None:
    """As Pillow and pre-trained models see them; a mask goes back as it came."""
    draw = np.random.default_rng(0)
    pixels, mask = draw.integers(0, 255, (40, 32, 3)).astype(np.uint8), np.zeros((40, 32), np.uint8)
    mask[3:9, 20:31] = 1
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [*KEYS, "--data.path", "x.csv", "--data.patch", "[16, 16]", "--model.build", "json.loads"]
    processor = VolumeProcessor(load_config("mri.toml", [*words, "--data.window", "[0, 255]"]))
    image, found = processor.reader.whole((tmp_path / "image.png", tmp_path / "mask.png"))
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert found is not None and np.array_equal(found[0].numpy(), mask)
    back, _ = processor.reader.as_in_file(tmp_path / "image.png", found[0])
    assert np.array_equal(back, mask)


def broken(folder: Path, kind: str) -> list[str]:
    file = slabs(folder)
    image = nibabel.load(folder / "image2.nii.gz")
    values = image.get_fdata().astype(np.float32)
    if kind == "spacing":
        image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, 1.0]))
        nibabel.save(image, folder / "image2.nii.gz")
    elif kind == "shape":
        nibabel.save(nibabel.Nifti1Image(values[:-1], image.affine), folder / "image2.nii.gz")
    elif kind == "nan":
        values[3, 3, 3] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, image.affine), folder / "image2.nii.gz")
    elif kind in ("label", "257", "0.7", "no number"):
        mask = np.asarray(nibabel.load(folder / "mask2.nii.gz").dataobj).astype(np.float32)
        mask[0, 0, 0] = {"label": 7.0, "257": 257.0, "0.7": 0.7, "no number": np.nan}[kind]
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), folder / "mask2.nii.gz")
    elif kind == "infinite":
        values[3, 3, 3] = np.inf
        nibabel.save(nibabel.Nifti1Image(values, image.affine), folder / "image2.nii.gz")
        return ["--data.path", str(file), "--data.window", "[0, 100]"]
    elif kind == "damaged":
        data = (folder / "image2.nii.gz").read_bytes()
        (folder / "image2.nii.gz").write_bytes(data[: len(data) // 2])
    elif kind == "missing":
        (folder / "mask2.nii.gz").unlink()
    return ["--data.path", str(file)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "spacing",
            r"mask2.nii.gz have different affines \(voxels \[1.0, 1.0, 2.0\] and \[1.0, 1.0, 1.0\]",
        ),
        ("shape", r"image2.nii.gz has shape \[39, 40, 8\], but .*mask2.nii.gz \[40, 40, 8\]"),
        ("nan", "image2.nii.gz: some voxels are NaN or infinite"),
        ("infinite", "image2.nii.gz: some voxels are NaN or infinite"),
        ("label", "mask2.nii.gz: labels 7, but there are 3 classes, 0 to 2"),
        ("257", "mask2.nii.gz: labels 257, but there are 3 classes"),
        ("0.7", "mask2.nii.gz: labels 0.7, but there are 3 classes"),
        ("no number", "mask2.nii.gz: labels nan, but there are 3 classes"),
        ("damaged", "image2.nii.gz with .*mask2.nii.gz: cannot be read"),
        ("missing", r"1 of 12 files are missing: .*mask2.nii.gz"),
    ],
)
def test_mistakes_are_named(kind: str, message: str, tmp_path: Path) -> None:
    config = load_config("mri.toml", [*KEYS, *broken(tmp_path, kind), "--model.build", "json.loads"])
    with pytest.raises(DataError, match=message):
        VolumeProcessor(config).check([user_task(config).train], 0, 1)


def series_and_mask(folder: Path) -> tuple[Path, list[str]]:
    """Slabs of which one image is a series of DICOM files."""
    table = slabs(folder)
    series = dicom_series(folder / "series2", folder / "image2.nii.gz")
    table.write_text(table.read_text().replace("image2.nii.gz", series.name))
    return series, [*KEYS, "--data.path", str(table), "--model.build", "json.loads"]


def test_a_series_of_dicom_files_is_the_volume_it_came_from(tmp_path: Path) -> None:
    series, words = series_and_mask(tmp_path)
    processor = VolumeProcessor(load_config("mri.toml", words))
    processor.check([user_task(load_config("mri.toml", words)).train], 0, 1)
    mask = tmp_path / "mask2.nii.gz"
    read = processor.reader.whole
    (image, one), (whole, other) = read((series, mask)), read((tmp_path / "image2.nii.gz", mask))
    assert torch.equal(one, other) and image.shape == whole.shape
    torch.testing.assert_close(image, whole, atol=0.02, rtol=0)  # DICOM has whole numbers


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gap", r"series2: missing slices \(1\) between slice002.dcm and slice004.dcm: they lie 2 mm apart, .* 1 mm"),
        ("twice", r"series2: slice003.dcm and .*copy.dcm have the same position|copy.dcm and slice003.dcm have the same"),
        ("all at one place", r"series2: slice000.dcm and slice001.dcm have the same position"),
        ("each twice", r"series2: .*slice000.dcm have the same pos|series2: slice000.dcm and .* have the same pos"),
        ("no series", r"series2: series, position, orientation or pixel spacing of a slice cannot be read"),
        ("two", r"series2: contains slices of 2 series; put each series into its own folder"),
        ("every second", r"series2: the slices are numbered in steps of 2 and lie 2 mm apart, but are 1 mm thick"),
        ("elsewhere", r"series2 and .*mask2.nii.gz have different affines"),
        ("tilted", r"series2: the slices are shifted by 15.0 degrees \(a tilted gantry\): resample them"),
        ("low is bright", r"series2 with .*: cannot be read: its numbers are MONOCHROME1, not brightness"),
        ("end", r"series2 has shape \[40, 40, 7\] after reorientation, but .*mask2.nii.gz \[40, 40, 8\]"),
    ],
)
def test_series_with_mistakes_are_named(kind: str, message: str, tmp_path: Path) -> None:
    series, words = series_and_mask(tmp_path)
    if kind == "gap":
        (series / "slice003.dcm").unlink()
    elif kind == "twice":
        shutil.copy(series / "slice003.dcm", series / "copy.dcm")
    elif kind == "each twice":
        for file in sorted(series.iterdir()):
            shutil.copy(file, series / f"{file.stem}b.dcm")
    elif kind in ("all at one place", "no series"):
        for file in sorted(series.iterdir()):
            slice_ = pydicom.dcmread(file)
            if kind == "no series":
                del slice_.SeriesInstanceUID
            else:
                slice_.ImagePositionPatient = [0, 0, 0]
            slice_.save_as(file)
    elif kind in ("tilted", "low is bright"):
        for i, file in enumerate(sorted(series.iterdir())):
            slice_ = pydicom.dcmread(file)
            if kind == "tilted":
                slice_.ImagePositionPatient[1] += i * np.tan(np.radians(15))
            else:
                slice_.PhotometricInterpretation = "MONOCHROME1"
            slice_.save_as(file)
    elif kind == "every second":
        for file in sorted(series.iterdir())[1::2]:
            file.unlink()
    elif kind == "elsewhere":
        mask = nibabel.load(tmp_path / "mask2.nii.gz")
        shift = mask.affine + np.diag([0.0, 0.0, 0.0, 0.0]) + np.array([[0, 0, 0, 4.0]] + [[0.0] * 4] * 3)
        nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj), shift), tmp_path / "mask2.nii.gz")
    elif kind == "two":
        (dicom_series(tmp_path / "other", tmp_path / "image1.nii.gz") / "slice000.dcm").rename(series / "other.dcm")
    else:
        (series / "slice007.dcm").unlink()
    config = load_config("mri.toml", words)
    with pytest.raises(DataError, match=message):
        VolumeProcessor(config).check([user_task(config).train], 0, 1)


def test_keys_that_do_not_fit() -> None:
    text = ["--task.name", "own", "--data.path", "x", "--data.modality", "text", "--model.build", "json.loads"]
    with pytest.raises(ConfigError, match=r"data\.transform is for images"):
        load_config("mri.toml", [*text, "--data.transform", "a.b"])
    with pytest.raises(ConfigError, match=r"several columns in data.input are the channels of a volume"):
        load_config("mri.toml", [*text, "--data.input", '["a", "b"]'])
    with pytest.raises(ConfigError, match=r"class_weights = 'balanced' is for task.kind = 'single_label'"):
        load_config(
            "mri.toml", [*KEYS, "--data.path", "x", "--task.class_weights", "balanced", "--model.build", "json.loads"]
        )
    with pytest.raises(ConfigError, match=r"segmentation' needs data.modality = 'volume'"):
        load_config("mri.toml", [*KEYS, "--data.path", "x", "--data.modality", "image", "--model.build", "json.loads"])
    with pytest.raises(ConfigError, match=r"segmentation needs data.format = 'table' and data.classes"):
        load_config("mri.toml", [*KEYS, "--data.path", "x", "--data.classes", "[]", "--model.build", "json.loads"])


# -- what stored numbers mean --------------------------------------------------------------------------------------------


def reader(*words: str) -> Any:
    config = [*KEYS, "--data.path", "x.csv", "--model.build", "json.loads", *words]
    return VolumeProcessor(load_config("mri.toml", config)).reader


FLAT = ("--data.patch", "[16, 16]", "--data.window", "[0, 255]")


def test_flat_images_are_read_as_they_are_seen(tmp_path: Path) -> None:
    """Palettes, inks and opacity of images; the palette of a mask only colours it."""
    draw = np.random.default_rng(0)
    grey, colour = draw.integers(0, 256, (20, 24), np.uint8), draw.integers(0, 256, (20, 24, 3), np.uint8)
    inverted = Image.fromarray(255 - grey)
    inverted.putpalette(np.repeat(np.arange(255, -1, -1, dtype=np.uint8), 3).tobytes())
    inverted.save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([colour, grey])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([255 - colour, 0 * grey]), "CMYK").save(tmp_path / "cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # the top row is the right side
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.tiff", exif=exif)
    mask = Image.fromarray((grey > 127).astype(np.uint8))
    mask.putpalette([200, 0, 0, 0, 0, 255])
    mask.save(tmp_path / "mask.png")
    for name, wanted in {"grey.png": grey[None], "turned.tiff": grey[None]}.items():
        image, found = reader(*FLAT).whole((tmp_path / name, tmp_path / "mask.png"))
        assert np.abs(image.numpy() * 255 - wanted).max() < 1e-3, name
        assert np.array_equal(found[0].numpy(), grey > 127)
    for name in ("rgba.png", "cmyk.tif"):
        image, _ = reader(*FLAT).whole((tmp_path / name, None))
        assert np.abs(image.numpy() * 255 - colour.transpose(2, 0, 1)).max() < 1.01, name


def test_a_set_of_grey_and_coloured_images_is_named(tmp_path: Path) -> None:
    """By every rank, though each reads a part of them."""
    for i in range(8):
        shape = (16, 16, 3) if i == 5 else (16, 16)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / f"mask{i}.png")
    splits = ["train"] * 6 + ["val", "test"]
    rows = [f"{i}.png,mask{i}.png,{split}" for i, split in enumerate(splits)]
    (tmp_path / "x.csv").write_text("\n".join(["image,mask,split", *rows]) + "\n")
    words = [*KEYS, *FLAT, "--data.path", str(tmp_path / "x.csv"), "--model.build", "json.loads"]
    config = load_config("mri.toml", words)
    task = user_task(config)
    with pytest.raises(DataError, match=r"5.png has 3 channels, but other volumes 1"):
        VolumeProcessor(config).check([task.train, task.validation, task.test], 1, 4)  # reads images 1 and 5


def test_files_that_do_not_say_which_numbers_are_meant(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 8), 0.1 + 0.9j, np.complex64), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=r"a.nii.gz: cannot be read: .*complex numbers"):
        reader().whole((tmp_path / "a.nii.gz", None))
    pages = [Image.fromarray(np.zeros((16, 16), np.uint8))] * 2
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for pair in ((tmp_path / "a.tif", None), (tmp_path / "mask.png", tmp_path / "a.tif")):
        pages[0].save(tmp_path / "mask.png")
        with pytest.raises(DataError, match=r"the file has 2 pages or frames, not one"):
            reader(*FLAT).whole(pair)


def test_zero_is_a_value_like_any_other(tmp_path: Path) -> None:
    """In a CT it is water. Without a window, a volume gets mean 0 and deviation 1, and keeps its order."""
    draw = np.random.default_rng(0)
    ct = np.where(draw.random((20, 20, 20)) < 0.5, -1000, draw.integers(-5, 60, (20, 20, 20))).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(ct, np.eye(4)), tmp_path / "ct.nii.gz")
    image, _ = reader().whole((tmp_path / "ct.nii.gz", None))
    assert np.abs(image[0].numpy() - (ct - ct.mean()) / ct.std()).max() < 1e-4


@pytest.mark.parametrize(
    "numbers", [[3, 1, 4, 8, 5, 2, 6, 7], [1, 5, 2, 6, 3, 7, 4, 8], [1] * 8, [1, 2, None, 4, None, 6, 7, 8]]
)
def test_slices_lie_where_their_positions_say(numbers: list[int | None], tmp_path: Path) -> None:
    """Whatever their numbers and the names of their files are; compared with nibabel."""
    series, words = series_and_mask(tmp_path)
    for number, file, name in zip(numbers, sorted(series.iterdir()), "hgfdeabc", strict=True):
        slice_ = pydicom.dcmread(file)
        slice_.InstanceNumber = number
        if number is None:
            del slice_.InstanceNumber
        slice_.save_as(series / f"{name}.dcm", enforce_file_format=True)
        file.unlink()
    processor = VolumeProcessor(load_config("mri.toml", [*words, "--data.window", "[0, 10000]"]))
    image, _ = processor.reader.whole((series, tmp_path / "mask2.nii.gz"))
    file = nibabel.as_closest_canonical(nibabel.load(tmp_path / "image2.nii.gz"))
    assert np.abs(image[0].numpy() * 10000 - np.rint(file.get_fdata())).max() < 0.01


def test_series_of_slices_that_do_not_fit(tmp_path: Path) -> None:
    series, words = series_and_mask(tmp_path)
    slice_ = pydicom.dcmread(series / "slice003.dcm")
    slice_.PixelSpacing = [1.5, 1.5]
    slice_.save_as(series / "slice003.dcm", enforce_file_format=True)
    whole = VolumeProcessor(load_config("mri.toml", words)).reader.whole  # without a check beforehand, too
    with pytest.raises(DataError, match=r"series2: the slices have different sizes or pixel spacings"):
        whole((series, tmp_path / "mask2.nii.gz"))
    slice_.NumberOfFrames, slice_.PixelData = 2, slice_.PixelData * 2
    slice_.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    with pytest.raises(DataError, match=r"enhanced.dcm: cannot be read: the file has 2 frames: convert it to NIfTI"):
        whole((tmp_path / "enhanced.dcm", None))


def test_the_grid_that_was_read_is_compared_with_the_stated_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.data import PydicomReader

    series, words = series_and_mask(tmp_path)
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.iterdir()]
    assert np.allclose(stated_grid(headers), nibabel.load(tmp_path / "image2.nii.gz").affine, atol=1e-3)
    real = PydicomReader.get_data

    def shifted(self: Any, data: Any) -> Any:
        array, about = real(self, data)
        about["affine"][2, 2] *= 2  # as of a reader that takes the slices for twice as thick
        return array, about

    monkeypatch.setattr(PydicomReader, "get_data", shifted)
    with pytest.raises(DataError, match=r"the grid that was read is not the one that the slices state"):
        VolumeProcessor(load_config("mri.toml", words)).reader.whole((series, None))
