"""A run's directory: what is in it, and what a run that goes on finds there.

config.toml  metrics.jsonl  head.safetensors  fundamental.safetensors  removal.json  checkpoints/  tensorboard/
model/ (the adapted weights)  progress.json (phase, step)  summary.json  report.html
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

# How a run is carried out, not what it does: it may go on otherwise, with the same numbers up to rounding.
_FREE = ("engine", "sharding.", "train.micro_batch")


class RunDirectory:
    """Paths and small files of one run. Only rank 0 writes; the methods that say so are collective."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.runs_dir) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.head = self.path / "head.safetensors"
        self.fundamental = self.path / "fundamental.safetensors"
        self.removal = self.path / "removal.json"
        self.model = self.path / "model"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self._progress = self.path / "progress.json"
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._phase = ""

    def open(self, config: Config) -> None:
        """Creates the directory, or finds an unfinished run of the same configuration in it. Collective.

        Engine, sharding and micro-batch may have changed: checkpoints do not depend on them.

        Raises:
            ConfigError: the directory holds a run with another configuration.
        """
        text, file = to_toml(config), self.path / "config.toml"
        with collectives.agreed("open run directory"):
            if file.exists():
                before, now = _flat(file.read_text()), _flat(text)
                changed = [
                    f"{k} was {before.get(k)} and is {now.get(k)}"
                    for k in before | now
                    if before.get(k) != now.get(k) and not k.startswith(_FREE)
                ]
                if changed:
                    raise ConfigError(
                        f"{self.path} holds a run with another configuration ({listing(changed)}): "
                        "give the run another --name, or delete the directory"
                    )
        with collectives.agreed("open run directory"):
            if collectives.rank() == 0:
                try:
                    write_atomic(file, text)
                except OSError as error:
                    raise ConfigError(f"runs_dir: {self.path} cannot be written: {error}") from error
                if self._progress.exists():
                    self._seconds = read_json(self._progress)["seconds"]

    def phase(self, name: str, step: int = 0) -> None:
        """Notes the phase (its seconds are counted until the next note) and the step."""
        now = time.monotonic()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._started
        self._phase, self._started = name, now
        collectives.arrive(f"{name} {step}")
        if collectives.rank() == 0:
            write_json(self._progress, {"phase": name, "step": step, "seconds": self._seconds})

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
