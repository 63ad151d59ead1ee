"""The files of a run's directory, and the facts that one process can read from them without torch.

config.toml  metrics.jsonl  head.safetensors  scores.safetensors  fundamental.safetensors  removal.json  checkpoints/
tensorboard/  model/ (the fine-tuned weights)  predictions*.csv (of the test data)  summary.json  estimate.json  report.html
lock  attempts.jsonl  errors/  progress.json (see `runs.status`)  facts.json (see `runs.facts`)  trackers.json (ids)
contents/ (of the data files; see `data.contents`)
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ..config.needs import needed_to_use, require_packages
from ..config.schema import LOCAL_PATHS, Config
from ..config.toml import differences, load_config, resolved_keys, to_toml
from ..errors import ConfigError, DamagedError, RunError, line_of, listing
from ..files import files_below, read_json, read_json_or, sha256_of
from ..tensor_file import stored_checksum

# Keys that may change when a run continues: they say how it runs, and change its results only by rounding.
_FREE = (
    "name",
    "runs_dir",
    "engine",
    "sharding.",
    "train.micro_batch",
    "train.workers",
    "train.activation_checkpointing",
    "train.activations_on_host",
    "train.compile",
    "train.profile",
    "optimizer.fused",
    "checkpoint.",
    "log_every",
    "trackers",
    "timeout_s",
    "max_attempts",
    "until",
    "private",
)


# Keys without which the file of a result is damaged.
SUMMARY_KEYS = ("name", "method", "labels", "validation", "test", "seconds")
ESTIMATE_KEYS = ("seconds_per_step", "steps", "hours", "device", "device_hours", "time", "end")


def runs_in(folder: Path) -> list[Path]:
    """The directories of runs in a folder, by name; none if it is a run itself."""
    if (folder / "config.toml").exists():
        return []
    return sorted(file.parent for file in folder.glob("*/config.toml"))


class RunFolder:
    """Paths of one run, the check of its configuration, and its progress."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the run's directory; need not exist.
        """
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.trackers = path / "trackers.json"
        self.head = path / "head.safetensors"
        self.fundamental = path / "fundamental.safetensors"
        self.levels = path / "levels.safetensors"
        self.plane = path / "plane.jsonl"  # of an interpolated run: validation metrics of every place
        self.removal = path / "removal.json"
        self.scores = path / "scores.safetensors"
        self.model = path / "model"
        self.metrics = path / "metrics.jsonl"
        self.speed = path / "speed.jsonl"
        self.profile = path / "profile"
        self.estimate = path / "estimate.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.progress = path / "progress.json"
        self.facts = path / "facts.json"
        self.contents = path / "contents"

    @classmethod
    def of(cls, config: Config) -> Self:
        """The folder of a configuration: `<runs_dir>/<name>`."""
        return cls(Path(config.runs_dir) / config.name)

    def check(self, config: Config) -> None:
        """Checks that a run with this configuration may continue here.

        The keys in `_FREE` may differ. Data and weights may lie elsewhere while the run is not finished: each
        start compares what they contain (`runs.facts`). A run that has no results yet may change altogether.

        Raises:
            ConfigError: the directory holds a run with another configuration.
            DamagedError: the run's `config.toml` is damaged.
        """
        if not self.has_results():
            return
        moved = LOCAL_PATHS if self.facts.exists() and not self.summary.exists() else ()
        changed = [text for key, text in self.changes(config).items() if not _is_under(key, moved)]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({listing(changed)}): "
                "give the run another --name, or delete the directory"
            )

    def result(self) -> dict[str, Any] | None:
        """The summary of a finished run, or the estimate of one with `train.max_steps`; None if absent or damaged."""
        summary: dict[str, Any] | None = read_json_or(self.summary, None, *SUMMARY_KEYS)
        return summary if summary is not None else read_json_or(self.estimate, None, *ESTIMATE_KEYS)

    def checksums(self) -> dict[str, str]:
        """Checksum of each file of a finished run that does not change any more, by its path in the folder.

        Of files of tensors it is the one that they state: whether they agree with it is checked when they are read.
        """
        scores = self.path / self.scores.name  # not those of another run
        files = [
            self.path / "config.toml",
            self.metrics,
            self.head,
            scores,
            self.fundamental,
            self.removal,
            self.levels,
            self.plane,
        ]
        files = [*files, *self.path.glob("predictions*.csv"), *(files_below(self.model) if self.model.is_dir() else ())]
        files = [file for file in files if file.is_file() and file != self.model / "README.md"]  # people write into the card
        return {file.relative_to(self.path).as_posix(): _checksum(file) for file in files}

    def altered(self) -> list[str]:
        """Files of a finished run that are missing, or are not those that it wrote; [] if its summary does not list any."""
        stored = read_json_or(self.summary, {"files": {}}, "files")["files"]
        if not isinstance(stored, dict):
            return [self.summary.name]
        found = self.checksums()
        return [name for name, checksum in stored.items() if found.get(name) != checksum]

    def require_unaltered(self) -> None:
        """Checks that configuration and exported model of a finished run are those that it wrote.

        Raises:
            DamagedError: they are not; the message names the files.
        """
        if wrong := [name for name in self.altered() if name.startswith(("config.toml", f"{self.model.name}/"))]:
            raise DamagedError(f"{self.path} is not as the run left it: {listing(wrong)} is missing or was altered")

    def has_results(self) -> bool:
        """Whether a start has left something that the next one goes on from, or a result."""
        files = (self.head, self.scores, self.fundamental, self.metrics, self.summary, self.estimate)
        return any(file.exists() for file in files) or any(self.checkpoints.glob("*_*"))

    def changes(self, config: Config) -> dict[str, str]:
        """Dotted key -> message, for each key that differs from the run's `config.toml` and must not; {} without that file.

        Raises:
            DamagedError: the file is damaged.
        """
        file = self.path / "config.toml"
        if not file.exists():
            return {}
        try:
            text = file.read_text(encoding="utf-8")
            if "name" not in tomllib.loads(text):
                raise ValueError("it has no name")
            found = differences(text, to_toml(config))
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"{file} is damaged ({line_of(error)}): restore it; or delete it, if you are sure that the run has this "
                "configuration"
            ) from error
        return {key: text for key, text in found.items() if not key.startswith(_FREE)}

    def finished(self, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
        """Reads a finished run.

        Args:
            overrides: dotted keys and values that replace those of the run, as for `load_config`.
            without: dotted keys of the run's configuration to ignore.

        Returns:
            Its configuration, and the facts of its labels (`objectives.make.label_facts`).

        Raises:
            RunError: the directory contains no finished run.
            DamagedError: its summary is damaged.
            ConfigError: an override is wrong, or a package is missing.
        """
        if not self.summary.is_file():
            raise RunError(f"{self.path} {'contains no finished run' if self.path.exists() else 'does not exist'}")
        facts = read_json(self.summary, *SUMMARY_KEYS)["labels"]
        if not isinstance(facts, dict) or not isinstance(facts.get("names"), list):
            raise DamagedError(f"{self.summary} is damaged (labels has no names)")
        config = load_config(self.path / "config.toml", overrides, without)
        require_packages(config, self.path, needed_to_use)
        return config, facts

    def reached(self) -> str:
        """The point that the next start continues from, in words.

        Returns:
            `step 5`, `the fundamental set`, `the warmed-up head` or `the beginning`.
        """
        if steps := self.steps():
            return f"step {steps[-1]}"
        if self.fundamental.exists():
            return "the fundamental set"
        return "the warmed-up head" if self.head.exists() else "the beginning"

    def steps(self, kind: str = "step") -> list[int]:
        """Steps of the checkpoints of a kind, `step` or `best`, in order."""
        names = (folder.name.removeprefix(f"{kind}_") for folder in self.checkpoints.glob(f"{kind}_*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def checkpoint(self, step: int, kind: str = "step") -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"{kind}_{step:08d}"


def _checksum(file: Path) -> str:
    return (stored_checksum(file) if file.suffix == ".safetensors" else "") or sha256_of(file)


def identity(config: Config) -> dict[str, Any]:
    """The settings by which a checkpoint knows its run: those that may not change, and are not the default."""
    default = resolved_keys(Config(name="default"))
    keys = {key: value for key, value in resolved_keys(config).items() if value != default.get(key)}
    return {key: json.loads(value) for key, value in keys.items() if not key.startswith(_FREE)}


def _is_under(key: str, parents: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of these, or belongs to one of them."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def keep_private(config: Config) -> Config:
    """With `private`, only the user can read what this process writes from here on. Returns the configuration."""
    if config.private:
        os.umask(0o077)
    return config
