"""The directory of a run as its ranks use it: small files, and what a run that goes on finds there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from . import collectives
from .config import to_toml
from .errors import CheckpointError, ConfigError, listing
from .files import read_json, read_lines, write_atomic, write_json
from .life import now
from .run_folder import RunFolder, differences
from .schema import Config

# What the results of another run must have in common with this one to be used here.
_HEAD = ("task.", "data.", "model.", "import_roots", "seed", "head_warmup.")
_SCORES = (*_HEAD, "importance.", "train.precision")
_TRAINING = ("optimizer.", "train.", "selection.")
_SET = (*_SCORES, "selection.", "removal.")


class RunDirectory(RunFolder):
    """Only rank 0 writes; the methods that say so are collective."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._phase = ""

    def open(self, config: Config) -> None:
        """Creates the directory, or finds an unfinished run of the same configuration in it. Collective."""
        with collectives.agreed("open run directory"):
            if collectives.rank() == 0:
                try:
                    write_atomic(self.path / "config.toml", to_toml(config))
                except OSError as error:
                    raise ConfigError(f"runs_dir: {self.path} cannot be written: {error}") from error
                if self.progress.exists():
                    self._seconds = read_json(self.progress)["seconds"]

    def take_from(self, source: Path, config: Config) -> str:
        """Takes from another run what this one would only make again; returns what, in words. Collective.

        Raises:
            ConfigError: there is no such run, or even its head is that of another task, model or seed.
        """
        taken = "head"
        with collectives.agreed("start_from"):
            if not (source / "config.toml").is_file():
                raise ConfigError(f"start_from: no run in {source}")
            other = differences((source / "config.toml").read_text(), to_toml(config))
            # If weights are scored after a training, what decides about that one decides about them.
            more = _TRAINING if config.importance.after_epochs else ()
            scores, chosen = (*_SCORES, *more), (*_SET, *more)
            wrong = [text for key, text in other.items() if key.startswith(_HEAD)]
            if wrong:
                raise ConfigError(f"start_from: {source} is no run of the same task, model and seed ({listing(wrong)})")
            if not any(key.startswith(scores) for key in other) and (source / self.scores.name).exists():
                self.scores, taken = source / self.scores.name, "head and scores"
            files = [self.head]
            if not any(key.startswith(chosen) for key in other) and (source / self.fundamental.name).exists():
                files, taken = [self.head, self.removal, self.fundamental], "head and fundamental set"
            for file in files:
                if collectives.rank() == 0 and (source / file.name).exists() and not file.exists():
                    write_atomic(file, (source / file.name).read_bytes())
        return taken

    def phase(self, name: str, step: int = 0, steps: int = 0, seconds_per_step: float = 0.0) -> None:
        """Notes the phase (its seconds are counted until the next note), the step, how many there are and their length."""
        clock = time.monotonic()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + clock - self._started
        self._phase, self._started = name, clock
        collectives.arrive(f"{name} {step}")
        if collectives.rank() == 0:
            progress = {"phase": name, "step": step, "updated": now(), "seconds": self._seconds}
            if steps:
                progress |= {"steps": steps, "seconds_per_step": seconds_per_step}
            write_json(self.progress, progress)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, all attempts at the run together."""
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def log(self, step: int, **values: Any) -> None:
        if collectives.rank() == 0:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops logged lines of later steps: a run that goes on from `step` will write them again."""
        if collectives.rank() == 0 and self.metrics.exists():
            write_atomic(
                self.metrics, "".join(json.dumps(row) + "\n" for row in read_lines(self.metrics) if row["step"] <= step)
            )

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Collective."""
        names = [f.name for f in self.checkpoints.glob("step_*")] if collectives.rank() == 0 else []
        steps = [int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdecimal()]
        latest = collectives.all_gather_ints([max(steps, default=-1)], what="latest checkpoint")[0][0]
        if latest < 0:
            return None
        folder = self.checkpoint(latest)
        with collectives.agreed("latest checkpoint"):
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is not to be seen: runs_dir must be on a file system that all ranks share")
        return folder
