"""A run's directory: what is in it, and what a run that goes on finds there.

config.toml  metrics.jsonl  head.safetensors  scores.safetensors  fundamental.safetensors  removal.json  checkpoints/
tensorboard/  model/ (the adapted weights)  summary.json  estimate.json  report.html
lock  attempts.jsonl  errors/  progress.json: see `life`
"""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

from . import collectives
from .config import Config, to_toml
from .errors import CheckpointError, ConfigError, listing
from .files import read_json, write_atomic, write_json
from .life import now

# How a run is carried out, not what it does: it may go on otherwise, with the same numbers up to rounding.
_FREE = ("engine", "sharding.", "train.micro_batch", "checkpoint.", "log_every", "timeout_s", "max_attempts", "until")

# What the results of another run must have in common with this one to be used here.
_HEAD = ("task.", "model.", "seed", "head_warmup.")
_SCORES = (*_HEAD, "importance.", "method", "train.precision")
_SET = (*_SCORES, "selection.", "removal.")


class RunDirectory:
    """Paths and small files of one run. Only rank 0 writes; the methods that say so are collective."""

    def __init__(self, config: Config, path: Path | None = None) -> None:
        self.path = path or Path(config.runs_dir) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.head = self.path / "head.safetensors"
        self.fundamental = self.path / "fundamental.safetensors"
        self.removal = self.path / "removal.json"
        self.scores = self.path / "scores.safetensors"
        self.model = self.path / "model"
        self.metrics = self.path / "metrics.jsonl"
        self.estimate = self.path / "estimate.json"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self._progress = self.path / "progress.json"
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._phase = ""

    def check(self, config: Config) -> None:
        """What only says how a run is carried out may change: engine, sharding, micro-batch, checkpoints, log, timeout.

        Raises:
            ConfigError: the directory holds a run with another configuration.
        """
        file = self.path / "config.toml"
        if not file.exists():
            return
        changed = [d for key, d in _differences(file.read_text(), to_toml(config)).items() if not key.startswith(_FREE)]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({listing(changed)}): "
                "give the run another --name, or delete the directory"
            )

    def open(self, config: Config) -> None:
        """Creates the directory, or finds an unfinished run of the same configuration in it. Collective."""
        with collectives.agreed("open run directory"):
            if collectives.rank() == 0:
                try:
                    write_atomic(self.path / "config.toml", to_toml(config))
                except OSError as error:
                    raise ConfigError(f"runs_dir: {self.path} cannot be written: {error}") from error
                if self._progress.exists():
                    self._seconds = read_json(self._progress)["seconds"]

    def take_from(self, source: Path, config: Config) -> str:
        """Takes from another run what this one would only make again; returns what, in words. Collective.

        Raises:
            ConfigError: there is no such run, or even its head is that of another task, model or seed.
        """
        taken = "head"
        with collectives.agreed("start_from"):
            if not (source / "config.toml").is_file():
                raise ConfigError(f"start_from: no run in {source}")
            other = _differences((source / "config.toml").read_text(), to_toml(config))
            wrong = [text for key, text in other.items() if key.startswith(_HEAD)]
            if wrong:
                raise ConfigError(f"start_from: {source} is no run of the same task, model and seed ({listing(wrong)})")
            if not any(key.startswith(_SCORES) for key in other) and (source / self.scores.name).exists():
                self.scores, taken = source / self.scores.name, "head and scores"
            files = [self.head]
            if not any(key.startswith(_SET) for key in other) and (source / self.fundamental.name).exists():
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
            write_json(self._progress, progress)

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
                self.metrics, "".join(json.dumps(row) + "\n" for row in read_metrics(self.metrics) if row["step"] <= step)
            )

    def reached(self) -> str:
        """What a run that is started now goes on from, in words; on rank 0."""
        steps = sorted(f.name for f in self.checkpoints.glob("step_*"))
        if steps:
            return f"step {int(steps[-1].removeprefix('step_'))}"
        if self.fundamental.exists():
            return "the fundamental set"
        return "the warmed-up head" if self.head.exists() else "the beginning"

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

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"


def _differences(before: str, after: str) -> dict[str, str]:
    """Dotted key -> how it differs between two resolved configurations."""
    old, new = _flat(before), _flat(after)
    return {k: f"{k} was {old.get(k)} and is {new.get(k)}" for k in old | new if old.get(k) != new.get(k)}


def _flat(text: str) -> dict[str, Any]:
    """Dotted key -> value of a resolved configuration."""
    flat = {}
    for key, value in tomllib.loads(text).items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed run left unfinished is skipped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
