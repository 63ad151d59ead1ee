"""The files of a run's directory, and the facts that one process can read from them without torch.

config.toml  metrics.jsonl  head.safetensors  scores.safetensors  fundamental.safetensors  removal.json  checkpoints/
tensorboard/  model/ (the fine-tuned weights)  predictions.csv (of the test data)  summary.json  estimate.json  report.html
lock  attempts.jsonl  errors/  progress.json (see `runs.status`)  facts.json (see `runs.facts`)
contents/ (of the data files; see `data.contents`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ..config.schema import LOCAL_PATHS, Config
from ..config.toml import differences, load_config, to_toml
from ..errors import ConfigError, RunError, listing
from ..files import read_json

# Keys that may change when a run continues: they say how it runs, and change its results only by rounding.
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
    """Paths of one run, the check of its configuration, and its progress."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the run's directory; need not exist.
        """
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
        self.facts = path / "facts.json"
        self.contents = path / "contents"

    @classmethod
    def of(cls, config: Config) -> Self:
        """The folder of a configuration: `<runs_dir>/<name>`."""
        return cls(Path(config.runs_dir) / config.name)

    def check(self, config: Config) -> None:
        """Checks that a run with this configuration may continue here.

        These keys may differ: engine, `[sharding]`, `train.micro_batch`, `train.workers`, `[checkpoint]`, log_every,
        timeout_s, max_attempts and until. Data and weights may lie elsewhere while the run is not finished: each start
        compares what they contain (`runs.facts`).

        Raises:
            ConfigError: the directory holds a run with another configuration.
        """
        file = self.path / "config.toml"
        if not file.exists():
            return
        comparable = self.facts.exists() or self.reached() == "the beginning"
        moved = LOCAL_PATHS if comparable and not self.summary.exists() else ()
        differing = differences(file.read_text(), to_toml(config)).items()
        changed = [text for key, text in differing if not key.startswith(_FREE) and key not in moved]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({listing(changed)}): "
                "give the run another --name, or delete the directory"
            )

    def finished(self, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> tuple[Config, dict[str, Any]]:
        """Reads a finished run.

        Args:
            overrides: dotted keys and values that replace those of the run, as for `load_config`.
            without: dotted keys of the run's configuration to ignore.

        Returns:
            Its configuration, and the facts of its labels (`objectives.make.label_facts`).

        Raises:
            RunError: the directory contains no finished run.
            ConfigError: an override is wrong.
        """
        if not self.summary.is_file():
            raise RunError(f"{self.path} contains no finished run")
        return load_config(self.path / "config.toml", overrides, without), read_json(self.summary)["labels"]

    def reached(self) -> str:
        """The point that the next start continues from, in words.

        Returns:
            `step 5`, `the fundamental set`, `the warmed-up head` or `the beginning`.
        """
        steps = sorted(f.name for f in self.checkpoints.glob("step_*"))
        if steps:
            return f"step {int(steps[-1].removeprefix('step_'))}"
        if self.fundamental.exists():
            return "the fundamental set"
        return "the warmed-up head" if self.head.exists() else "the beginning"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}"
