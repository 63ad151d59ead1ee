"""Reads and writes the results of a study's cells, and chooses each arm's values from them.

While a study runs, each cell's result is a file `cells/<name>.json`. In a packed study (`StudyFolder.pack`) each result is
a line of `cells.jsonl`.
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
    """Adds configuration keys that are newer than the result, with their default values.

    A result from before a key existed was computed with what is now the key's default.
    """
    return result | {"config": _DEFAULTS | result["config"]}


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
        return {row["cell"]: row for row in read_lines(self.path / "cells.jsonl")}

    def file(self, cell: Cell) -> Path:
        """The path of a cell's result, whether or not the file exists."""
        return self.path / "cells" / f"{cell.name}.json"

    def has(self, cell: Cell) -> bool:
        """Whether the cell has a result, as a separate file or in `cells.jsonl`."""
        return self.file(cell).exists() or cell.name in self._packed

    def put(self, cell: Cell, result: Result) -> None:
        """Writes the result of a cell."""
        write_atomic(self.file(cell), json.dumps(result))

    def get(self, cell: Cell) -> Result:
        """Reads the result of a cell.

        Raises:
            RunError: the result was computed with another version of the study.
        """
        result: Result = read_json(self.file(cell)) if self.file(cell).exists() else self._packed[cell.name]
        expected = settings_of(make_config(self.study, cell, self.path))
        actual = completed(result)["config"]
        different = [key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)]
        if different:
            raise RunError(
                f"{self.path}: {cell.name} was run with another {listing(sorted(different))} than the study says now: "
                "delete its result to run it again, or use another folder"
            )
        return result

    def examples(self, setting: str) -> dict[str, list[Any]]:
        """Reads `"group"` and `"label"` of each test example; both lists are empty before the first test."""
        file = self.path / "examples" / f"{setting}.json"
        examples: dict[str, list[Any]] = read_json(file) if file.exists() else {"group": [], "label": []}
        return examples

    def pack(self, target: Path) -> int:
        """Copies the study to the folder `target`, with all results in one file `cells.jsonl`.

        Returns:
            The number of results.
        """
        names = {f.stem for f in (self.path / "cells").glob("*.json")}
        rows = self._packed | {name: read_json(self.path / "cells" / f"{name}.json") for name in names}
        write_atomic(target / "cells.jsonl", "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
        for file in (self.path / "study.toml", *(self.path / "examples").glob("*.json")):
            write_atomic(target / file.relative_to(self.path), file.read_bytes())
        return len(rows)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose_all(self) -> dict[tuple[str, str], Values]:
        """The chosen values of every (setting, arm); see `choose`."""
        return {(setting, arm): self.choose(setting, arm) for setting in self.study.settings for arm in self.study.arms}

    def choose(self, setting: str, arm: str) -> Values:
        """The values with the highest mean validation accuracy over the tuning seeds; the earlier in the grid wins a tie.

        The best epoch of a run counts. Epoch 0 does not: it is the linear probe, which no value changes.

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
            epochs_by_seed = {cell.seed: self.get(cell).get("epochs", [])[1:] for cell in cells if self.has(cell)}
            scores[values] = {
                seed: max((epoch["validation/accuracy"] for epoch in epochs), default=0.0)
                for seed, epochs in epochs_by_seed.items()
            }
        return scores

    def final(self, setting: str, arm: str, values: Values, seed: int) -> Result | None:
        """The result of a tested cell; None if it has not run yet."""
        cell = Cell(setting, arm, values, seed, False)
        return self.get(cell) if self.has(cell) else None
