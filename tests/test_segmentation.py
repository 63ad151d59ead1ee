"""Segmentation: Dice and windows against their definitions, a SwinUNETR on real slabs under a sharding engine, mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from monai.transforms import Compose, RandFlipd
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dcft_dist.config.toml import load_config
from dcft_dist.data.user_task import user_task
from dcft_dist.data.volumes import LabelledVolumeProcessor, VolumeProcessor
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.errors import ConfigError, DataError
from dcft_dist.models.build import build_model
from dcft_dist.objectives.segmentation import Segmentation
from dcft_dist.seeds import seed_of

from .own import dicom_series, slabs
from .processes import dcft, output_of
from .ranks import run_ranks

CLASSES = '["none", "grey", "white"]'
KEYS = ["--task.name", "own", "--task.kind", "segmentation", "--data.modality", "volume", "--data.classes", CLASSES]
KEYS += ["--data.input", "image", "--data.label", "mask", "--data.split", "split", "--data.patch", "[32, 32, 8]"]


def test_dice_distance_and_loss_by_their_definitions() -> None:
    torch.manual_seed(0)
    objective = Segmentation(["none", "a", "b", "c"], [4, 4, 4], 0.25)
    labels = torch.randint(0, 3, (2, 1, 4, 4, 4))  # nothing is of class c
    outputs = torch.randn(2, 4, 4, 4, 4)
    outputs[:, 3] = -99.0
    found = objective.metrics(objective.records(outputs, labels), torch.zeros(2))
    said, wanted = outputs.argmax(1), []
    for name, c in (("a", 1), ("b", 2)):
        pairs = [(s == c, mask[0] == c) for s, mask in zip(said, labels, strict=True)]
        each = [2 * (s & mask).sum() / (s.sum() + mask.sum()) for s, mask in pairs]
        wanted.append(float(sum(each) / 2))
        assert found[f"dice_{name}"] == pytest.approx(wanted[-1], abs=1e-6)
    assert found["dice"] == pytest.approx(sum(wanted) / 2, abs=1e-6) and "dice_c" not in found
    plain = torch.nn.functional.cross_entropy(outputs, labels[:, 0], reduction="none").flatten(1).mean(1)
    assert found["loss"] == pytest.approx(float(plain.mean()), rel=1e-6)
    one, two = objective.losses(outputs[:1], labels[:1]), objective.losses(outputs[1:], labels[1:])
    torch.testing.assert_close(objective.losses(outputs, labels), torch.cat([one, two]))
    apart = torch.full((1, 2, 9, 4, 4), -1.0)
    apart[:, 1, 2] = 1.0
    mask = torch.zeros(1, 1, 9, 4, 4, dtype=torch.long)
    mask[:, :, 5] = 1
    flat = Segmentation(["none", "a"], [9, 4, 4], 0.0)
    assert flat.metrics(flat.records(apart, mask), torch.zeros(1))["hd95"] == 3.0


def test_what_is_in_one_of_both_alone_is_the_worst_there_is() -> None:
    """Three cases: class a right; class a where there is none; class a not found. Class b is nowhere, and left out."""
    objective = Segmentation(["none", "a", "b"], [6, 6], 0.0, spacing=[2.0, 3.0])
    masks, outputs = torch.zeros(3, 1, 6, 6, dtype=torch.long), torch.zeros(3, 3, 6, 6)
    outputs[:, 0] = 1.0
    masks[[0, 2], 0, 2:4, 2:4] = 1
    outputs[:2, 1, 2:4, 2:4] = 2.0
    records = objective.records(outputs, masks)
    assert records[:, 1].tolist() == [1.0, 0.0, 0.0] and records[:, [2, 4]].isnan().all()
    diagonal = (10**2 + 15**2) ** 0.5
    assert records[:, 3].tolist() == pytest.approx([0.0, diagonal, diagonal])
    found = objective.metrics(records, torch.zeros(3))
    assert found["dice"] == pytest.approx(1 / 3) and found["hd95"] == pytest.approx(2 * diagonal / 3)
    assert "dice_b" not in found and set(found) <= set(objective.names(torch.zeros(3)))
    shifted = outputs[:1].roll((1, 0), (2, 3))
    assert objective.metrics(objective.records(shifted, masks[:1]), torch.zeros(1))["hd95"] == 2.0  # mm along the rows


def windows_here() -> Any:
    """Ranks have volumes of different sizes: as many forwards on each, or FSDP would wait for ever."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 1))
    plan = WrapOptions("fsdp2" if ranks > 1 else "single", torch.device("cpu"), [net[0]])
    model = prepare(net, plan, lambda weights: torch.optim.SGD([p for _, p, _ in weights], lr=0.1)).model
    objective, found = Segmentation(["none", "a"], [8, 8, 8], 0.25), []
    for i in range(rank, 2, ranks):
        image = torch.randn(1, 1, 8 + 12 * i, 8, 8, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            found.append(objective.whole(lambda batch: model(batch["image"]), {"image": image}))
    return [x.double().sum().item() for x in found]


def test_windows_on_ranks_with_different_volumes() -> None:
    alone = run_ranks(1, windows_here)[0]
    assert [x for (x,) in run_ranks(2, windows_here)] == pytest.approx(alone, rel=1e-6)


def small_convolution() -> None:
    """Two voxels along each axis; memory that is given back holds what shows at once if it is read."""
    torch.manual_seed(0)
    net = nn.Conv3d(96, 96, 3, padding=1, bias=False)
    image, slope = (torch.randn(1, 96, 2, 2, 2).bfloat16() for _ in range(2))
    exact = net.weight.detach().bfloat16().double().requires_grad_()
    nn.functional.conv3d(image.double(), exact, padding=1).backward(slope.double())
    prepared = prepare(net, WrapOptions("single", torch.device("cpu"), [], bf16=True), lambda w: torch.optim.SGD([w[0][1]]))
    for value in (torch.nan, 1e30, 3.0):
        rubbish = [torch.full((n,), value) for n in (10**3, 10**5, 10**6)]
        del rubbish
        net.weight.grad = None
        with prepared.computing():
            net(image).backward(slope)
        assert float((net.weight.grad - exact.grad).abs().max()) < 0.01 * float(exact.grad.abs().max())


def test_gradients_of_3d_convolutions_in_bfloat16() -> None:
    """oneDNN's are not what they should be: other numbers in each run, and now and then a NaN."""
    run_ranks(1, small_convolution)


def test_windows_make_up_the_whole() -> None:
    """A model that looks at one voxel gives the same in windows; the image is left as it was."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, 20, 17, 8)
    kept = image.clone()
    objective = Segmentation(["none", "a"], [8, 8, 8], 0.25)
    found = objective.whole(lambda batch: torch.cat([batch["image"], -batch["image"]], 1), {"image": image})
    assert torch.equal(image, kept)
    torch.testing.assert_close(found, torch.cat([image, -image], 1))


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
    with pytest.raises(DataError, match=r"image5.nii.gz and .*second5.nii.gz lie differently in space"):
        VolumeProcessor(both).check([task.test], 0, 1)
    nibabel.save(nibabel.Nifti1Image(np.full(one.shape, np.nan), one.affine), tmp_path / "second5.nii.gz")
    with pytest.raises(DataError, match=r"volumes: \S*second5.nii.gz: some of its voxels are no numbers"):
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

    plain, mine = patches(), patches("--data.transform", "tests.test_segmentation.flip_both")
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
    with pytest.raises(ConfigError, match=r"data.transform: it makes \[1, 16, 16, 8\] of \[1, 32, 32, 8\]"):
        patches("--data.transform", "monai.transforms.CenterSpatialCropd", *flips[2:],
                "--data.transform_args.roi_size", "[16, 16, 8]")  # fmt: skip
    with pytest.raises(ConfigError, match=r"data.transform: the mask has values 0.5: it is to be interpolated by nearest"):
        patches("--data.transform", "tests.test_segmentation.halved")
    with pytest.raises(ConfigError, match=r"data.transform: it gives a NoneType, not an array"):
        patches("--data.transform", "tests.test_segmentation.emptied")
    with pytest.raises(ConfigError, match=r"data.transform: it is to give a dictionary with image and mask"):
        patches("--data.transform", "builtins.len")


def test_a_variant_does_not_depend_on_the_place_of_the_patch(tmp_path: Path) -> None:
    words = [*KEYS, "--data.path", str(slabs(tmp_path)), "--model.build", "json.loads", "--import_roots", '["."]']
    config = load_config("mri.toml", words)
    vary = load_config("mri.toml", [*words, "--data.transform", "tests.test_segmentation.Flips"])
    (plain, varied), task = [VolumeProcessor(one) for one in (config, vary)], user_task(config)
    pair, alike = (task.train.inputs[0], task.train.labels[0]), []
    for draw in range(20):
        patches = [one.patch(pair, f"{draw}:0")[0] for one in (plain, varied)]
        flips = Flips()
        flips.set_random_state(seed_of(0, f"{draw}:0"))  # where the cropping begins
        again = flips({"image": patches[0], "mask": patches[0]})["image"]
        alike.append(torch.equal(torch.as_tensor(again), patches[1]))
    assert 0 < sum(alike) < 20


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
    assert again.returncode and "nothing is overwritten" in again.stderr
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
    image, mask = processor.whole((files[0], files[1]))
    assert torch.equal(processor.whole((files[0], None))[0], image)
    back, found = processor.as_in_file(files[0], mask[0])  # type: ignore[index]
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
    image, found = processor.whole((tmp_path / "image.png", tmp_path / "mask.png"))
    torch.testing.assert_close(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert found is not None and np.array_equal(found[0].numpy(), mask)
    back, _ = processor.as_in_file(tmp_path / "image.png", found[0])
    assert np.array_equal(back, mask)


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
    assert summary["test"]["dice"] > 0.5 and summary["num_selected"] > 0
    (tmp_path / "asked.csv").write_text("image,square\nimage5.png,square5.png\n")
    words = ["predict", tmp_path / "run", "--data.path", tmp_path / "asked.csv"]
    output_of(*words, "--masks", tmp_path / "said", "--out", tmp_path / "said.csv")
    found, wanted = (np.asarray(Image.open(f)) for f in (tmp_path / "said/image5_mask.png", tmp_path / "mask5.png"))
    assert found.shape == wanted.shape == (44, 40)
    dice = [2 * np.sum((found == c) & (wanted == c)) / (np.sum(found == c) + np.sum(wanted == c)) for c in (1, 2)]
    assert summary["test"]["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "said.csv").open()))
    assert float(rows[0]["pixels(grey)"]) == np.sum(found == 1)
    # MONAI and plain torch alone: the exported network by a sliding window gives that mask, and the loss of the run.
    net = UNet(2, 2, 3, [8, 16], [2], norm="batch").eval()
    net.load_state_dict(load_file(tmp_path / "run/model/model.safetensors"))
    pixels = [np.asarray(Image.open(tmp_path / f"{name}5.png"), np.float32) for name in ("image", "square")]
    image = torch.stack([torch.from_numpy((p - p[p != 0].mean()) / p[p != 0].std() * (p != 0)) for p in pixels])
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
            r"mask2.nii.gz lie differently in space \(voxels \[1.0, 1.0, 2.0\] and \[1.0, 1.0, 1.0\]",
        ),
        ("shape", r"image2.nii.gz is \[39, 40, 8\] and .*mask2.nii.gz \[40, 40, 8\]"),
        ("nan", "image2.nii.gz: some of its voxels are no numbers"),
        ("infinite", "image2.nii.gz: some of its voxels are no numbers"),
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
    (image, one), (whole, other) = processor.whole((series, mask)), processor.whole((tmp_path / "image2.nii.gz", mask))
    assert torch.equal(one, other) and image.shape == whole.shape
    torch.testing.assert_close(image, whole, atol=0.02, rtol=0)  # DICOM has whole numbers


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gap", r"series2: 1 missing between slice002.dcm and slice004.dcm, which lie 2 mm apart, the others 1 mm"),
        ("twice", r"series2: slice003.dcm and .*copy.dcm lie at the same place|copy.dcm and slice003.dcm lie at the same"),
        ("all at one place", r"series2: slice000.dcm and slice001.dcm lie at the same place"),
        ("each twice", r"series2: .*slice000.dcm lie at the same place|series2: slice000.dcm and .* lie at the same place"),
        ("no series", r"series2: a slice does not say what series it is of, or where it lies"),
        ("two", r"series2: the slices of 2 series; a folder for each is needed"),
        ("every second", r"series2: slices numbered in steps of 2, 2 mm apart and 1 mm thick: the others are missing"),
        ("elsewhere", r"series2 and .*mask2.nii.gz lie differently in space"),
        ("end", r"series2 is \[40, 40, 7\] once it is turned, and .*mask2.nii.gz \[40, 40, 8\]"),
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
    with pytest.raises(ConfigError, match=r"data\.transform varies images"):
        load_config("mri.toml", [*text, "--data.transform", "a.b"])
    with pytest.raises(ConfigError, match=r"several columns of data.input are channels of a volume"):
        load_config("mri.toml", [*text, "--data.input", '["a", "b"]'])
    with pytest.raises(ConfigError, match=r"class_weights = 'balanced' is for task.kind = 'single_label'"):
        load_config(
            "mri.toml", [*KEYS, "--data.path", "x", "--task.class_weights", "balanced", "--model.build", "json.loads"]
        )
    with pytest.raises(ConfigError, match=r"segmentation' needs data.modality = 'volume'"):
        load_config("mri.toml", [*KEYS, "--data.path", "x", "--data.modality", "image", "--model.build", "json.loads"])
    with pytest.raises(ConfigError, match=r"segmentation needs data.format = 'table' and data.classes"):
        load_config("mri.toml", [*KEYS, "--data.path", "x", "--data.classes", "[]", "--model.build", "json.loads"])


def test_volumes_with_a_diagnosis(tmp_path: Path) -> None:
    """NIfTI files of several sizes and their classes, a ResNet of MONAI on two ranks; other volumes are predicted."""
    slabs(tmp_path)
    rows = ["scan,finding,case,split"]
    for i in range(18):
        image = nibabel.load(tmp_path / f"image{i % 6}.nii.gz")
        values = image.get_fdata().astype(np.float32)
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
    assert summary["test"]["accuracy"] == 1.0 and summary["labels"]["names"] == ["block", "none"]
    (tmp_path / "asked.csv").write_text("scan,case\nscan0.nii.gz,a\nscan1.nii.gz,b\n")
    out = output_of("predict", tmp_path / "run", "--data.path", tmp_path / "asked.csv")
    assert [row["predicted"] for row in csv.DictReader(out.splitlines())] == ["block", "none"]
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
    with pytest.raises(DataError, match=r"2 of 18 volumes: \S*scan3.nii.gz: cannot be read.* 2 channels, others 1"):
        processor.check([task.train, task.validation, task.test], 0, 1)
    flat = load_config("mri.toml", [*words, "--data.patch", "[40, 40]"])
    with pytest.raises(DataError, match=r"scan12.nii.gz is \[\d+, \d+, 8\] once it is turned, and data.patch \[40, 40\]"):
        LabelledVolumeProcessor(flat).check([task.test], 0, 1)
