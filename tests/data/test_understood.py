"""`dcft check --data` says what was understood, as other readers of the same files do; a sheet shows the pictures."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from dcft_dist.data.splits import Split, TaskData
from dcft_dist.data.understood import description

from ..own import slabs
from ..processes import dcft, output_of

TEXT = ["--data.modality", "text", "--data.input", "text", "--data.label", "label"]
SMALL = ["--train.global_batch", "2", "--importance.num_samples", "2", "--importance.score_batch", "2"]


def checked(*words: str) -> str:
    return output_of("check", "smoke.toml", "--data", *SMALL, *words)


def volume_words(file: Path) -> list[str]:
    words = [
        "--data.path",
        str(file),
        "--data.modality",
        "volume",
        "--task.kind",
        "segmentation",
        "--data.patch",
        "[8, 8, 8]",
    ]
    words += ["--data.classes", '["none", "grey", "white"]', "--data.input", "image", "--data.label", "mask"]
    words += ["--data.split", "split", "--data.group", "patient", "--model.build", "monai.networks.nets.UNet"]
    args = '{spatial_dims = 3, in_channels = 1, out_channels = "num_outputs", channels = [4, 8], strides = [2]}'
    return [*words, "--model.args", args, "--model.head", '["model.2.*"]']


def test_volumes_as_nibabel_reads_them(tmp_path: Path) -> None:
    file = slabs(tmp_path, side=16)
    for kind in ("image", "mask"):  # stored with other axes, and other voxels
        image = nibabel.load(tmp_path / f"{kind}1.nii.gz")
        turned = image.as_reoriented(nibabel.orientations.axcodes2ornt(("L", "S", "P")))
        affine = turned.affine @ np.diag([2.0, 0.5, 1.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj), affine), tmp_path / f"{kind}1.nii.gz")
    said = checked(*volume_words(file), "--sheet", str(tmp_path / "sheet.png"))
    stored, mask = (nibabel.load(tmp_path / f"{kind}1.nii.gz") for kind in ("image", "mask"))
    size = " x ".join(map(str, stored.shape))
    spacing = " x ".join(f"{v:g}" for v in stored.header.get_zooms())
    axes = "".join(nibabel.aff2axcodes(stored.affine))
    values = np.asarray(stored.dataobj)
    classes, counts = np.unique(np.asarray(mask.dataobj), return_counts=True)
    line = next(line for line in said.splitlines() if line.startswith("  image1.nii.gz"))
    assert f"{size} voxels of {spacing} mm, axes {axes}, 1 channel from {values.min():g} to {values.max():g}; " in line
    assert ", axes RAS; mask " + ", ".join(f"{c}: {n}" for c, n in zip(classes, counts, strict=True)) in line
    assert line.endswith("; group slab1") and "train: 4 examples in 4 groups" in said
    assert "sheet.png: 6 pictures" in said and Image.open(tmp_path / "sheet.png").width > 800


def test_images_and_their_sheet(tmp_path: Path) -> None:
    """A picture on its side is described and drawn upright; each class is shown."""
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "data" / ("left" if i < 16 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(10, 200, (30, 50, 3)).astype(np.uint8)
        pixels[:8, :, :] = [255, 0, 0]  # a red edge above
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[274] = 6 if i == 0 else 1  # to be turned by 90 degrees
        image.save(folder / f"p{i:02}_x.png", exif=exif)
    words = ["--data.path", str(tmp_path / "data"), "--data.format", "image_folder", "--data.modality", "image"]
    words += ["--data.group_pattern", "^(p..)", "--model.build", "tests.train.test_handshake.Net", "--model.image_size", "8"]
    words += ["--model.args", '{num_outputs = "num_outputs"}', "--import_roots", f'["{Path(__file__).parents[2]}"]']
    said = checked(*words, "--sheet", str(tmp_path / "sheet.png"))
    assert "left " in said.splitlines()[0] and "right " in said.splitlines()[0]
    line = next((line for line in said.splitlines() if line.startswith("  p00_x.png")), "")
    assert not line or "30 x 50 pixels, 3 channels of uint8 from 0 to 255; for the model 8 x 8; left; group p00" in line
    others = [line for line in said.splitlines() if "50 x 30 pixels" in line]
    assert len(others) + bool(line) == 9 and any("; right; " in other for other in others)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert (sheet[8:12, 20:180] - [255, 0, 0] == 0).all() or (sheet[20:180, 196:199] - [255, 0, 0] == 0).all(), (
        "the red edge"
    )


@pytest.mark.parametrize(
    ("kind", "labels", "said"),
    [
        ("single_label", ["ill", "well"], "ill 7, well 7"),
        ("regression", [1.5, 3.5], "label from 1.5 to 3.5, mean 2.5"),
    ],
)
def test_texts(tmp_path: Path, kind: str, labels: list[object], said: str) -> None:
    rows = [f"text number {i},{labels[i % 2]},train,{i // 2}" for i in range(14)]
    rows += [f"another text {i},{labels[i % 2]},{split},{i}" for i in range(100, 104) for split in ("val", "test")][:8]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["text,label,split,patient", *rows[:14]]) + "\n")
    with table.open("a") as file:
        file.write("".join(f"v{i},{labels[i % 2]},val,v{i}\nt{i},{labels[i % 2]},test,t{i}\n" for i in range(2)))
    words = ["--data.path", str(table), "--data.split", "split", "--data.group", "patient", "--task.kind", kind, *TEXT]
    out = checked(*words)
    assert out.startswith(f"train: 14 examples in 7 groups; {said}\n  text number 0: 13 characters, 5 tokens; ")
    done = dcft("check", "smoke.toml", "--data", *SMALL, *words, "--sheet", str(tmp_path / "s.png"))
    assert done.returncode == 2 and "these inputs cannot be drawn" in done.stderr


class Plain:
    """A processor, as far as a description needs one."""

    def describe(self, value: str, label: int) -> str:
        return value


def test_rare_classes_are_named_in_every_split() -> None:
    few, many = Split(["x"] * 9, [0] * 8 + [1], ["g"] * 9), Split(["x"] * 16, [0, 1] * 8, ["g"] * 16)
    task = TaskData(["common", "rare"], few, few, many, "", "")
    said = description(task, Plain())  # type: ignore[arg-type]
    found = [line for line in said.splitlines() if not line.startswith(" ")]
    assert ["fewer than 5 of rare" in line for line in found] == [True, True, False]
    assert said.splitlines()[-1].endswith('task.class_weights = "balanced" lets those of rare classes count more')
    enough = description(TaskData(["common", "rare"], many, many, many, "", ""), Plain())  # type: ignore[arg-type]
    assert "class_weights" not in enough
