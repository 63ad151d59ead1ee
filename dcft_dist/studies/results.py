"""Reads and writes the results of a study's cells, and chooses each arm's values from them.

While a study runs, each cell's result is a file `cells/<name>.json`. In a packed study (`StudyFolder.pack`) each result is
a line of `cells.jsonl`.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import DamagedError, DataError, RunError, listing
from ..files import json_line, objects_in, read_json, sha256_of, write_atomic, write_json
from .study import Cell, Study, Values, make_config, settings_of, tuning_cells

Result = dict[str, Any]

CHECKSUMS = "checksums.json"  # of a packed study


_DEFAULTS = settings_of(Config(name="defaults"))


def completed(result: Result) -> Result:
    """Adds configuration keys that are newer than the result, with their default values.

    A result from before a key existed was computed with what is now the key's default.
    """
    return result | {"config": _DEFAULTS | result["config"]}


def write_checksums(folder: Path, cells: int) -> None:
    """Writes the checksums of a packed study's files.

    Args:
        folder: of the study.
        cells: number of results in it.
    """
    files = (folder / "study.toml", folder / "cells.jsonl", *sorted((folder / "examples").glob("*.json")))
    checksums = {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}
    write_json(folder / CHECKSUMS, {"cells": cells, "files": checksums})


def _tuning_score(result: Result) -> float:
    if result.get("interpolate") and "summary" in result:
        return float(result["summary"]["validation"]["accuracy"])
    return max((epoch["validation/accuracy"] for epoch in result.get("epochs", [])[1:]), default=0.0)


class StudyFolder:
    """The results of one study in its folder.

    Args:
        study: the study that these results belong to.
        path: the study's folder.
    """

    def __init__(self, study: Study, path: Path) -> None:
        self.study, self.path = study, path

    @cached_property
    def _packed(self) -> dict[str, Result]:
        return {row["cell"]: row for row in objects_in(self.path / "cells.jsonl", "cell", "config")}

    def check(self) -> None:
        """Compares the study's files with the checksums of its pack, if it is packed.

        Raises:
            DamagedError: files are missing or altered, or a result is damaged; the message names them.
        """
        if problems := self.problems():
            raise DamagedError(f"{self.path} is not as it was written: {listing(problems, 3)}")

    def problems(self) -> list[str]:
        """What is damaged: files that differ from the checksums of a pack, and results of cells that cannot be read."""
        file, problems = self.path / CHECKSUMS, list[str]()
        if file.exists():
            try:
                stored = read_json(file, "cells", "files")
            except DamagedError as error:
                return [str(error)]
            for name, checksum in stored["files"].items():
                if not (self.path / name).is_file() or sha256_of(self.path / name) != checksum:
                    problems.append(f"{name} is missing or was altered")
            if (lost := stored["cells"] - len(self._packed)) > 0:
                problems.append(f"{lost} of {stored['cells']} cells cannot be read")
        for file in sorted((self.path / "cells").glob("*.json")):
            try:
                read_json(file, "cell", "config")
            except DamagedError as error:
                problems.append(f"{error}: delete it to run the cell again")
        return problems

    def file(self, cell: Cell) -> Path:
        """The path of a cell's result, whether or not the file exists."""
        return self.path / "cells" / f"{cell.name}.json"

    def has(self, cell: Cell) -> bool:
        """Whether the cell has a result, as a separate file or in `cells.jsonl`."""
        return self.file(cell).exists() or cell.name in self._packed

    def put(self, cell: Cell, result: Result) -> None:
        """Writes the result of a cell."""
        write_atomic(self.file(cell), json_line(result))

    def get(self, cell: Cell) -> Result:
        """Reads the result of a cell.

        Raises:
            RunError: the result was computed with another version of the study.
            DamagedError: the result is damaged.
        """
        own = self.file(cell)
        result: Result = read_json(own, "cell", "config") if own.exists() else self._packed[cell.name]
        expected = settings_of(make_config(self.study, cell, self.path))
        actual = completed(result)["config"]
        different = [key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)]
        if result.get("interpolate") != self.study.family(cell.arm):
            different.append("interpolate")
        if different:
            raise RunError(
                f"{self.path}: {cell.name} was run with another {listing(sorted(different))} than the study says now: "
                "delete its result to run it again, or use another folder"
            )
        return result

    def examples_file(self, setting: str, test: str = "") -> Path:
        """The path of the test examples of a setting, or of its further test data with the name `test`."""
        return self.path / "examples" / f"{setting}{f'.{test}' if test else ''}.json"

    def examples(self, setting: str, test: str = "") -> dict[str, list[Any]]:
        """Reads `"group"` and `"label"` of each test example; both lists are empty before the first test."""
        file = self.examples_file(setting, test)
        examples: dict[str, list[Any]] = read_json(file, "group", "label") if file.exists() else {"group": [], "label": []}
        return examples

    def require_same(self) -> None:
        """Checks that all results there are were computed with this version of the study.

        Raises:
            RunError: one was not.
        """
        cells = list(tuning_cells(self.study))
        for setting, arm in itertools.product(self.study.settings, self.study.arms if self.study.seeds else ()):
            with suppress(DataError):  # tuning is not finished
                values = self.choose(setting, arm)
                cells += [Cell(setting, arm, values, seed, False) for seed in self.study.seeds]
        for cell in cells:
            if self.has(cell):
                self.get(cell)

    def pack(self, target: Path) -> int:
        """Copies the study to the folder `target`, with all results in one file `cells.jsonl`.

        Returns:
            The number of results.
        """
        names = {f.stem for f in (self.path / "cells").glob("*.json")}
        self.check()
        rows = self._packed | {name: read_json(self.path / "cells" / f"{name}.json") for name in names}
        write_atomic(target / "cells.jsonl", "".join(json_line(rows[name]) for name in sorted(rows)))
        for file in (self.path / "study.toml", *(self.path / "examples").glob("*.json")):
            write_atomic(target / file.relative_to(self.path), file.read_bytes())
        write_checksums(target, len(rows))
        return len(rows)

    def missing(self) -> tuple[int, int]:
        """Number of cells without a result, and of all cells. Of arms that are not tuned yet, one cell a seed counts."""
        tuning = list(tuning_cells(self.study))
        tested = len(self.study.settings) * len(self.study.arms) * len(self.study.seeds)
        found = 0
        for setting, arm in itertools.product(self.study.settings, self.study.arms if self.study.seeds else ()):
            with suppress(DataError):  # tuning is not finished
                values = self.choose(setting, arm)
                found += sum(self.has(Cell(setting, arm, values, seed, False)) for seed in self.study.seeds)
        done = sum(map(self.has, tuning)) + found
        return len(tuning) + tested - done, len(tuning) + tested

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose_all(self) -> dict[tuple[str, str], Values]:
        """The chosen values of every (setting, arm); see `choose`."""
        return {(setting, arm): self.choose(setting, arm) for setting in self.study.settings for arm in self.study.arms}

    def choose(self, setting: str, arm: str) -> Values:
        """The values with the highest mean validation accuracy over the tuning seeds; the earlier in the grid wins a tie.

        The best epoch of a run counts, or the chosen place of one that is interpolated. Epoch 0 does not: it is the linear
        probe, which no value changes.

        Raises:
            DataError: tuning cells are missing.
        """
        grid = self.study.grid(arm)
        if len(grid) == 1:
            return grid[0]
        scores = self.tuning_scores(setting, arm)
        missing = [values for values in grid if len(scores[values]) < len(self.study.tune_seeds)]
        if missing:
            raise DataError(f"{setting}, {arm}: tuning is not finished for {listing(map(str, missing))}")
        return max(grid, key=lambda values: sum(scores[values].values()))  # max returns the first of equals

    def tuning_scores(self, setting: str, arm: str) -> dict[Values, dict[int, float]]:
        """The best validation accuracy after epoch 0 of each finished tuning cell, by values and seed.

        A cell that diverged has 0.
        """
        scores: dict[Values, dict[int, float]] = {}
        for values in self.study.grid(arm):
            cells = [Cell(setting, arm, values, seed, True) for seed in self.study.tune_seeds]
            scores[values] = {cell.seed: _tuning_score(self.get(cell)) for cell in cells if self.has(cell)}
        return scores

    def final(self, setting: str, arm: str, values: Values, seed: int) -> Result | None:
        """The result of a tested cell; None if it has not run yet."""
        cell = Cell(setting, arm, values, seed, False)
        return self.get(cell) if self.has(cell) else None
