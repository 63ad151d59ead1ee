"""A file, or a patient, is the same whatever it is called: none may be in two splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcft_dist.data.identity import meaning
from dcft_dist.data.splits import TaskData
from dcft_dist.errors import DataError

from .tables import picture, table, task_of

Rows = list[tuple[Any, int, Any]]  # path, label, patient


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(30):
        picture(tmp_path / "im" / f"{i}.png")
    os.symlink(tmp_path / "im/0.png", tmp_path / "im/link.png")
    os.link(tmp_path / "im/0.png", tmp_path / "im/hard.png")
    (tmp_path / "im/copy.png").write_bytes((tmp_path / "im/0.png").read_bytes())
    return tmp_path


def split(folder: Path, test: Rows, *words: str) -> TaskData:
    parts = {"train": [(f"im/{i}.png", i % 2, i) for i in range(10)], "test": test}
    parts["validation"] = [(f"im/{i}.png", i % 2, i) for i in range(10, 20)]
    how = ["--data.modality", "image", "--data.input", "path", "--data.label", "label", *words]
    for name, rows in parts.items():
        file = table(folder, [{"path": p, "label": y, "patient": g} for p, y, g in rows], f"{name}.csv")
        how += [f"--data.{name}", str(file)]
    return task_of(*how)


GROUP = ("--data.group", "patient")


@pytest.mark.parametrize("words", [(), GROUP])
@pytest.mark.parametrize("name", ["im/0.png", "im/../im/0.png", "im/link.png", "im/hard.png", "im/copy.png", "absolute"])
def test_a_file_in_two_splits(name: str, words: tuple[str, ...], images: Path) -> None:
    path = images / "im/0.png" if name == "absolute" else name
    split(images, [(f"im/{i}.png", i % 2, i) for i in range(20, 30)], *words)
    with pytest.raises(DataError, match=r"train.csv, line 2.* in train.*test.csv, line 11|is in two splits") as error:
        split(images, [*((f"im/{i}.png", i % 2, i) for i in range(20, 29)), (path, 0, 900)], *words)
    assert ("have the same contents" in str(error.value)) == (name == "im/copy.png")


@pytest.mark.parametrize("words", [(), GROUP])
def test_further_test_data(words: tuple[str, ...], images: Path) -> None:
    """They may overlap with the test data, such as patients in another scanner, but not with what was learned from."""
    test: Rows = [(f"im/{i}.png", i % 2, i) for i in range(20, 30)]

    def with_site(rows: Rows) -> TaskData:
        file = table(images, [{"path": p, "label": y, "patient": g} for p, y, g in rows], "site_b.csv")
        return split(images, test, *words, "--data.external_tests", f'{{site_b = "{file}"}}')

    task = with_site(test[:5])
    assert len(task.external["site_b"]) == 5 and list(task.splits)[3:] == ["external site_b"]
    for seen, name in ((0, "train"), (15, "validation")):
        with pytest.raises(DataError, match=rf"in {name}.* in external site_b|is in two splits"):
            with_site([*test[:5], (f"im/{seen}.png", 0, 901)])
    if words:
        with pytest.raises(DataError, match=r"group '3' is in two splits: .*train.csv, line 5 .* in external site_b"):
            with_site([("im/20.png", 0, 3)])
    with pytest.raises(DataError, match="is not one of the 2 classes"):
        with_site([("im/20.png", 7, 20)])
    with pytest.raises(DataError, match=r"im/none.png \("):
        with_site([("im/none.png", 0, 20)])


def test_contents_are_compared_to_the_end(images: Path) -> None:
    """Files of one size, equal for the first and last 64 KiB."""
    values = np.zeros((600, 600), np.float32)
    np.save(images / "im/a.npy", values)
    values[300, 300] = 1
    np.save(images / "im/b.npy", values)
    rows: Rows = [(f"im/{i}.png", i % 2, i) for i in range(20, 30)]
    how = ["--data.modality", "image", "--data.input", "path", "--data.label", "label"]
    for name, more in {"train": [("im/a.npy", 0, 1), ("im/1.png", 1, 2)], "validation": rows[5:], "test": rows[:5]}.items():
        how += [f"--data.{name}", str(table(images, [{"path": p, "label": y} for p, y, _ in more], f"{name}.csv"))]
    task_of(*how)
    for name, equal in (("b", False), ("a", True)):
        table(images, [{"path": f"im/{name}2.npy", "label": 0}, {"path": "im/20.png", "label": 1}], "test.csv")
        (images / f"im/{name}2.npy").write_bytes((images / f"im/{name}.npy").read_bytes())
        if equal:
            with pytest.raises(DataError, match=r"train.csv, line 2 in train and .* in test have the same contents"):
                task_of(*how)
        else:
            task_of(*how)


@pytest.mark.parametrize("write", [lambda i: f"{i}.0", lambda i: f"{i:03d}", lambda i: f"+{i}"])
def test_a_patient_in_two_spellings(write: Any, images: Path) -> None:
    rows: Rows = [(f"im/{i}.png", i % 2, write(i - 20)) for i in range(20, 30)]
    with pytest.raises(DataError, match=r"groups '0' \(.*train.csv, line 2\) and .*test.csv, line 2\) are one number"):
        split(images, rows, *GROUP)


def test_meanings() -> None:
    assert meaning("007") == meaning(" 7.0") == meaning("7.") == 7.0
    assert meaning("TRUE") == meaning("true")
    assert [meaning(text) for text in ("1e3", "1_0", "nan")] == ["1e3", "1_0", "nan"]


def test_what_systems_leave_in_folders_is_no_class(tmp_path: Path) -> None:
    for name in ("ill", "well", ".ipynb_checkpoints", "__MACOSX"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png")
    picture(tmp_path / "ill" / "._0.png")
    picture(tmp_path / "ill" / ".ipynb_checkpoints" / "0-checkpoint.png")
    data = task_of("--data.format", "image_folder", "--data.path", str(tmp_path))
    assert data.class_names == ["ill", "well"]
    assert sum(map(len, (data.train, data.validation, data.test))) == 20
