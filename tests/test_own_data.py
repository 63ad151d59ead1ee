"""The user's data: every format, splits by group, every mistake named, and whole runs on real texts and images."""

from __future__ import annotations

import csv
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcft_dist.config.toml import load_config
from dcft_dist.data.batches import order
from dcft_dist.data.images import UserImageProcessor, read_image
from dcft_dist.data.splits import Split, TaskData
from dcft_dist.data.user_task import user_task
from dcft_dist.errors import ConfigError, DataError

from .own import drug_table, minilm_copy, mri_folder
from .processes import dcft, output_of, start


def task_of(*words: str) -> TaskData:
    return user_task(load_config("icd.toml", ["--task.name", "own", *words]))


def table(folder: Path, rows: list[dict[str, Any]], name: str = "data.csv") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def texts(number: int = 40, groups: int = 20) -> list[dict[str, Any]]:
    return [{"input": f"text {i}", "label": "ab"[i % 2], "patient": f"p{i % groups}"} for i in range(number)]


TEXT = ["--data.modality", "text"]


# -- formats -------------------------------------------------------------------------------------------------------------


def test_one_table_is_split_by_group(tmp_path: Path) -> None:
    file = table(tmp_path, texts(60, 20))
    data = task_of("--data.path", str(file), *TEXT, "--data.group", "patient")
    groups = [set(split.groups) for split in (data.train, data.validation, data.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert [len(g) for g in groups] == [13, 3, 4] and sum(map(len, (data.train, data.validation, data.test))) == 60
    assert data.class_names == ["a", "b"] and data.caveat == ""
    again = task_of("--data.path", str(file), *TEXT, "--data.group", "patient")
    other = task_of("--data.path", str(file), *TEXT, "--data.group", "patient", "--task.split_seed", "9")
    assert again == data and other.test.groups != data.test.groups
    assert "No groups were given" in task_of("--data.path", str(file), *TEXT).caveat


def test_the_same_rows_in_every_kind_of_table(tmp_path: Path) -> None:
    rows = [{**row, "split": ["train", "val", "test"][i % 20 % 3]} for i, row in enumerate(texts())]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with table(tmp_path, rows).open() as file:
        (tmp_path / "data.tsv").write_text("\n".join("\t".join(row) for row in csv.reader(file)))
    (tmp_path / "my_rows.py").write_text(f"def rows():\n    return {rows!r}\n")
    how = [*TEXT, "--data.group", "patient", "--data.split", "split"]
    found = [task_of("--data.path", str(tmp_path / f"data.{kind}"), *how) for kind in ("csv", "tsv", "jsonl")]
    roots = ["--import_roots", json.dumps([str(tmp_path)])]
    found.append(task_of("--data.format", "python", "--data.build", "my_rows.rows", *how, *roots))
    assert all(data.checksum == found[0].checksum and data.test == found[0].test for data in found)
    assert [len(found[0].train), len(found[0].validation), len(found[0].test)] == [14, 14, 12]


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet

    rows = texts()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    how = [*TEXT, "--data.group", "patient"]
    wanted = task_of("--data.path", str(table(tmp_path, rows)), *how)
    assert task_of("--data.path", str(tmp_path / "data.parquet"), *how).train == wanted.train
    assert task_of("--data.path", str(tmp_path / "saved"), "--data.format", "dataset", *how).train == wanted.train


def picture(file: Path, value: int = 100, size: int = 8) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, np.uint8)).save(file)
    return file


def test_image_folders(tmp_path: Path) -> None:
    for split, number in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(number):
            for name in ("ill", "well"):
                picture(tmp_path / "split" / split / name / f"{split}{i}_{name}.png")
                picture(tmp_path / "plain" / name / f"p{split}{i}_{name}.png")
    data = task_of("--data.format", "image_folder", "--data.path", str(tmp_path / "split"))
    assert data.class_names == ["ill", "well"] and [len(data.train), len(data.validation), len(data.test)] == [8, 4, 4]
    how = ["--data.format", "image_folder", "--data.path", str(tmp_path / "plain"), "--data.group_pattern", "^(p.*)_"]
    data = task_of(*how)
    assert {len(split) % 2 for split in (data.train, data.validation, data.test)} == {0}  # a patient has two images
    with pytest.raises(DataError, match="finds no group in the name"):
        task_of(*how[:-1], "^q(.*)_")


def test_medmnist(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {}
    for name, number in (("train", 12), ("val", 6), ("test", 6)):
        arrays[f"{name}_images"] = draw.integers(0, 256, (number, 28, 28, 3), np.uint8)
        arrays[f"{name}_labels"] = np.arange(number)[:, None] % 3
    np.savez(tmp_path / "toy.npz", **arrays)
    data = task_of("--data.format", "medmnist", "--data.path", str(tmp_path / "toy.npz"))
    assert data.class_names == ["0", "1", "2"] and data.validation.labels == [0, 1, 2, 0, 1, 2]
    assert read_image(data.test.inputs[0], 3).shape == (3, 28, 28)


def test_findings_and_numbers(tmp_path: Path) -> None:
    rows = [{"input": f"t{i}", "a": i % 2, "b": ["", "-1", "1", "0"][i % 4], "age": 40 + i} for i in range(20)]
    file = table(tmp_path, rows)
    data = task_of("--data.path", str(file), *TEXT, "--task.kind", "multi_label", "--data.label", '["a", "b"]')
    splits = (data.train, data.validation, data.test)
    found = {text: label for split in splits for text, label in zip(split.inputs, split.labels, strict=True)}
    assert data.class_names == ["a", "b"] and found["t2"] == [0.0, 1.0] and found["t3"] == [1.0, 0.0]
    assert any(x[1] != x[1] for x in data.train.labels)
    data = task_of("--data.path", str(file), *TEXT, "--task.kind", "regression", "--data.label", "age")
    assert sorted(data.train.labels + data.validation.labels + data.test.labels) == [float(40 + i) for i in range(20)]


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
    with pytest.raises(DataError, match="film: no image that can be read: 2 frames, not one picture"):
        read_image(tmp_path / "film", 1)


def test_variants_are_functions_of_seed_epoch_and_example(tmp_path: Path) -> None:
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"input": f"{i % 8}.png", "label": i % 2, "n": i} for i in range(20)]
    how = ["--data.path", str(table(tmp_path, rows)), "--task.name", "own", "--model.image_size", "8"]
    vary = ["--data.transform", "tests.test_own_data.random_flip", "--import_roots", '["."]']
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
    config = load_config("mri.toml", [*how, "--data.transform", "json.loads"])
    task = user_task(config)
    with pytest.raises(ConfigError, match=r"data.transform: json.loads fails: TypeError: the JSON object must be"):
        UserImageProcessor(config).check([task.train, task.validation, task.test], 0, 1)


# -- mistakes ------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {}


def bad(message: str) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    def keep(make: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        BAD[make.__name__] = (make, message)
        return make

    return keep


@bad(r"data.csv, line 2: no column 'lable' \(did you mean 'label'\?\); it has input, label, patient")
def column(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, texts())), *TEXT, "--data.label", "lable"]


@bad("nothing.csv cannot be read: .*No such file")
def no_file(folder: Path) -> list[str]:
    return ["--data.path", str(folder / "nothing.csv"), *TEXT]


@bad("group 'p0' is in two splits: .*data.csv, line 2 is for train, .*data.csv, line 22 for test")
def group_in_two_splits(folder: Path) -> list[str]:
    rows = [{**row, "split": "test" if i >= 20 else "train" if i % 2 else "val"} for i, row in enumerate(texts())]
    rows[0]["split"] = "train"
    return ["--data.path", str(table(folder, rows)), *TEXT, "--data.group", "patient", "--data.split", "split"]


@bad(r"2 of 40 files are missing: .*image5.png \(.*data.csv, line 7\), .*image9.png")
def missing_files(folder: Path) -> list[str]:
    rows = [{"input": f"image{i}.png", "label": i % 2} for i in range(40)]
    for i in range(40):
        if i not in (5, 9):
            picture(folder / f"image{i}.png")
    return ["--data.path", str(table(folder, rows))]


@bad(r"line 4: label 'c' is none of the 2 classes.*: a, b")
def label_out_of_range(folder: Path) -> list[str]:
    rows = texts()
    rows[2]["label"] = "c"
    return ["--data.path", str(table(folder, rows)), *TEXT, "--data.classes", '["a", "b"]']


@bad("no training example of c")
def empty_class(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, texts())), *TEXT, "--data.classes", '["a", "b", "c"]']


@bad("there is only one class: a")
def one_class(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, [{**row, "label": "a"} for row in texts()])), *TEXT]


@bad("line 3: label 'old' is no number")
def no_number(folder: Path) -> list[str]:
    rows = [{"input": "x", "age": "old" if i == 1 else 3} for i in range(10)]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--task.kind", "regression", "--data.label", "age"]


@bad("line 5: the column 'label' is empty")
def empty_label(folder: Path) -> list[str]:
    rows = texts()
    rows[3]["label"] = " "
    return ["--data.path", str(table(folder, rows)), *TEXT]


@bad(r"data.jsonl, line 2: the column 'input' is empty")
def empty_text(folder: Path) -> list[str]:
    rows = texts()
    rows[1]["input"] = None
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data.path", str(folder / "data.jsonl"), *TEXT]


@bad("group 'p0' is in two splits")
def group_with_spaces(folder: Path) -> list[str]:
    rows = [{**row, "split": ["train", "val", "test"][i % 20 % 3]} for i, row in enumerate(texts())]
    rows[20] |= {"patient": "p0 ", "split": "test"}
    return ["--data.path", str(table(folder, rows)), *TEXT, "--data.group", "patient", "--data.split", "split"]


@bad("line 2: a finding is 1, 0, or empty for unknown, not '2'")
def no_finding(folder: Path) -> list[str]:
    rows = [{"input": "x", "a": 2} for _ in range(10)]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--task.kind", "multi_label", "--data.label", '["a"]']


@bad("line 2: the column 'patient' is empty")
def empty_group(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, [{**row, "patient": ""} for row in texts()])), *TEXT, "--data.group", "patient"]


@bad("no training example with, or none without, the finding 'b'")
def empty_finding(folder: Path) -> list[str]:
    rows = [{"input": f"t{i}", "a": i % 2, "b": ["", 0][i % 2]} for i in range(20)]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--task.kind", "multi_label", "--data.label", '["a", "b"]']


@bad(r"data.jsonl, line 3: no JSON object")
def broken_line(folder: Path) -> list[str]:
    lines = [*map(json.dumps, texts())]
    lines[2] = lines[2][:-1]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return ["--data.path", str(folder / "data.jsonl"), *TEXT]


@bad(r"x.png' is in two splits: .*data.csv, line 2 is for train, .*data.csv, line 3 for test")
def one_file_in_two_splits(folder: Path) -> list[str]:
    picture(folder / "x.png")
    picture(folder / "y.png")
    rows = [{"input": "xxy"[i] + ".png", "label": i % 2, "split": ["train", "test", "val"][i]} for i in range(3)]
    return ["--data.path", str(table(folder, rows)), "--task.name", "own", "--data.split", "split"]


@bad(r"train_labels have \(14,\) columns, data.label 3")
def findings_of_medmnist(folder: Path) -> list[str]:
    arrays = {f"{s}_images": np.zeros((4, 28, 28), np.uint8) for s in ("train", "val", "test")}
    arrays |= {f"{s}_labels": np.zeros((4, 14), np.uint8) for s in ("train", "val", "test")}
    np.savez(folder / "chest.npz", **arrays)
    words = ["--task.name", "own", "--data.format", "medmnist", "--data.path", str(folder / "chest.npz")]
    return [*words, "--task.kind", "multi_label", "--data.label", '["a", "b", "c"]']


@bad("the split is 'holdout', not train, validation or test")
def odd_split(folder: Path) -> list[str]:
    rows = [{**row, "split": "holdout"} for row in texts()]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--data.split", "split"]


@bad("no examples for validation, test: with so few groups, give splits of your own")
def too_few_groups(folder: Path) -> list[str]:
    shares = ["--data.validation_share", "0", "--data.test_share", "0"]
    return ["--data.path", str(table(folder, texts())), *TEXT, *shares]


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(DataError, match=message):
        task_of(*make(tmp_path))


def test_keys_that_do_not_fit() -> None:
    for words, message in (
        ([], "needs data: data.path"),
        (["--data.format", "image_folder"], "needs data: data.path"),
        (["--data.format", "python"], "needs data: data.build"),
        (["--data.path", "x", "--data.label", '["a"]'], "data.label is a list of columns for task.kind = 'multi_label'"),
        (["--data.path", "x", "--task.kind", "multi_label"], "data.label is a list of columns"),
        (["--data.path", "x", "--data.group_pattern", "^(.)"], "group_pattern is for format = 'image_folder'"),
        (["--data.path", "x", "--data.format", "medmnist", "--data.group", "p"], "has no columns, so no group"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config("icd.toml", ["--task.name", "own", *words])
    with pytest.raises(ConfigError, match=r"task.name = 'drug_review' is of the kind 'single_label'"):
        load_config("icd.toml", ["--task.name", "drug_review", "--task.kind", "regression"])


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
        assert "image3.png: no image that can be read" in found.stderr
        assert "nan.npy: 1 of its pixels are no numbers" in found.stderr
    with pytest.raises(DataError, match=r"whole numbers of int64: what is white\?"):
        read_image(np.full((4, 4), 255), 3)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.npy: no image that can be read"):
        read_image(tmp_path / "empty.npy", 3)
    with pytest.raises(DataError, match=r"deep.npy: an image of shape \[4, 4, 9\] does not go into 3 channels"):
        read_image(tmp_path / "deep.npy", 3)


def test_arrays_are_named_by_their_place() -> None:
    pixels = np.ones((4, 4), np.float32)
    pixels[0, 0] = np.nan
    processor = UserImageProcessor(load_config("mri.toml", ["--task.name", "own", "--data.path", "x"]))
    splits = [Split([pixels * 0, good], [0, 0], ["a", "b"]) for good in (pixels * 0 + 1, pixels, pixels)]
    with pytest.raises(DataError, match="validation example 1: array: 1 of its pixels are no numbers"):
        processor.check([Split([np.nan_to_num(x) for x in splits[0].inputs], [0, 0], ["a", "b"]), *splits[1:]], 0, 1)
    deep = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(DataError, match="whole numbers from 70000 to 70000 do not go into 16 bits"):
        read_image(deep, 3)


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def test_what_the_processor_beside_the_weights_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What transformers' own image processor makes of an image of the right size."""
    from transformers import ViTImageProcessor

    source = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    for i, facts in enumerate(
        (
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
            {"do_normalize": False},
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
            {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        )
    ):
        theirs = ViTImageProcessor(size={"height": 32, "width": 32}, **facts)
        theirs.save_pretrained(tmp_path / str(i))
        if i == 1:  # as older files have it
            facts_there = json.loads((tmp_path / "1/preprocessor_config.json").read_text())
            (tmp_path / "1/preprocessor_config.json").write_text(json.dumps({**facts_there, "size": 32}))
        words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "32", "--model.build", "json.loads"]
        mine = UserImageProcessor(load_config("mri.toml", [*words, "--model.weights", str(tmp_path / str(i))]))
        wanted = theirs(images=source, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(mine.image(source), wanted)
        floats = mine.image(source.astype(np.float32))  # which nobody scales
        torch.testing.assert_close(
            floats, (torch.from_numpy(source).permute(2, 0, 1) - _column(mine.mean)) / _column(mine.std)
        )
        assert "model.image_size" not in caplog.text
        mine.save(tmp_path / str(i))  # what it leaves says the same
        torch.testing.assert_close(
            ViTImageProcessor.from_pretrained(tmp_path / str(i))(images=source, return_tensors="pt")["pixel_values"][0],
            wanted,
        )
    words = [*words[:5], "64", *words[6:], "--model.weights", str(tmp_path / "0")]
    UserImageProcessor(load_config("mri.toml", words))
    assert "model.image_size = 64, but" in caplog.text


@pytest.mark.parametrize(
    "kind",
    ["BitImageProcessor", "ViTImageProcessor", "ConvNextImageProcessor", "CLIPImageProcessor", "MobileViTImageProcessor"],
)
def test_a_processor_of_transformers_resizes_and_crops(kind: str, tmp_path: Path) -> None:
    """With `data.processor` an image of any size and mode becomes what the model has seen, and what the export says."""
    import transformers

    size = {"BitImageProcessor": {"shortest_edge": 40}, "ConvNextImageProcessor": {"shortest_edge": 32}}.get(kind)
    crop = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True} if kind[:3] in ("Bit", "CLI", "Mob") else {}
    plain = {"height": 32, "width": 32} if kind[:3] == "ViT" else {"shortest_edge": 40}
    theirs = getattr(transformers, kind)(size=size or plain, image_std=[0.2, 0.3, 0.4], **crop)
    theirs.save_pretrained(tmp_path / "model")
    words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "32", "--model.build", "json.loads"]
    words += ["--model.weights", str(tmp_path / "model"), "--data.processor", "true"]
    mine = UserImageProcessor(load_config("mri.toml", words))
    colours = np.random.default_rng(0).integers(0, 256, (53, 75, 3)).astype(np.uint8)
    for source in (colours, colours[:, :, 0]):
        picture = Image.fromarray(source).convert("RGB")
        wanted = theirs(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(mine.image(source), wanted, atol=1e-5, rtol=0)
    whole = UserImageProcessor(load_config("mri.toml", words[:-2])).image(colours)
    assert kind[:3] == "ViT" or (whole - mine.image(colours)).abs().mean() > 0.05  # it makes a difference
    mine.save(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == (tmp_path / "model/preprocessor_config.json").read_text()
    with pytest.raises(DataError, match=r"array: values from -3 to 1: data.processor takes those from 0 to 1"):
        mine.image(np.where(colours > 9, 1, -3).astype(np.float32))


def test_a_processor_that_is_not_there_or_does_not_fit(tmp_path: Path) -> None:
    import transformers
    from transformers import ViTImageProcessor

    words = ["--task.name", "own", "--data.path", "x", "--model.image_size", "48", "--model.build", "json.loads"]
    words += ["--model.weights", str(tmp_path), "--data.processor", "true"]
    with pytest.raises(ConfigError, match=r"data.processor: nothing beside model.weights = .* says how"):
        UserImageProcessor(load_config("mri.toml", words))
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json makes images of \[3, 32, 32\]: model.image_size = 32"):
        UserImageProcessor(load_config("mri.toml", words))
    transformers.CLIPImageProcessor(size={"shortest_edge": 48}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"makes images of \[3, 48, 72\], no squares: use data.collate"):
        UserImageProcessor(load_config("mri.toml", words))
    transformers.SamImageProcessor(size={"longest_edge": 48}, pad_size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is more than to resize, crop and normalise: use data.collate"):
        UserImageProcessor(load_config("mri.toml", words))  # it pads what is normalised
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ConfigError, match=r"data.processor: .*preprocessor_config.json: ValueError: "):
        UserImageProcessor(load_config("mri.toml", words))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        UserImageProcessor(load_config("mri.toml", words))
    (tmp_path / "config.json").write_text("[1, 2]")
    UserImageProcessor(load_config("mri.toml", words[:-2]))  # nothing is said there
    with pytest.raises(ConfigError, match=r"data.processor is for task.name = 'own' with data.modality"):
        load_config("mri.toml", [*words, "--data.modality", "text"])


def test_a_checksum_tells_other_images_of_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    def checksum(value: int, size: int) -> str:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        images = [Image.fromarray(np.full((size, size), value + i, np.uint8)) for i in range(20)]
        datasets.Dataset.from_dict({"input": images, "label": [0, 1] * 10}).save_to_disk(tmp_path / "saved")
        return task_of("--data.path", str(tmp_path / "saved"), "--data.format", "dataset").checksum

    assert checksum(0, 8) == checksum(0, 8) != checksum(0, 16)


def test_a_metric_that_is_not_there_is_named_before_the_run(tmp_path: Path) -> None:
    file = table(tmp_path, texts())
    words = ["smoke.toml", "--task.name", "own", "--data.path", str(file), "--data.modality", "text", "--engine", "single"]
    words += ["--runs_dir", str(tmp_path), "--train.global_batch", "4", "--importance.num_samples", "4"]
    words += ["--importance.score_batch", "4", "--train.metric", "acuracy"]
    done = dcft("train", *words)
    assert done.returncode == 2 and "no 'acuracy' on the validation data (did you mean 'accuracy'?)" in done.stderr


# -- whole runs ----------------------------------------------------------------------------------------------------------


def test_texts_from_a_table_with_an_own_model(tmp_path: Path) -> None:
    """Drug reviews and MiniLM, both as files of the user: run, metrics on other data, predictions, the exported model."""
    weights, data = minilm_copy(tmp_path / "minilm", layers=2), drug_table(tmp_path / "reviews.csv", 120)
    (tmp_path / "mine.toml").write_text(
        f"""
        extends = "smoke.toml"
        name = "mine"
        engine = "single"
        runs_dir = "{tmp_path}"
        test_resamples = 20
        [model]
        build = "transformers.AutoModel"
        args = {{add_pooling_layer = false}}
        weights = "{weights}"
        features = "mean"
        [task]
        name = "own"
        class_weights = "balanced"
        [data]
        path = "{data}"
        modality = "text"
        input = "review"
        label = "rating"
        group = "drug"
        [train]
        epochs = 1
        global_batch = 16
        metric = "balanced_accuracy"
        [importance]
        num_samples = 32
        score_batch = 16
        """
    )
    shown = output_of("inspect", str(tmp_path / "mine.toml"))
    assert "eligible" in shown and "head.weight" in shown and "tensors read; 2 started afresh (head.weight" in shown
    shown = output_of("inspect", str(tmp_path / "mine.toml"), "--method", "bitfit")
    assert "frozen" in shown and "eligible" not in shown and "unscored" in shown  # biases alone are trained, and no matrix
    output_of("train", str(tmp_path / "mine.toml"))
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    assert summary["labels"]["names"] == ["negative", "neutral", "positive"] and summary["num_selected"] > 0
    assert {"auroc", "auprc", "balanced_accuracy", "macro_f1", "ece"} <= summary["test"].keys()
    low, high = summary["test_intervals"]["accuracy"]
    assert low <= summary["test"]["accuracy"] <= high
    other = drug_table(tmp_path / "other.csv", 40, split="test")
    found = json.loads(output_of("evaluate", str(tmp_path / "mine"), "--data.path", str(other), "--test_resamples", "10"))
    said = list(csv.DictReader(output_of("predict", str(tmp_path / "mine"), "--data.path", str(other)).splitlines()))
    rated = [row["rating"] for row in csv.DictReader(other.open())]
    right = np.mean([row["predicted"] == rating for row, rating in zip(said, rated, strict=True)])
    assert found["examples"] == len(said) == 40 and right == pytest.approx(found["metrics"]["accuracy"])
    check_text_export(tmp_path / "mine/model", other, said)
    refused = {
        "which data? Give one of --data.path": [],
        "a finished run takes other data": ["--data.path", str(other), "--optimizer.lr", "1"],
    }
    for message, words in refused.items():
        done = dcft("evaluate", tmp_path / "mine", *words)
        assert done.returncode == 2 and message in done.stderr
    split = ["--data.test", str(other), "--test_resamples", "0"]  # of the run's own files nothing is left over
    split += ["--train.evaluation_batch", "13"]  # the last batch has one example: two ranks of three have none
    again = json.loads(output_of("evaluate", str(tmp_path / "mine"), *split, "--engine", "fsdp2", ranks=3))
    assert again["metrics"] == pytest.approx(found["metrics"], abs=1e-6) and again["examples"] == 40


def check_text_export(folder: Path, file: Path, said: list[dict[str, str]]) -> None:
    """transformers alone gives what `dcft predict` says."""
    from transformers import AutoModel, AutoTokenizer

    with file.open() as lines:
        reviews = [row["review"] for row in csv.DictReader(lines)]
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    head = torch.nn.Linear(384, 3)
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    batch = tokenizer(reviews, padding=True, truncation=True, max_length=48, return_tensors="pt")
    weights = batch["attention_mask"].unsqueeze(-1).float()
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
        shares = head((states * weights).sum(1) / weights.sum(1)).softmax(-1)
    for i, name in enumerate(("negative", "neutral", "positive")):
        assert [float(row[f"p({name})"]) for row in said] == pytest.approx(shares[:, i].tolist(), abs=1e-5)


def test_images_in_folders_under_a_sharding_engine(tmp_path: Path) -> None:
    """MRI patches as PNG files and DINOv2 as a folder of transformers, on two ranks: regions, then a number."""
    images, weights = mri_folder(tmp_path / "patches", 6), tmp_path / "dino"
    from dcft_dist.models.build import build_model

    packaged = build_model(load_config("mri.toml", ["--model.num_layers", "2"]), 8)
    packaged.module.backbone.save_pretrained(weights)  # type: ignore[union-attr, operator]
    words = ["--runs_dir", str(tmp_path), "--task.name", "own", "--data.format", "image_folder", "--data.path", str(images)]
    words += ["--data.group_pattern", "^(.*)_", "--model.image_size", "56", "--importance.num_samples", "16"]
    words += ["--importance.score_batch", "8", "--train.global_batch", "8", "--train.epochs", "1", "--test_resamples", "0"]
    words += ["--removal.fractions", "[]", "--engine", "fsdp2"]
    how = ["--model.build", "transformers.AutoModel", "--model.weights", str(weights), "--model.features", "cls"]
    for name, model in (("own", how), ("packaged", ["--model.num_layers", "2"])):
        output_of("train", "mri.toml", "--name", name, *words, *model, ranks=2)
    own, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("own", "packaged"))
    assert own["data_checksum"] == wanted["data_checksum"] and own["num_selected"] == wanted["num_selected"]
    head = [load_file(tmp_path / name / "model/head/model.safetensors") for name in ("own", "packaged")]
    assert head[0].keys() == head[1].keys()
    body = [load_file(tmp_path / name / "model/model.safetensors") for name in ("own", "packaged")]
    assert body[0].keys() == body[1].keys()
    out = output_of("predict", str(tmp_path / "own"), "--data.path", str(images))
    assert len(out.splitlines()) == 1 + 48 and out.startswith("input,group,predicted,p(")
    check_image_export(tmp_path / "own/model", out)
    output_of("delta", str(tmp_path / "own"), str(tmp_path / "own.delta"))
    output_of("delta", str(tmp_path / "own"), str(tmp_path / "own.delta"), "--apply", str(tmp_path / "again"))
    for part, after in (("model.safetensors", body[0]), ("head/model.safetensors", head[0])):
        before = load_file(tmp_path / "again" / part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    # An image that the second rank alone reads, and nobody has checked.
    Path(list(csv.DictReader(out.splitlines()))[1]["input"]).write_bytes(b"no image")
    done = dcft("predict", tmp_path / "own", "--data.path", images, "--data.check", "false", ranks=2)
    assert done.returncode and "dcft: error: rank 1: " in done.stderr and "no image that can be read" in done.stderr


def check_image_export(folder: Path, said: str) -> None:
    """transformers alone gives what `dcft predict` says; its image processor makes nearly the same pixels."""
    from transformers import AutoImageProcessor, AutoModel

    rows = list(csv.DictReader(said.splitlines()))
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    head = torch.nn.Linear(384, 8)
    head.load_state_dict(load_file(folder / "head/model.safetensors"))
    images = [Image.open(row["input"]).convert("RGB") for row in rows]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    pixels = torch.nn.functional.interpolate(pixels, (56, 56), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (pixels - mean) / std
    torch.testing.assert_close(processor(images, return_tensors="pt")["pixel_values"], pixels, atol=0.02, rtol=0)
    with torch.no_grad():
        shares = head(model.eval()(pixel_values=pixels).last_hidden_state[:, 0]).softmax(-1)
    found = [[float(value) for key, value in row.items() if key.startswith("p(")] for row in rows]
    torch.testing.assert_close(torch.tensor(found), shares, atol=1e-5, rtol=0)


def test_delta_and_pretrained_weights_are_the_adapted_ones(tmp_path: Path) -> None:
    """Sparse fine-tuning of 1 %: the delta is small, and gives the exported model again bit for bit."""
    words = [
        "--runs_dir",
        str(tmp_path),
        "--name",
        "sparse",
        "--engine",
        "single",
        "--train.epochs",
        "1",
        "--removal.fractions",
        "[]",
    ]
    words += ["--selection.fraction", "0.01", "--penalty.factor", "1.0", "--penalty.rest_factor", "0.0"]
    output_of(
        "train",
        "smoke.toml",
        *words,
        "--penalty.unscored_factor",
        "0.0",
        "--test_resamples",
        "0",
        "--train.fall_back",
        "false",
    )
    run, file = tmp_path / "sparse", tmp_path / "sparse.delta"
    said = output_of("delta", str(run), str(file))
    summary = json.loads((run / "summary.json").read_text())
    changed = int(said.split(": ")[1].split(" of ")[0].replace(",", ""))
    head = 384 * 21 + 21
    assert 0.9 * summary["num_selected"] < changed - head <= summary["num_selected"]
    full = (run / "model/model.safetensors").stat().st_size
    assert file.stat().st_size < full / 32 + 4 * changed + 20_000
    output_of("delta", str(run), str(file), "--apply", str(tmp_path / "again"))
    for part in ("model.safetensors", "head/model.safetensors"):
        before, after = load_file(run / "model" / part), load_file(tmp_path / "again" / part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "again/tokenizer.json").exists() and (tmp_path / "again/config.json").exists()
    other = (run / "config.toml").read_text().replace("num_layers = 2", "num_layers = 1")
    (run / "config.toml").write_text(other)
    done = dcft("delta", run, file, "--apply", tmp_path / "no")
    assert done.returncode == 2 and "other pre-trained weights" in done.stderr


def test_workers_change_no_number_and_classes_are_balanced(tmp_path: Path) -> None:
    """Varied images, read by two processes or by none, in one go or in two: the same weights to the last bit."""
    images = mri_folder(tmp_path / "patches", 16)
    for name in ("frontal", "insula"):
        for file in sorted((images / name).iterdir())[8:]:
            file.unlink()  # few of two classes
    words = ["--runs_dir", str(tmp_path), "--task.name", "own", "--data.format", "image_folder", "--data.path", str(images)]
    words += ["--model.image_size", "28", "--model.num_layers", "1", "--method", "full", "--engine", "single"]
    words += ["--train.global_batch", "8", "--train.epochs", "2", "--test_resamples", "0", "--importance.num_samples", "8"]
    words += [
        "--importance.score_batch",
        "8",
        "--train.sampling",
        "balanced",
        "--train.fall_back",
        "false",
        "--data.validation_share",
        "0.3",
    ]
    words += ["--data.transform", "tests.test_own_data.random_flip", "--import_roots", json.dumps([str(Path.cwd())])]
    found = {}
    for name, more in (("none", []), ("two", ["--train.workers", "2"]), ("plain", ["--train.sampling", "plain"])):
        output_of("train", "mri.toml", "--name", name, *words, *more)
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["weights_checksum"]
    assert found["none"] == found["two"] != found["plain"]
    torn = ["mri.toml", "--name", "torn", *words, "--train.workers", "2", "--checkpoint.every", "2"]
    (running,) = start("train", *torn)
    while running.poll() is None and not list((tmp_path / "torn/checkpoints").glob("step_0*")):
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert not (tmp_path / "torn/summary.json").exists()
    output_of("train", *torn)
    assert json.loads((tmp_path / "torn/summary.json").read_text())["weights_checksum"] == found["none"]
    classes = [0] * 90 + [1] * 10
    drawn = [classes[i] for i in order(0, 1, 100, classes)]
    assert len(drawn) == 100 and 35 < sum(drawn) < 65
    card = (tmp_path / "two/model/README.md").read_text()
    assert "One of 8 classes: cerebellum, deep grey" in card and "\n| accuracy |" in card and "\n- train: " in card
    assert "\nfull.\n" in card


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    """A stopped run whose table has grown would take former training examples for test ones."""
    file = drug_table(tmp_path / "reviews.csv", 100)
    words = ["smoke.toml", "--runs_dir", str(tmp_path), "--name", "grown", "--engine", "single", "--method", "full"]
    words += ["--task.name", "own", "--data.path", str(file), "--data.modality", "text", "--data.input", "review"]
    words += ["--data.label", "rating", "--train.global_batch", "16", "--train.epochs", "4", "--test_resamples", "0"]
    words += [
        "--importance.num_samples",
        "32",
        "--importance.score_batch",
        "16",
        "--checkpoint.every",
        "1",
        "--log_every",
        "1",
    ]
    (running,) = start("train", *words)
    while running.poll() is None and not list((tmp_path / "grown/checkpoints").glob("step_0*")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert not (tmp_path / "grown/summary.json").exists()
    with file.open("a", newline="") as lines:
        csv.writer(lines).writerow(["It helped me a lot.", "positive", "another"])
    done = dcft("train", *words)
    assert done.returncode == 2 and "the data are not those that" in done.stderr


def test_a_volume_is_a_path(tmp_path: Path) -> None:
    words = ["--data.modality", "volume", "--data.format", "python", "--data.build", "tests.test_own_data.arrays"]
    with pytest.raises(DataError, match=r"arrays, row 0: 'input' is a ndarray, not the path of a volume"):
        task_of(*words, "--import_roots", '["."]')


def arrays() -> list[dict[str, Any]]:
    return [{"input": np.zeros((4, 4, 4)), "label": i % 2} for i in range(9)]


def test_one_missing_file_among_ten_thousand(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = [f"images/{i}.png" for i in range(10_000)]
    picture(tmp_path / names[0], size=8)
    for name in names[1:]:
        (tmp_path / name).hardlink_to(tmp_path / names[0])
    file = table(tmp_path, [{"input": name, "label": i % 2} for i, name in enumerate(names)])
    task_of("--data.path", str(file))
    (tmp_path / names[8_642]).unlink()
    with pytest.raises(DataError, match=r"1 of 10000 files are missing: .*images/8642.png \(.*data.csv, line 8644\)"):
        task_of("--data.path", str(file))
