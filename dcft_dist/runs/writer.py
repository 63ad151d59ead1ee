"""The directory of a run as its ranks use it: progress, metrics, checkpoints, and results of other runs."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.toml import differences, to_toml
from ..distributed import collectives
from ..distributed.progress import arrive
from ..errors import CheckpointError, ConfigError, DamagedError, TemporaryError, line_of, listing
from ..files import FULL, append_line, json_line, objects_in, read_json_or, write_atomic, write_json
from .attempts import now
from .facts import note_file, require_own
from .folder import RunFolder

log = logging.getLogger(__name__)

_told: set[Path] = set()  # files that could not be written, which was said

# Keys that must be equal in both runs before this run uses the head, the scores or the set of another run.
_HEAD = ("task.", "data.", "model.", "import_roots", "seed", "head_warmup.")


_SCORES = (*_HEAD, "importance.", "train.precision")


_TRAINING = ("optimizer.", "train.", "selection.")


_SET = (*_SCORES, "selection.", "removal.")


class RunWriter(RunFolder):
    """Writes to a run's directory. Only rank 0 writes; every rank must call the methods that are marked as collective."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the run's directory; need not exist.
        """
        super().__init__(path)
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._phase = ""

    def begin_anew(self, config: Config) -> None:
        """If nothing was computed yet: data and settings may change, and failures under others are forgotten. Collective."""
        with collectives.agreed("begin the run"):
            if collectives.rank() or self.has_results():
                return
            self.facts.unlink(missing_ok=True)
            shutil.rmtree(self.contents, ignore_errors=True)
            with suppress(DamagedError):
                if not self.changes(config):
                    return
            shutil.rmtree(self.path / "errors", ignore_errors=True)
            (self.path / "attempts.jsonl").unlink(missing_ok=True)

    def open(self, config: Config) -> None:
        """Creates the directory, or opens it to continue the run in it. Collective.

        Raises:
            ConfigError: the directory cannot be written.
            TemporaryError: its disk is full.
        """
        with collectives.agreed("open run directory"):
            if collectives.rank() == 0:
                try:
                    if config.private:
                        self.path.chmod(0o700)
                    write_atomic(self.path / "config.toml", to_toml(config))
                except OSError as error:
                    kind = TemporaryError if error.errno in FULL else ConfigError
                    raise kind(f"runs_dir: {self.path} cannot be written: {error}") from error
                self._seconds = read_json_or(self.progress, {"seconds": {}}, "seconds")["seconds"]

    def take_from(self, source: Path, config: Config) -> str:
        """Takes results of another run that this run would compute again: head, scores, fundamental set. Collective.

        Args:
            source: directory of the other run.
            config: configuration of this run.

        Returns:
            What was taken: `head`, `head and scores` or `head and fundamental set`.

        Raises:
            ConfigError: there is no run in `source`, or it has another task, model or seed.
        """
        taken = "head"
        with collectives.agreed("start_from"):
            if not (source / "config.toml").is_file():
                raise ConfigError(f"start_from: no run in {source}")
            try:
                changes = differences((source / "config.toml").read_text(encoding="utf-8"), to_toml(config))
            except ValueError as error:
                raise ConfigError(f"start_from: {source / 'config.toml'} is damaged: {line_of(error)}") from error
            # Scores after some epochs of training also depend on the settings of that training.
            training = _TRAINING if config.importance.after_epochs else ()
            score_keys, set_keys = (*_SCORES, *training), (*_SET, *training)
            wrong = [text for key, text in changes.items() if key.startswith(_HEAD)]
            if wrong:
                raise ConfigError(f"start_from: {source} is not a run of the same task, model and seed ({listing(wrong)})")
            if not any(key.startswith(score_keys) for key in changes) and (source / self.scores.name).exists():
                self.scores, taken = source / self.scores.name, "head and scores"
            files = [self.head]
            if not any(key.startswith(set_keys) for key in changes) and (source / self.fundamental.name).exists():
                files, taken = [self.head, self.removal, self.fundamental], "head and fundamental set"
            for file in files:
                if collectives.rank() == 0 and (source / file.name).exists() and not file.exists():
                    write_atomic(file, (source / file.name).read_bytes())
        return taken

    def keep(self, file: Path) -> None:
        """Writes down that the run has made a file, so that another one in its place is found. Collective."""
        with collectives.agreed(f"keep {file.name}"):
            if collectives.rank() == 0:
                note_file(self.facts, file)

    def require_own(self, file: Path) -> None:
        """Checks that a file is the one that the run has made. Collective.

        Raises:
            CheckpointError: it is another.
        """
        with collectives.agreed(f"check {file.name}"):
            if collectives.rank() == 0:
                require_own(self.facts, file)

    def phase(self, name: str, step: int = 0, steps: int = 0, seconds_per_step: float = 0.0) -> None:
        """Writes the progress of the run to `progress.json`. Collective.

        Args:
            name: the phase that starts or continues. Its seconds are counted until the next call.
            step: steps done so far.
            steps: number of all steps; 0 in a phase without steps.
            seconds_per_step: seconds that a step takes.
        """
        clock = time.monotonic()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + clock - self._started
        self._phase, self._started = name, clock
        arrive(f"{name} {step}")
        if collectives.rank() == 0:
            progress = {"phase": name, "step": step, "updated": now(), "seconds": self._seconds}
            if steps:
                progress |= {"steps": steps, "seconds_per_step": seconds_per_step}
            with logging_only(self.progress):
                write_json(self.progress, progress)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, summed over all starts of the run."""
        return {name: round(value, 3) for name, value in self._seconds.items()}

    def log(self, step: int, **values: Any) -> None:
        """Appends a line with the step and the values to `metrics.jsonl`."""
        if collectives.rank() == 0:
            with logging_only(self.metrics):
                append_line(self.metrics, {"step": step, **values})

    def forget_after(self, step: int) -> None:
        """Removes logged lines of later steps: a run that continues from `step` writes them again."""
        if collectives.rank() == 0 and self.metrics.exists():
            with logging_only(self.metrics):
                rows = (row for row in objects_in(self.metrics, "step") if isinstance(row["step"], int))
                write_atomic(self.metrics, "".join(json_line(row) for row in rows if row["step"] <= step))

    def all_checkpoints(self, kind: str = "step") -> list[Path]:
        """Folders of the checkpoints of a kind, `step` or `best`, the newest first. Collective.

        Raises:
            CheckpointError: a rank cannot see a folder.
        """
        steps = self.steps(kind) if collectives.rank() == 0 else []
        number = collectives.all_gather_ints([len(steps)], what="checkpoints")[0][0]
        steps += [0] * (number - len(steps))
        steps = collectives.all_gather_ints(steps, what="checkpoints")[0] if number else []
        folders = [self.checkpoint(step, kind) for step in reversed(steps)]
        with collectives.agreed("checkpoints"):
            for folder in folders:
                if not folder.is_dir():
                    raise CheckpointError(
                        f"{folder} is not visible on this rank: runs_dir must be on a file system that all ranks share"
                    )
        return folders


@contextmanager
def logging_only(file: Path) -> Iterator[None]:
    """What is only shown does not stop a run: if it cannot be written, that is said once."""
    try:
        yield
    except OSError as error:
        if file not in _told:
            _told.add(file)
            log.warning("%s cannot be written, and the run goes on without it: %s", file, error)
