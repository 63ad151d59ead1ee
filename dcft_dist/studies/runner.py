"""Carries out a study: prepares heads and scores, tunes every arm on validation data, then runs and tests it on fresh seeds.

    <folder>/prepared/  heads and scores, made once for all cells that share them
    <folder>/examples/  group and label of each test example, by setting
    <folder>/cells/     one file a cell, written when it is done; a study that was cut off goes on with the others
    <folder>/runs/      the runs that are under way

Several processes may share a study out (`--share 2/8`, an array task each): each does every eighth cell, and waits at the
end of a phase for the files of the others.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.world import World
from ..errors import DivergedError, RunError, UnfinishedError, listing
from ..files import read_json, read_lines, write_atomic
from ..runs.provenance import machine
from ..train.run import run
from .results import StudyFolder, completed
from .study import Cell, Study, final_cells, load_study, make_config, make_preparation, settings_of, tuning_cells

log = logging.getLogger(__name__)

POLL_S = 5.0


# Facts of a summary that another run of the same cell may change: all others must come out the same.
_PASSING = ("seconds", "prepared_seconds", "peak_memory_gib", "date", "machine", "git_commit")


@dataclass(frozen=True)
class CellShare:
    """Which of a study's cells are this process's: those at places index, index + number, ..."""

    index: int = 0
    number: int = 1

    @classmethod
    def parse(cls, text: str) -> CellShare:
        """`2/8`: the second of eight."""
        index, _, number = text.partition("/")
        if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
            raise RunError(f"a share looks like 2/8, the second of eight, not {text!r}")
        return cls(int(index) - 1, int(number))


def compare(file: Path, folder: Path, world: World, share: CellShare, wait_s: float) -> None:
    """Carries out this process's share of the study, or what is left of it.

    Raises:
        ConfigError: the study, or one of its cells, is wrong, or a file in the folder is of another version of it.
        UnfinishedError: cells of other shares were not there after `wait_s`.
    """
    study = load_study(file)
    write_atomic(folder / "study.toml", file.read_text())
    runner = Runner(study, folder, world, share, wait_s)
    tuning = list(tuning_cells(study))
    runner.prepare(tuning)
    runner.run_all(tuning, "tuning")
    if not study.seeds:
        return
    final = list(final_cells(study, runner.results.choose_all()))
    runner.prepare(final)
    runner.run_all(final, "testing")


class Runner:
    """Runs cells of a study, one after the other."""

    def __init__(self, study: Study, folder: Path, world: World, share: CellShare, wait_s: float) -> None:
        self.study, self.folder, self.world, self.share, self.wait_s = study, folder, world, share, wait_s
        self.results = StudyFolder(study, folder)

    def prepare(self, cells: Iterable[Cell]) -> None:
        """Makes the heads and scores that the cells start from."""
        wanted = {}
        for cell in cells:
            config = make_preparation(make_config(self.study, cell, self.folder), self.folder)
            wanted[config.name] = config
        marks = {name: self.folder / "prepared" / name / "ready" for name in wanted}
        for name in self._mine(wanted):
            if not marks[name].exists():
                log.info("preparing %s", name)
                try:
                    run(wanted[name], self.world)
                    write_atomic(marks[name], "")
                except DivergedError as error:  # while it trained before scoring
                    write_atomic(marks[name], str(error))
        self._wait_for(marks.values(), "preparations")

    def run_all(self, cells: Sequence[Cell], phase: str) -> None:
        for number, cell in enumerate(mine := self._mine(cells), 1):
            if not self.results.has(cell):
                began = time.monotonic()
                result = self.run_cell(cell)
                self.results.put(cell, result)
                shutil.rmtree(self.folder / "runs" / cell.name, ignore_errors=True)
                log.info(
                    "%s %d/%d: %s: %s (%.0f s)",
                    phase,
                    number,
                    len(mine),
                    cell.name,
                    _in_short(result),
                    time.monotonic() - began,
                )
            self.results.get(cell)
        self._wait_for([self.results.file(cell) for cell in cells if not self.results.has(cell)], phase)

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        config = make_config(self.study, cell, self.folder)
        source = self.folder / "prepared" / make_preparation(config, self.folder).name
        config = config.model_copy(update={"start_from": str(source)})
        about = {
            "cell": cell.name,
            "setting": cell.setting,
            "arm": cell.arm,
            "values": dict(cell.values),
            "seed": cell.seed,
            "tuning": cell.tuning,
        }
        try:
            if why := (source / "ready").read_text():
                raise DivergedError(f"before scoring: {why}")
            summary = run(config, self.world)
        except DivergedError as error:  # a learning rate that is too high is a result
            return {**about, "config": settings_of(config), "diverged": str(error)}
        place = self.folder / "runs" / cell.name
        rows = read_lines(place / "metrics.jsonl")
        kept = ("validation/", "movement/")
        return {
            **about,
            "config": settings_of(config),
            "summary": {key: value for key, value in summary.items() if key not in ("name", "removal")},
            "prepared_seconds": read_json(source / "progress.json")["seconds"],
            "epochs": [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows if "validation/loss" in row],
            "train_loss": _train_loss(rows),
            "in_force": _mean(
                [row["penalty/applied_over_proposed"] for row in rows if "penalty/applied_over_proposed" in row]
            ),
            "predicted": None if cell.tuning else self._predicted(cell, place / "predictions.csv"),
        }

    def _predicted(self, cell: Cell, file: Path) -> list[int]:
        """The predicted class of each test example; what all cells of a setting share goes into one file."""
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        examples = {"group": [row["group"] for row in rows], "label": [int(row["label"]) for row in rows]}
        shared = self.folder / "examples" / f"{cell.setting}.json"
        if not shared.exists():
            write_atomic(shared, json.dumps(examples))
        elif read_json(shared) != examples:
            raise RunError(f"the test data of {cell.name} are not those of {shared}: give them a setting of their own")
        return [int(row["predicted"]) for row in rows]

    def _mine(self, items: Iterable[Any]) -> list[Any]:
        return list(items)[self.share.index :: self.share.number]

    def _wait_for(self, files: Iterable[Path], what: str) -> None:
        missing, end = [f for f in files if not f.exists()], time.monotonic() + self.wait_s
        if missing:
            log.info("waiting for %d %s of the other shares", len(missing), what)
        while missing := [f for f in missing if not f.exists()]:
            if time.monotonic() > end:
                raise UnfinishedError(
                    f"after {self.wait_s:.0f} s these {what} of other shares are missing: {listing(map(str, missing))}"
                )
            time.sleep(POLL_S)


# -- regenerating ----------------------------------------------------------------------------------------------------------


def again(file: Path, folder: Path, world: World, part: float) -> list[str]:
    """Runs a random part of the finished cells again, beside the folder; returns what came out otherwise."""
    study = load_study(file)
    kept = StudyFolder(study, folder)
    final = final_cells(study, kept.choose_all()) if study.seeds else ()
    done = [cell for cell in (*tuning_cells(study), *final) if kept.has(cell)]
    drawn = random.Random(0).sample(done, max(1, round(part * len(done))))
    beside = folder.with_name(f"{folder.name}_again")
    shutil.rmtree(beside, ignore_errors=True)  # nothing of a former time may be taken for this one
    runner = Runner(study, beside, world, CellShare(), 0.0)
    runner.prepare(drawn)
    differences = []
    here = machine()
    for cell in drawn:
        there = kept.get(cell).get("summary", {}).get("machine", here)
        if there != here:
            log.warning("%s was run on %s, this is %s: last digits may differ", cell.name, there, here)
        changed = list(_otherwise(_lasting(completed(kept.get(cell))), _lasting(runner.run_cell(cell))))
        log.info("%s: %s", cell.name, "DIFFERENT" if changed else "the same")
        differences += [f"{cell.name}: {what}" for what in changed]
    return differences


def _otherwise(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """What came out otherwise, with both values; a later version may say more."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from _otherwise(value, after.get(key), f"{place}, {key}" if place else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and place == "epochs":
        for epoch, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _otherwise(one, other, f"epoch {epoch}")
    elif before != after and not (before != before and after != after):  # both may be NaN
        yield f"{place}: {before} before, {after} now" if not isinstance(before, list) else place


def _lasting(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in _PASSING}
    if "summary" in kept:
        kept["summary"] = {key: value for key, value in kept["summary"].items() if key not in _PASSING}
    return kept


def _in_short(result: dict[str, Any]) -> str:
    if "diverged" in result:
        return "diverged"
    summary = result["summary"]
    tested = f", test {summary['test']['accuracy']:.4f}" if summary["test"] else ""
    return f"validation {summary['validation']['accuracy']:.4f} at epoch {summary['best_epoch']}{tested}"


def _train_loss(rows: list[dict[str, Any]]) -> list[float]:
    """Of each epoch, the mean over the steps that were logged."""
    epochs: dict[int, list[float]] = {}
    for row in rows:
        if "train/loss" in row:
            epochs.setdefault(math.ceil(row["train/epoch"]), []).append(row["train/loss"])
    return [sum(losses) / len(losses) for _, losses in sorted(epochs.items())]


def _mean(values: list[float]) -> float | None:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else None


# -- several processes on one machine --------------------------------------------------------------------------------------


def in_parallel(start: Callable[[str], Any], workers: int) -> int:
    """Starts a process for each share and waits for all; stops the others where one fails. Returns an exit code."""
    processes = [start(f"{i + 1}/{workers}") for i in range(workers)]
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes):
                break
            time.sleep(0.5)
        return max(abs(int(p.returncode or 0)) for p in processes)
    finally:
        for p in processes:
            if p.poll() is None:
                p.terminate()
            p.wait()


def quiet() -> None:
    """No progress bar for each of some hundred runs."""
    os.environ.setdefault("TQDM_DISABLE", "1")
