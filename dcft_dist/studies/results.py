"""The results of a study's cells as they lie in its folder, and the values chosen by them.

A cell's result is `cells/<name>.json`, or, in a study that is kept, a line of `cells.jsonl` (`pack`).
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..errors import DataError, RunError, listing
from ..files import read_json, read_lines, write_atomic
from .study import Cell, Study, Values, make_config, settings_of

Result = dict[str, Any]


_DEFAULTS = settings_of(Config(name="defaults"))


def completed(result: Result) -> Result:
    """With the keys of the configuration that came later: they had what is now their default."""
    return result | {"config": _DEFAULTS | result["config"]}


class StudyFolder:
    """Reads and writes results."""

    def __init__(self, study: Study, path: Path) -> None:
        self.study, self.path = study, path

    @cached_property
    def _packed(self) -> dict[str, Result]:
        return {row["cell"]: row for row in read_lines(self.path / "cells.jsonl")}

    def file(self, cell: Cell) -> Path:
        return self.path / "cells" / f"{cell.name}.json"

    def has(self, cell: Cell) -> bool:
        return self.file(cell).exists() or cell.name in self._packed

    def put(self, cell: Cell, result: Result) -> None:
        write_atomic(self.file(cell), json.dumps(result))

    def get(self, cell: Cell) -> Result:
        """
        Raises:
            RunError: the result is of another version of the study.
        """
        found: Result = read_json(self.file(cell)) if self.file(cell).exists() else self._packed[cell.name]
        wanted = settings_of(make_config(self.study, cell, self.path))
        had = completed(found)["config"]
        different = [key for key in wanted.keys() | had.keys() if wanted.get(key) != had.get(key)]
        if different:
            raise RunError(
                f"{self.path}: {cell.name} was run with another {listing(sorted(different))} than the study says now: "
                "delete its result to run it again, or use another folder"
            )
        return found

    def examples(self, setting: str) -> dict[str, list[Any]]:
        """Group and label of each test example; empty before the first test."""
        file = self.path / "examples" / f"{setting}.json"
        found: dict[str, list[Any]] = read_json(file) if file.exists() else {"group": [], "label": []}
        return found

    def pack(self, target: Path) -> int:
        """Copies the study with its results in one file, to be kept; returns their number."""
        names = {f.stem for f in (self.path / "cells").glob("*.json")}
        rows = self._packed | {name: read_json(self.path / "cells" / f"{name}.json") for name in names}
        write_atomic(target / "cells.jsonl", "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
        for file in (self.path / "study.toml", *(self.path / "examples").glob("*.json")):
            write_atomic(target / file.relative_to(self.path), file.read_bytes())
        return len(rows)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose_all(self) -> dict[tuple[str, str], Values]:
        """The values of every (setting, arm)."""
        return {(setting, arm): self.choose(setting, arm) for setting in self.study.settings for arm in self.study.arms}

    def choose(self, setting: str, arm: str) -> Values:
        """The values with the highest mean validation accuracy over the tuning seeds; ties go to the earlier in the grid.

        Of each run the best epoch counts, epoch 0 excepted: it is the probe, whatever the values.

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
        return max(grid, key=lambda values: sum(scores[values].values()))  # the first of equals

    def tuning_scores(self, setting: str, arm: str) -> dict[Values, dict[int, float]]:
        """By seed, the best validation accuracy after epoch 0 of the tuning cells that are done; 0 for one that diverged."""
        found: dict[Values, dict[int, float]] = {}
        for values in self.study.grid(arm):
            cells = [Cell(setting, arm, values, seed, True) for seed in self.study.tune_seeds]
            rows = {cell.seed: self.get(cell).get("epochs", [])[1:] for cell in cells if self.has(cell)}
            found[values] = {
                seed: max((r["validation/accuracy"] for r in epochs), default=0.0) for seed, epochs in rows.items()
            }
        return found

    def final(self, setting: str, arm: str, values: Values, seed: int) -> Result | None:
        cell = Cell(setting, arm, values, seed, False)
        return self.get(cell) if self.has(cell) else None
