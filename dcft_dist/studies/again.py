"""Cells of a finished study are run again, and their results compared with the stored ones: `dcft compare --again`."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.world import World
from ..runs.provenance import machine
from .results import StudyFolder, completed
from .runner import CellShare, Runner
from .study import final_cells, load_study, tuning_cells

log = logging.getLogger(__name__)

_MAY_DIFFER = ("seconds", "prepared_seconds", "peak_memory_gib", "date", "machine", "git_commit")
_ROUNDING = 1e-5  # relative difference up to which a number is the same but for rounding


@dataclass(frozen=True)
class Change:
    """A value that differs.

    Attributes:
        path: keys that lead to it, with commas between them.
        before, now: the values.
    """

    path: str
    before: Any
    now: Any

    @property
    def relative(self) -> float:
        """Relative difference of two numbers; infinite for anything else."""
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (self.before, self.now))
        largest = max(abs(self.before), abs(self.now)) if numbers else 0.0
        return abs(self.before - self.now) / largest if largest else float("inf")

    @property
    def by_rounding(self) -> bool:
        """Whether rounding explains it: a number that is nearly the same, or the checksum of such numbers."""
        return "checksum" in self.path or self.relative <= _ROUNDING

    def __str__(self) -> str:
        return self.path if isinstance(self.before, list) else f"{self.path}: {self.before} before, {self.now} now"


@dataclass(frozen=True)
class Comparison:
    """Results of cells before and now.

    Attributes:
        changes: name of a cell -> what differs.
    """

    changes: Mapping[str, Sequence[Change]]

    @property
    def same(self) -> bool:
        """Whether rounding explains all that differs."""
        return all(change.by_rounding for changes in self.changes.values() for change in changes)

    @property
    def text(self) -> str:
        """One line if results are the same; else a line for each value that is not."""
        found = {name: changes for name, changes in self.changes.items() if changes}
        if not found:
            return "every cell has the same results, to the last digit"
        if not self.same:
            return "\n".join(f"{name}: {c}" for name, changes in found.items() for c in changes if not c.by_rounding)
        numbers = [c for changes in found.values() for c in changes if "checksum" not in c.path]
        accuracy = "" if any("accuracy" in c.path for c in numbers) else "accuracy identical, "
        largest = max((c.relative for c in numbers), default=0.0)
        return f"{len(found)} of {len(self.changes)} cells differ by rounding: {accuracy}losses within {largest:.0e}"

    @property
    def verdict(self) -> str:
        """The comparison in a word or two."""
        if not any(self.changes.values()):
            return "the same"
        return "the same but for rounding" if self.same else "DIFFERENT"


def again(file: Path, folder: Path, world: World, part: float, overrides: Sequence[str] = ()) -> Comparison:
    """Runs a random part of the finished cells again and compares their results with the stored ones.

    The new runs go into a folder beside the study's, named `<folder>_again`. The cells are drawn with a fixed seed.

    Args:
        file: the study's TOML file.
        folder: the study's folder.
        world: the process group of this run.
        part: fraction of the finished cells to run again; at least one cell runs.
        overrides: see `load_study`.

    Returns:
        What is different.
    """
    study = load_study(file, overrides)
    stored = StudyFolder(study, folder)
    final = final_cells(study, stored.choose_all()) if study.seeds else ()
    done = [cell for cell in (*tuning_cells(study), *final) if stored.has(cell)]
    drawn = random.Random(0).sample(done, max(1, round(part * len(done))))
    new_folder = folder.with_name(f"{folder.name}_again")
    shutil.rmtree(new_folder, ignore_errors=True)  # no file of an earlier check may pass for one of this check
    runner = Runner(study, new_folder, world, CellShare(), 0.0)
    runner.prepare(drawn)
    differences: dict[str, list[Change]] = {}
    this_machine = machine()
    for cell in drawn:
        machine_before = stored.get(cell).get("summary", {}).get("machine", this_machine)
        if machine_before != this_machine:
            log.warning("%s was run on %s, this is %s: last digits may differ", cell.name, machine_before, this_machine)
        changes = list(_changes(_reproducible(completed(stored.get(cell))), _reproducible(runner.run_cell(cell))))
        log.info("%s: %s", cell.name, Comparison({cell.name: changes}).verdict)
        differences[cell.name] = changes
    return Comparison(differences)


def _changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """Each value that differs. Keys that only `after` has do not count: a later version may add some."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from _changes(value, after.get(key), f"{path}, {key}" if path else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and path == "epochs":
        for epoch, (row_before, row_after) in enumerate(zip(before, after, strict=True)):
            yield from _changes(row_before, row_after, f"epoch {epoch}")
    elif before != after and not (before != before and after != after):  # two NaNs are equal here
        yield Change(path, before, after)


def _reproducible(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that must be the same when the cell runs again."""
    reproducible = {key: value for key, value in result.items() if key not in _MAY_DIFFER}
    if "summary" in reproducible:
        reproducible["summary"] = {key: value for key, value in reproducible["summary"].items() if key not in _MAY_DIFFER}
    return reproducible
