"""Runs a study: prepares heads and scores, tunes every arm on validation data, then trains and tests it on fresh seeds.

    <folder>/prepared/  heads and scores, computed once for all cells that share them
    <folder>/examples/  group and label of each test example, one file for each setting
    <folder>/cells/     one file for each finished cell; an interrupted study continues with the cells that have none
    <folder>/runs/      the runs in progress

Several processes can divide a study among them (`--share 2/8`, for example one array task each). Each process then runs
every eighth cell. At the end of a phase it waits for the files of the others.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any

from ..distributed.world import World
from ..errors import ConfigError, DivergedError, RunError, UnfinishedError, listing
from ..files import json_line, objects_in, read_json, read_json_or, read_lines, write_atomic
from ..runs.folder import RunFolder
from ..train.interpolate import interpolate
from ..train.run import run
from .results import StudyFolder
from .study import Cell, Study, final_cells, load_study, make_config, make_preparation, settings_of, tuning_cells

log = logging.getLogger(__name__)

POLL_S = 5.0


# Keys of a summary that may differ when the same cell runs again. All other keys must be equal.
@dataclass(frozen=True)
class CellShare:
    """Which of a study's cells this process runs: those at positions `index`, `index + number`, and so on.

    Attributes:
        index: of this share, from 0.
        number: of shares.
    """

    index: int = 0
    number: int = 1

    @classmethod
    def parse(cls, text: str) -> CellShare:
        """Reads a share from text such as `2/8`, the second of eight.

        Raises:
            RunError: the text does not have this form.
        """
        index, _, number = text.partition("/")
        if not (index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
            raise RunError(f"a share looks like 2/8, the second of eight, not {text!r}")
        return cls(int(index) - 1, int(number))


def compare(file: Path, folder: Path, world: World, share: CellShare, wait_s: float, overrides: Sequence[str] = ()) -> None:
    """Runs this process's share of a study. Cells that already have a result are not run again.

    Args:
        file: the study's TOML file.
        folder: where the results go.
        world: the process group of this run.
        share: which cells this process runs.
        wait_s: at the end of a phase, seconds to wait for the cells of other shares.
        overrides: see `load_study`.

    Raises:
        ConfigError: the study, or the configuration of one of its cells, is wrong.
        RunError: a result in the folder was computed with another version of the study.
        UnfinishedError: cells of other shares were missing after `wait_s`.
    """
    study = load_study(file, overrides)
    runner = Runner(study, folder, world, share, wait_s)
    runner.results.require_same()  # before the file of the study is replaced
    write_atomic(folder / "study.toml", written(study, file))
    tuning = list(tuning_cells(study))
    runner.prepare(tuning)
    runner.run_all(tuning, "tuning")
    if not study.seeds:
        return
    final = list(final_cells(study, runner.results.choose_all()))
    runner.prepare(final)
    runner.run_all(final, "testing")


class Runner:
    """Runs the cells of a study one after the other; the arguments are those of `compare`."""

    def __init__(self, study: Study, folder: Path, world: World, share: CellShare, wait_s: float) -> None:
        self.study, self.folder, self.world, self.share, self.wait_s = study, folder, world, share, wait_s
        self.results = StudyFolder(study, folder)

    def prepare(self, cells: Iterable[Cell]) -> None:
        """Computes the heads and scores that the cells start from.

        A preparation can diverge if it trains before scoring. Its file `ready` then contains the error, else nothing.
        """
        configs, needed = {}, set()
        for cell in cells:
            config = make_preparation(make_config(self.study, cell, self.folder), self.folder)
            configs[config.name] = config
            if not self.results.has(cell):
                needed.add(config.name)
        ready_files = {name: self.folder / "prepared" / name / "ready" for name in needed}
        for name in self._my_share(configs):  # of all, so that every share counts alike
            if name in needed and not ready_files[name].exists():
                log.info("preparing %s", name)
                try:
                    run(configs[name], self.world)
                    write_atomic(ready_files[name], "")
                except DivergedError as error:
                    write_atomic(ready_files[name], str(error))
        self._wait_for(ready_files.values(), "preparations")

    def run_all(self, cells: Sequence[Cell], phase: str) -> None:
        """Runs this process's share of the cells, and waits for the others.

        Args:
            cells: all cells of the phase.
            phase: `"tuning"` or `"testing"`, for the log.

        Raises:
            RunError: a result in the folder was computed with another version of the study.
            UnfinishedError: cells of other shares were missing after `wait_s`.
        """
        runs = defaultdict(list)  # cells by their run: those that differ in the interpolation alone have one
        for cell in cells:
            runs[make_config(self.study, cell, self.folder).name].append(cell)
        mine = [(run_name, cell) for run_name in self._my_share(runs) for cell in runs[run_name]]
        seconds: list[float] = []
        for number, (run_name, cell) in enumerate(mine, 1):
            if not self.results.has(cell):
                began = time.monotonic()
                result = self.run_cell(cell)
                self.results.put(cell, result)
                seconds.append(time.monotonic() - began)
                left = timedelta(seconds=round(mean(seconds) * (len(mine) - number)))
                log.info(
                    "%s %d/%d: %s: %s (%.0f s; %s left at this rate)",
                    phase,
                    number,
                    len(mine),
                    cell.name,
                    _outcome(result),
                    seconds[-1],
                    left,
                )
            self.results.get(cell)
            if cell is runs[run_name][-1]:
                shutil.rmtree(self.folder / "runs" / run_name, ignore_errors=True)
        self._wait_for([self.results.file(cell) for cell in cells if not self.results.has(cell)], f"{phase} cells")

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Runs one cell and returns its result, as it is written to `cells/`.

        A cell that diverges has a result too: the key `"diverged"` with the error, and neither summary nor epochs.
        """
        config = make_config(self.study, cell, self.folder)
        source = self.folder / "prepared" / make_preparation(config, self.folder).name
        config = config.model_copy(update={"start_from": str(source)})
        identity = {
            "cell": cell.name,
            "setting": cell.setting,
            "arm": cell.arm,
            "values": dict(cell.values),
            "seed": cell.seed,
            "tuning": cell.tuning,
        }
        if family := self.study.family(cell.arm):
            identity["interpolate"] = family
        try:
            if message := (source / "ready").read_text():
                raise DivergedError(f"before scoring: {message}")
            summary = run(config, self.world)
            if family:
                summary = interpolate(self.folder / "runs" / config.name, self.world)
        except DivergedError as error:  # too high a learning rate is a result, not a failure
            return {**identity, "config": settings_of(config), "diverged": str(error)}
        run_folder = self.folder / "runs" / config.name
        if family:
            summary, identity["places"] = _of_family(summary, run_folder, family)
        after = f"_{family}" if family else ""
        place = run_folder / "interpolation" if family else run_folder
        rows = objects_in(run_folder / "metrics.jsonl", "step")
        prefixes = ("validation/", "movement/")
        return {
            **identity,
            "config": settings_of(config),
            "summary": {key: value for key, value in summary.items() if key not in ("name", "removal", "files")},
            "prepared_seconds": read_json_or(source / "progress.json", {"seconds": {}}, "seconds")["seconds"],
            "epochs": [{k: v for k, v in row.items() if k.startswith(prefixes)} for row in rows if "validation/loss" in row],
            "train_loss": _train_loss(rows),
            "in_force": _mean(
                [row["penalty/applied_over_proposed"] for row in rows if "penalty/applied_over_proposed" in row]
            ),
            "predicted": None if cell.tuning else self._predicted(cell, summary, place / f"predictions{after}.csv"),
            "external": {
                name: self._predicted(cell, summary, place / f"predictions{after}_{name}.csv", name)
                for name in summary.get("external", {})
            },
        }

    def _predicted(self, cell: Cell, summary: Mapping[str, Any], file: Path, test: str = "") -> list[int]:
        """The number of the predicted class of each test example, of the test data or of further test data.

        Groups and labels are the same for all cells of a setting, so they go into one file of `examples/`.
        """
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        numbers = {name: number for number, name in enumerate(summary["labels"]["names"])}
        examples = {"group": [row["group"] for row in rows], "label": [numbers[row["label"]] for row in rows]}
        shared = self.results.examples_file(cell.setting, test)
        if not shared.exists():
            write_atomic(shared, json_line(examples))
        elif read_json(shared, "group", "label") != examples:
            raise RunError(f"{cell.name} has other test data than {shared}: move it to a separate setting")
        return [numbers[row["predicted"]] for row in rows]

    def _my_share(self, items: Iterable[Any]) -> list[Any]:
        return list(items)[self.share.index :: self.share.number]

    def _wait_for(self, files: Iterable[Path], what: str) -> None:
        missing, deadline = [f for f in files if not f.exists()], time.monotonic() + self.wait_s
        if missing:
            log.info("waiting for %d %s of the other shares", len(missing), what)
        while missing := [f for f in missing if not f.exists()]:
            if time.monotonic() > deadline:
                raise UnfinishedError(
                    f"after {self.wait_s:.0f} s these {what} of other shares are missing: {listing(map(str, missing))}"
                )
            time.sleep(POLL_S)


# -- regenerating ----------------------------------------------------------------------------------------------------------


def written(study: Study, file: Path) -> str:
    """The text of a study's file, with the overrides that it was given beside, as its first line.

    Raises:
        ConfigError: the file has overrides elsewhere.
    """
    text = file.read_text(encoding="utf-8")
    first, _, rest = text.partition("\n")
    own = first.startswith("overrides = ")
    if not study.overrides:
        return text
    if not own and tomllib.loads(text).get("overrides"):
        raise ConfigError(f"{file}: overrides is what `dcft compare` writes, into the first line: put keys into [common]")
    return f"overrides = {json.dumps(study.overrides, ensure_ascii=False)}\n{rest if own else text}"


def _of_family(summary: dict[str, Any], run_folder: Path, family: str) -> tuple[dict[str, Any], list[list[Any]]]:
    """The summary of an interpolated run with the results of one family, and the family's places with validation metrics."""
    found = summary["interpolation"]
    mine = found["families"][family]
    results = {key: mine.get(key) for key in ("validation", "test", "test_intervals")}
    results["external"] = mine.get("external", {})
    rows = read_lines(RunFolder(run_folder / "interpolation").plane)
    places = [
        [row["on_set"], row["on_rest"], row["metrics"]["accuracy"], round(row["metrics"]["loss"], 5)]
        for row in rows
        if row["family"] == family
    ]
    chosen = {key: mine[key] for key in ("on_set", "on_rest", "movement")} | {
        "jaccard_of_random": found["jaccard_of_random"]
    }
    results |= {"weights_checksum": mine["weights_checksum"], "interpolation": chosen}
    results["jaccard_with_top"] = found["jaccard_of_random"] if family == "random" else None
    return summary | results, places


def _outcome(result: dict[str, Any]) -> str:
    if "diverged" in result:
        return "diverged"
    summary = result["summary"]
    tested = f", test {summary['test']['accuracy']:.4f}" if summary["test"] else ""
    return f"validation {summary['validation']['accuracy']:.4f} at epoch {summary['best_epoch']}{tested}"


def _train_loss(rows: list[dict[str, Any]]) -> list[float]:
    """For each epoch, the mean training loss over its logged steps."""
    epochs: dict[int, list[float]] = {}
    for row in rows:
        if "train/loss" in row:
            epochs.setdefault(math.ceil(row["train/epoch"]), []).append(row["train/loss"])
    return [sum(losses) / len(losses) for _, losses in sorted(epochs.items())]


def _mean(values: list[float]) -> float | None:
    """The mean of the values that are not NaN; None if there are none."""
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else None


# -- several processes on one machine --------------------------------------------------------------------------------------


def in_parallel(start: Callable[[str], Any], workers: int) -> int:
    """Starts one process for each share and waits for all of them. If one fails, it stops the others.

    Args:
        start: starts the process of a share such as `"2/8"`, and returns its `subprocess.Popen`.
        workers: number of processes.

    Returns:
        An exit code: 0 if all processes succeeded.
    """
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
    """Turns off progress bars: a study has some hundred runs."""
    os.environ.setdefault("TQDM_DISABLE", "1")
