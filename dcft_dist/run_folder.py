"""What is in a run's directory, and what can be read from it without joining the ranks (and without torch).

config.toml  metrics.jsonl  head.safetensors  scores.safetensors  fundamental.safetensors  removal.json  checkpoints/
tensorboard/  model/ (the adapted weights)  predictions.csv (of the test data)  summary.json  estimate.json  report.html
lock  attempts.jsonl  errors/  progress.json: see `life`
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from .config import load_config, to_toml
from .errors import ConfigError, RunError, listing
from .files import read_json
from .schema import Config

# How a run is carried out, not what it does: it may go on otherwise, with the same numbers up to rounding.
_FREE = (
    "engine",
    "sharding.",
    "train.micro_batch",
    "train.workers",
    "checkpoint.",
    "log_every",
    "timeout_s",
    "max_attempts",
    "until",
)


class RunFolder:
    """Paths of one run, the check of its configuration, and how far it got."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.head = path / "head.safetensors"
        self.fundamental = path / "fundamental.safetensors"
        self.removal = path / "removal.json"
        self.scores = path / "scores.safetensors"
        self.model = path / "model"
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions.csv"
        self.estimate = path / "estimate.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.progress = path / "progress.json"

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(Path(config.runs_dir) / config.name)

    def check(self, config: Config) -> None:
        """What only says how a run is carried out may change: engine, sharding, micro-batch, checkpoints, log, timeout.

        Raises:
            ConfigError: the directory holds a run with another configuration.
        """
        file = self.path / "config.toml"
        if not file.exists():
            return
        changed = [d for key, d in differences(file.read_text(), to_toml(config)).items() if not key.startswith(_FREE)]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({listing(changed)}): "
                "give the run another --name, or delete the directory"
            )

    def finished(self, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
        """Configuration of a finished run, and the facts of its labels. See `load_config`.

        Raises:
            RunError: there is none.
        """
        if not self.summary.is_file():
            raise RunError(f"{self.path} holds no finished run")
        return load_config(self.path / "config.toml", overrides, without), read_json(self.summary)["labels"]

    def reached(self) -> str:
        """What a run that is started now goes on from, in words."""
        steps = sorted(f.name for f in self.checkpoints.glob("step_*"))
        if steps:
            return f"step {int(steps[-1].removeprefix('step_'))}"
        if self.fundamental.exists():
            return "the fundamental set"
        return "the warmed-up head" if self.head.exists() else "the beginning"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"


def differences(before: str, after: str) -> dict[str, str]:
    """Dotted key -> how it differs between two resolved configurations.

    Keys that came after one was written had what is now their default.
    """
    old, new = (_flat(to_toml(Config(name="defaults"))) | _flat(text) for text in (before, after))
    return {k: f"{k} was {old.get(k)} and is {new.get(k)}" for k in old | new if old.get(k) != new.get(k)}


def _flat(text: str) -> dict[str, Any]:
    """Dotted key -> value of a resolved configuration."""
    flat = {}
    for key, value in tomllib.loads(text).items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat
