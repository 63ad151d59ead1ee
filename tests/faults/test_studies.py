"""Results of a study that were lost or altered: no other table without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcft_dist.cli import main
from dcft_dist.files import read_json, read_lines
from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.study import final_cells, load_study, tuning_cells

from ..studies.test_study import SMALL, put, write


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A small study with made-up results, packed."""
    study = load_study(write(tmp_path / "study.toml", SMALL))
    folder = StudyFolder(study, tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/small.json").write_text(json.dumps({"group": ["a", "b", "c"], "label": [0, 1, 2]}))
    metrics = {"accuracy": 1.0, "macro_f1": 1.0, "loss": 0.5}
    summary: dict[str, Any] = {"validation": metrics, "test": metrics, "best_epoch": 1, "seconds": {"train": 90.0}}
    for cell in tuning_cells(study):
        put(folder, cell, 0.5 + 0.1 * cell.seed)
    for cell in final_cells(study, folder.choose_all()):
        put(folder, cell, 0.5, predicted=[0, 1, cell.seed], summary=summary)
    assert folder.pack(tmp_path / "pack") == 8
    return tmp_path / "pack"


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    for command in (
        ["table", str(folder)],
        ["report", str(folder)],
        ["table", str(folder), "--pack", str(folder / "again")],
    ):
        assert main(command) == 2
    assert main(["verify", str(folder)]) == 1
    return capsys.readouterr().err


def test_a_packed_study_is_whole(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(packed)]) == 0 and main(["verify", str(packed)]) == 0
    assert "have no result yet" not in capsys.readouterr().out


def test_lost_lines(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (packed / "cells.jsonl").read_text().splitlines(keepends=True)
    (packed / "cells.jsonl").write_text("".join(lines[1:]))
    assert "cells.jsonl is missing or was altered, 1 of 8 cells cannot be read" in refused(packed, capsys)
    (packed / "checksums.json").unlink()  # of an older version: the table says how many are missing
    assert main(["table", str(packed)]) == 0
    assert "1 of 8 cells have no result yet." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cells.jsonl", "examples/small.json", "study.toml"])
def test_an_altered_digit(name: str, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (packed / name).read_text()
    (packed / name).write_text(text.replace("1", "2", 1))
    assert f"{name} is missing or was altered" in refused(packed, capsys) or name == "study.toml"


def test_an_altered_result_of_a_study_that_goes_on(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result has a seal of its own, packed or not."""
    folder = packed.parent
    file = sorted((folder / "cells").glob("*.json"))[0]
    file.write_text(file.read_text().replace("0.95", "0.96", 1))
    assert f"{file.name} is damaged" in refused(folder, capsys)
    assert len(read_lines(packed / "cells.jsonl")) == 8
    (packed / "checksums.json").unlink()
    lines = (packed / "cells.jsonl").read_text().replace("0.95", "0.96", 1)
    (packed / "cells.jsonl").write_text(lines)
    assert len(read_lines(packed / "cells.jsonl")) == 7


def test_the_kept_studies_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in sorted((Path(__file__).parents[2] / "docs/results/studies").iterdir()):
        stored = read_json(folder / "checksums.json", "cells", "files")
        assert stored["cells"] == len(read_lines(folder / "cells.jsonl"))
        assert main(["verify", str(folder)]) == 0, capsys.readouterr().out
