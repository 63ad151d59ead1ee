"""The user's data: every format, splits by group, every mistake named, and whole runs on real texts and images."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcft_dist.config.toml import load_config
from dcft_dist.data.images import read_image
from dcft_dist.data.readers import read_rows
from dcft_dist.data.user_task import other_split
from dcft_dist.errors import ConfigError, DataError

from .tables import TEXT, picture, table, task_of, texts

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


def test_image_folders(tmp_path: Path) -> None:
    for split, number in (("train", 4), ("val", 2), ("test", 2)):
        for i in range(number):
            for name in ("ill", "well"):
                picture(tmp_path / "split" / split / name / f"{split}{i}_{name}.png")
                picture(tmp_path / "plain" / name / f"p{split}{i}_{name}.png")
    data = task_of("--data.format", "image_folder", "--data.path", str(tmp_path / "split"))
    assert data.class_names == ["ill", "well"] and [len(data.train), len(data.validation), len(data.test)] == [8, 4, 4]
    how = ["--data.format", "image_folder", "--data.path", str(tmp_path / "plain"), "--data.group_pattern", "^(p.*)_"]
    odd = load_config("mri.toml", ["--task.name", "own", *how, "--data.group_pattern", "^(never)"])
    assert other_split(odd, ["a"], labelled=False).groups[0].endswith(".png"), "new pictures need no patient"
    data = task_of(*how)
    assert {len(split) % 2 for split in (data.train, data.validation, data.test)} == {0}  # a patient has two images
    with pytest.raises(DataError, match="finds no group in the file name"):
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


# -- mistakes ------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {}


def bad(message: str) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    def keep(make: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        BAD[make.__name__] = (make, message)
        return make

    return keep


@bad(r"data.csv, line 2: no column 'lable' \(did you mean 'label'\?\); columns are input, label, patient")
def column(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, texts())), *TEXT, "--data.label", "lable"]


@bad("nothing.csv cannot be read: .*No such file")
def no_file(folder: Path) -> list[str]:
    return ["--data.path", str(folder / "nothing.csv"), *TEXT]


@bad("group 'p0' is in two splits: .*data.csv, line 2 is in train, .*data.csv, line 22 in test")
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


@bad(r"line 4: label 'c' is not one of the 2 classes.*: a, b")
def label_out_of_range(folder: Path) -> list[str]:
    rows = texts()
    rows[2]["label"] = "c"
    return ["--data.path", str(table(folder, rows)), *TEXT, "--data.classes", '["a", "b"]']


@bad("no training examples of c")
def empty_class(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, texts())), *TEXT, "--data.classes", '["a", "b", "c"]']


@bad("only one class, a: single_label needs at least two")
def one_class(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, [{**row, "label": "a"} for row in texts()])), *TEXT]


@bad("line 3: label 'old' is not a finite number")
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


@bad("line 6: '2' is not a finding: use 1, 0, or an empty cell for unknown")
def no_finding(folder: Path) -> list[str]:
    rows = [{"input": "x", "a": 2 if i == 4 else i % 2} for i in range(10)]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--task.kind", "multi_label", "--data.label", '["a"]']


@bad("line 2: the column 'patient' is empty")
def empty_group(folder: Path) -> list[str]:
    return ["--data.path", str(table(folder, [{**row, "patient": ""} for row in texts()])), *TEXT, "--data.group", "patient"]


@bad("finding 'b' has no positive or no negative training examples")
def empty_finding(folder: Path) -> list[str]:
    rows = [{"input": f"t{i}", "a": i % 2, "b": ["", 0][i % 2]} for i in range(20)]
    return ["--data.path", str(table(folder, rows)), *TEXT, "--task.kind", "multi_label", "--data.label", '["a", "b"]']


@bad(r"data.jsonl, line 3: not a JSON object")
def broken_line(folder: Path) -> list[str]:
    lines = [*map(json.dumps, texts())]
    lines[2] = lines[2][:-1]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return ["--data.path", str(folder / "data.jsonl"), *TEXT]


@bad(r"x.png' is in two splits: .*data.csv, line 2 is in train, .*data.csv, line 3 in test")
def one_file_in_two_splits(folder: Path) -> list[str]:
    picture(folder / "x.png")
    picture(folder / "y.png")
    rows = [{"input": "xxy"[i] + ".png", "label": i % 2, "split": ["train", "test", "val"][i]} for i in range(3)]
    return ["--data.path", str(table(folder, rows)), "--task.name", "own", "--data.split", "split"]


@bad(r"train_labels have \(14,\) columns, but data.label names 3")
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


@bad("no examples for validation, test: too few groups to draw from, or shares too small")
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
    with pytest.raises(ConfigError, match=r"task.name = 'drug_review' needs task.kind = 'single_label'"):
        load_config("icd.toml", ["--task.name", "drug_review", "--task.kind", "regression"])


def test_a_checksum_tells_other_images_of_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    def checksum(value: int, size: int) -> str:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        images = [Image.fromarray(np.full((size, size), value + i, np.uint8)) for i in range(20)]
        datasets.Dataset.from_dict({"input": images, "label": [0, 1] * 10}).save_to_disk(tmp_path / "saved")
        return task_of("--data.path", str(tmp_path / "saved"), "--data.format", "dataset").checksum

    assert checksum(0, 8) == checksum(0, 8) != checksum(0, 16)


def test_a_volume_is_a_path(tmp_path: Path) -> None:
    words = ["--data.modality", "volume", "--data.format", "python", "--data.build", "tests.data.test_readers.arrays"]
    with pytest.raises(DataError, match=r"arrays, row 0: 'input' is a ndarray, not the path of a volume"):
        task_of(*words, "--import_roots", '["."]')


def arrays() -> list[dict[str, Any]]:
    return [{"input": np.zeros((4, 4, 4)), "label": i % 2} for i in range(9)]


@pytest.mark.parametrize(
    ("modality", "patch", "found"),
    [
        ("volume", [8, 8, 8], ["a.nii.gz", "b.mha"]),
        ("volume", [8, 8], ["c.png", "d.dcm"]),
        ("image", [8, 8], ["c.png", "d.dcm"]),
    ],
)
def test_a_folder_without_labels(modality: str, patch: list[int], found: list[str], tmp_path: Path) -> None:
    """A file of a DICOM series is a slice, and no volume; with labels a folder is no table."""
    for name in ("a.nii.gz", "b.mha", "c.png", "d.dcm", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    data = load_config("mri.toml").data.model_copy(
        update={
            "path": str(tmp_path),
            "modality": modality,
            "patch": patch,
            "format": "table",
            "input": "image",
            "label": "x",
        }
    )
    (rows,) = read_rows(data, (), labelled=False).values()
    assert [row.input.name for row in rows] == found and all(row.group == str(row.input) for row in rows)
    with pytest.raises(DataError, match="is not a table"):
        read_rows(data, ())


def test_one_missing_file_among_ten_thousand(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = [f"images/{i}.png" for i in range(10_000)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"{i:05}")
    file = table(tmp_path, [{"input": name, "label": i % 2} for i, name in enumerate(names)])
    task_of("--data.path", str(file))
    (tmp_path / names[8_642]).unlink()
    with pytest.raises(DataError, match=r"1 of 10000 files are missing: .*images/8642.png \(.*data.csv, line 8644\)"):
        task_of("--data.path", str(file))
