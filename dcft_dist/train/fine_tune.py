"""One run from pre-trained weights to a tested model: warm up, score, select, check, fine-tune, test.

Each phase leaves a file. A run that is started again goes on after the last complete phase.

Data order and dropout are functions of (seed, step, micro-batch), not of a running state. So an interrupted run ends with
the same bits as an uninterrupted one. A run on another number of ranks, with micro-batches of the same size, ends with the
same numbers up to rounding.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from ..config.schema import Config
from ..distributed import collectives
from ..engines.checksum import check_replicas
from ..engines.find import find_engine
from ..engines.whole_tensors import average_buffers
from ..errors import CheckpointError, ConfigError, DivergedError, RunError, WorldError, counted, listing
from ..files import append_line, sha256_of, write_json
from ..method.fundamental_set import FundamentalSet
from ..objectives.base import Metrics, oriented
from ..runs.folder import identity
from ..runs.status import REACHED, estimate_text
from ..runs.stop import Stopped, sigterm_stops, stop_requested
from ..runs.writer import logging_only
from ..weights.checkpoint import bring_back, damage_in, is_complete, read_state
from ..weights.model_state import load_checkpoint, model_state
from ..weights.saver import Saver
from ..weights.shard_files import State
from .batch_norm import renew_statistics
from .context import RunContext
from .custom_optimizer import group_values, set_group_values
from .find_set import Importance, find_importance
from .finish import finish
from .group_norms import GroupNorms
from .measure import speed_of
from .methods import begin
from .profiling import Profile
from .steps import Training
from .trackers import Trackers
from .warm_up import warm_up_or_load

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The best epoch so far by the validation metric; the earlier epoch wins a tie.

    Attributes:
        epoch: number of the epoch; 0 is the model before fine-tuning, with the warmed-up head.
        value: its validation metric, negated if lower is better; None before the first validation.
        step: optimizer steps done at the end of that epoch.
    """

    epoch: int = 0
    value: float | None = None
    step: int = 0


class Trainer:
    """Carries out the phases of a run, in order.

    Attributes:
        run: the context of the run; `config` and `writer` are its configuration and folder.
        training: makes the optimizer steps.
        saver: writes checkpoints.
        trackers: show the curves.
        step_seconds: wall-clock seconds of the last 50 steps.
        identity: settings by which checkpoints know their run.
    """

    def __init__(self, run: RunContext) -> None:
        self.run, self.config, self.writer = run, run.config, run.writer
        self.training = Training(run)
        self.saver = Saver(run.config.checkpoint.background, run.config.timeout_s, _staging(run.config))
        self.trackers = Trackers(run.writer, run.config, run.world.is_first)
        self.identity = identity(run.config)
        self._validated: Metrics = {}  # metrics of the last validation
        self._rates: dict[str, float] = {}  # the last ones
        self.step_seconds: list[float] = []

    def carry_out(self, commit: str | None) -> dict[str, Any]:
        """Carries out the phases that are not complete yet. Collective.

        Args:
            commit: git commit of the code that the run began with; None if unknown.

        Returns:
            The run's summary; its estimate with `train.max_steps`; {} if `until` ends the run before training.

        Raises:
            Stopped: the run was asked to stop.
        """
        try:
            summary = self._phases(commit)
        except BaseException as error:
            # A good checkpoint that is under way is not lost, unless the ranks have lost each other.
            self.saver.leave(0.0 if isinstance(error, WorldError | KeyboardInterrupt) else 60.0)
            self.trackers.close("stopped" if isinstance(error, Stopped) else "failed")
            raise
        self.trackers.close("done")
        return summary

    def _phases(self, commit: str | None) -> dict[str, Any]:
        self.writer.phase("warm_up")
        warm_up_or_load(self.run)
        self._stop_between_phases()
        found = find_importance(self.run, self.training.steps)
        if self.config.until != "train":
            self.writer.phase(f"{REACHED} {self.config.until}")
            return {}
        self._stop_between_phases()
        with sigterm_stops() if self.run.world.world_size == 1 else nullcontext():
            best = self.fine_tune(found)
        if self.config.train.max_steps:
            return self._estimate()
        chosen, loss = self._best_that_is_left(best)
        summary = finish(self.run, found.fundamental, chosen, self.training.penalty, commit, loss)
        step = int(chosen.name.partition("_")[2])
        self.trackers.log(step, {f"test/{key}": value for key, value in (summary["test"] or {}).items()})
        return summary

    def _stop_between_phases(self) -> None:
        if any(requested for (requested,) in collectives.all_gather_ints([int(stop_requested())], what="stop request")):
            self.writer.phase("stopped")
            raise Stopped("between two phases")

    def fine_tune(self, found: Importance) -> Best:
        """Trains and validates. Returns the best epoch; its weights are in the folder `best_<step>`. Collective."""
        run, config, settings = self.run, self.config, self.config.train
        per_epoch = run.steps_per_epoch
        epochs = 0 if config.method == "linear_probe" else settings.epochs
        groups = GroupNorms(run.model, found.fundamental, run.pretrained.head)
        groups.remember_start()
        self.training.begin(begin(run.prepared, found.fundamental, found.levels, config, run.pretrained.head))
        self._print_header(found.fundamental, epochs * per_epoch)
        self.training.speed = speed_of(run)
        self.training.losses.clear()  # those of epochs before scoring
        profile = Profile(settings.profile, self.writer.profile, run.world.rank, run.world.device)
        self.writer.phase("train")
        start, best, validated = self._resume()
        first_new = start + (validated or start > 0)  # the log row of a checkpoint's step is older than the checkpoint
        self.trackers.begin(first_new)
        if not validated and start % per_epoch == 0:
            best = self._end_of_epoch(start, start // per_epoch, best, groups, write=epochs > 0)
            if start == 0:
                self._print_epoch(0, 0, best)
        total = epochs * per_epoch
        end = min(total, settings.max_steps or total)
        if start % per_epoch == 0 and self._is_in_vain(start // per_epoch, best):
            end = start
        for step in run.progress_bar(range(start + 1, end + 1), "train", initial=start, total=end):
            epoch, rest = divmod(step, per_epoch)
            log_now = step % config.log_every == 0 or rest == 0
            began = time.monotonic()
            profile.before(step)
            values = self.training.step(step - 1, total, groups if log_now else None)
            profile.after(step)
            self.step_seconds = [*self.step_seconds[-49:], time.monotonic() - began]
            if log_now:
                check_replicas(run.model)
                self._log(step, values)
                self._log_speed(step)
                self.writer.phase("train", step, total, median(self.step_seconds))
            if self.training.stopping:  # there may be no time to validate
                self._save(step, best, validated=False)
                self.saver.close()
                self.writer.phase("stopped", step, total, median(self.step_seconds))
                raise Stopped(f"at step {step}")
            if rest == 0:
                best = self._end_of_epoch(step, epoch, best, groups)
                self._print_epoch(epoch, total - step, best)
                if self._is_in_vain(epoch, best):
                    break
            elif config.checkpoint.every and step % config.checkpoint.every == 0:
                self._save(step, best, validated=False)
        self.saver.close()
        return best

    def _is_in_vain(self, epoch: int, best: Best) -> bool:
        """Whether the fine-tuning stops after this epoch, by `train.patience`."""
        patience = self.config.train.patience
        if patience is None or epoch - best.epoch < patience or epoch == self.config.train.epochs:
            return False
        log.info("stopped after epoch %d: none of the last %d was better than epoch %d", epoch, patience, best.epoch)
        return True

    # -- epochs ----------------------------------------------------------------------------------------------------

    def _end_of_epoch(
        self,
        step: int,
        epoch: int,
        best: Best,
        groups: GroupNorms,
        write: bool = True,
    ) -> Best:
        """Validates, saves the weights if the epoch is the best so far, and saves a checkpoint if `write`."""
        self.writer.phase("validate", step)
        average_buffers(self.run.model)
        check_replicas(self.run.model)
        with self._averaged():
            best, metrics, may_not_win = self._validate(step, epoch, best)
        values = {f"validation/{key}": value for key, value in metrics.items()}
        values |= {f"movement/{key}": value for key, value in groups.movement().items()}
        self._log(step, values | {"train/epoch": float(epoch)})
        self.writer.phase("checkpoint", step)
        if write:
            self._save(step, best, validated=True, epoch=epoch, validation=None if may_not_win else metrics)
        self.writer.phase("train", step)
        return best

    def _validate(self, step: int, epoch: int, best: Best) -> tuple[Best, Metrics, bool]:
        """Validates the weights as they are, and saves them if they are the best so far.

        Returns:
            The best epoch; the metrics; whether this epoch may not be the best one.
        """
        metrics = self._validated = self.run.validate(f"after epoch {epoch}")
        may_not_win = epoch == 0 and self.config.method != "linear_probe" and not self.config.train.fall_back
        value = self._validation_value(metrics)
        if not may_not_win and (best.value is None or value > best.value):
            self.writer.phase("checkpoint", step)
            best = Best(epoch, value, step)
            state = {"epoch": epoch, "validation": metrics}
            self._write(self._best_folder(best), step, model_state(self.run.model, frozen=self.run.stores_frozen), state)
        return best, metrics, may_not_win

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averages of its weights, if `train.ema` is set, with their own statistics."""
        if (averages := self.training.averages) is None:
            yield
            return
        buffers = [(buffer, buffer.clone()) for buffer in find_engine(self.run.model).module.buffers()]
        with averages.applied():
            renew_statistics(self.run)
            yield
        for buffer, values in buffers:
            buffer.copy_(values)

    def _validation_value(self, metrics: Metrics) -> float:
        """The metric that chooses the epoch, negated if lower is better."""
        name = self.run.metric
        if name not in metrics:  # segmentation: no structure in any mask or prediction
            raise RunError(f"train.metric: {name!r} is not defined on the validation data: choose another metric")
        return oriented(name, metrics[name])

    def _save(self, step: int, best: Best, validated: bool, **result: Any) -> None:
        """Saves a checkpoint, and then deletes older ones. Nothing is saved, or deleted, unless all is well on every rank.

        Args:
            step: steps done.
            best: the best epoch so far.
            validated: whether this step was validated.
            **result: of the validation, with which this checkpoint can stand in for a damaged best one.
        """
        if self.config.checkpoint.keep_last == 0:
            if self.run.world.is_first:
                self._remove_old("best", best.step, self.config.checkpoint.keep_best)
            return
        self.training.settle()
        average_buffers(self.run.model)  # a resumed run then has the same buffers as this one
        check_replicas(self.run.model)
        self.training.check_penalty()
        averages = self.training.averages.values if self.training.averages else None
        state = model_state(self.run.model, self.run.prepared.optimizer, self.run.stores_frozen, averages)
        progress = {"step": step, "best": best.__dict__, "validated": validated}
        progress |= {"fundamental": _checksum(self.writer.fundamental), "levels": _checksum(self.writer.levels)}
        progress["data"] = self.run.task.checksum
        progress["factor"] = self.training.learned.state() if self.training.learned else None
        progress["groups"] = group_values(self.run.prepared.optimizer) if self.config.optimizer.build else None

        def remove_old() -> None:  # the new checkpoint is complete: older ones are no longer needed
            self._remove_old("step", step, self.config.checkpoint.keep_last)
            self._remove_old("best", best.step, self.config.checkpoint.keep_best)

        self._write(self.writer.checkpoint(step), step, state, progress | result, remove_old)

    def _write(
        self, folder: Path, step: int, tensors: State, state: dict[str, Any], then: Callable[[], None] = lambda: None
    ) -> None:
        """Writes a checkpoint after a step; `then` is called on rank 0 when it is complete.

        Raises:
            DivergedError: a number is not finite; the message names the last good checkpoint.
        """
        try:
            self.saver.save(folder, step, tensors, state, self.identity, then)
        except DivergedError as error:
            good = self.writer.steps()
            kept = f"step {good[-1]} is the last good checkpoint" if good else "there is no checkpoint yet"
            raise DivergedError(f"after step {step}: {error}; {kept}. Lower optimizer.lr, under another --name") from error

    def _remove_old(self, kind: str, newest: int, keep: int) -> None:
        """Keeps the last `keep` complete checkpoints up to step `newest`; deletes all others, also those of a lost start."""
        steps = self.writer.steps(kind)
        complete = [step for step in steps if step <= newest and is_complete(self.writer.checkpoint(step, kind))]
        for step in steps:
            if step not in complete[-keep:]:
                shutil.rmtree(self.writer.checkpoint(step, kind))

    def _best_folder(self, best: Best) -> Path:
        return self.writer.checkpoint(best.step, "best")

    def _best_that_is_left(self, best: Best) -> tuple[Path, str]:
        """The folder of the best epoch; if that is damaged, of the best other epoch, and what was lost. Collective.

        Raises:
            CheckpointError: no validated checkpoint is left.
        """
        wanted = self._best_folder(best)
        if not (problem := damage_in(wanted)):
            read_state(wanted, self.identity, verified=True)  # of this run?
            return wanted, ""
        found: list[tuple[float, int, Path]] = []
        for folder in (*self.writer.all_checkpoints("best"), *self.writer.all_checkpoints()):
            if folder != wanted and not damage_in(folder):
                state = read_state(folder, self.identity, verified=True)
                if metrics := state.get("validation"):
                    found.append((self._validation_value(metrics), -int(state["epoch"]), folder))
        if not found:
            raise CheckpointError(
                f"{problem}. It has the best epoch, {best.epoch}, and no other validated checkpoint is left: restore it, or "
                f"delete {self.writer.checkpoints} to fine-tune again"
            )
        _, epoch, folder = max(found)
        loss = f"epoch {best.epoch} was the best, but {problem}: epoch {-epoch} stands in for it"
        log.warning("%s", loss)
        return folder, loss

    def _resume(self) -> tuple[int, Best, bool]:
        """Loads the newest checkpoint: (steps done, best epoch so far, whether this step was validated)."""
        latest = self._latest_whole() if self.config.train.max_steps is None else None
        if latest is None:
            self.writer.forget_after(-1)
            return 0, Best(), False
        state = read_state(latest, self.identity, verified=True)
        if state["fundamental"] != _checksum(self.writer.fundamental):
            raise CheckpointError(f"{self.writer.fundamental} is not the set that {latest} was trained with")
        if state.get("levels") != _checksum(self.writer.levels):
            raise CheckpointError(f"{self.writer.levels} has not the levels that {latest} was trained with")
        if state.get("data") != self.run.task.checksum:
            raise CheckpointError(
                f"the data are not those that {latest} was trained with: put them back, or give a new --name"
            )
        averages = self.training.averages.values if self.training.averages else None
        load_checkpoint(latest, self.run.model, self.run.prepared.optimizer, self.run.stores_frozen, averages)
        if self.training.learned:
            self.training.learned.load_state(state["factor"])
        if groups := state.get("groups"):
            set_group_values(self.run.prepared.optimizer, groups)
        self.writer.forget_after(state["step"])
        log.info("going on from step %d", state["step"])
        return int(state["step"]), Best(**state["best"]), bool(state["validated"])

    def _latest_whole(self) -> Path | None:
        """The newest checkpoint that is not damaged; None if there are no checkpoints. Collective.

        Raises:
            CheckpointError: all are damaged.
        """
        problems = []
        with collectives.agreed("checkpoints"):
            if self.run.world.is_first:
                bring_back(self.writer.checkpoints)
        for folder in self.writer.all_checkpoints():
            if not (problem := damage_in(folder)):
                return folder
            problems.append(problem)
            log.warning("%s: the run goes on from an older checkpoint", problem)
        if problems:
            raise CheckpointError(
                f"no checkpoint is whole: {listing(problems, 3)}. Restore one, or delete {self.writer.checkpoints} to "
                "fine-tune again"
            )
        return None

    def _estimate(self) -> dict[str, Any]:
        """After `train.max_steps`: estimates how long all steps would take. Tests nothing."""
        steps = self.config.train.epochs * self.run.steps_per_epoch
        seconds = median(self.step_seconds)
        hours = steps * seconds / 3600
        now, device = datetime.now(), "GPU" if self.run.world.device.type == "cuda" else "rank"
        estimate = {
            "seconds_per_step": seconds,
            "steps": steps,
            "hours": hours,
            "device": device,
            "device_hours": hours * self.run.world.world_size,
            "preparation_seconds": sum(v for k, v in self.writer.seconds.items() if k != "train"),
            "time": f"{now:%Y-%m-%d %H:%M}",
            "end": f"{now + timedelta(hours=hours):%Y-%m-%d %H:%M}",
        }
        self.writer.phase("done", self.config.train.max_steps or 0)
        if self.run.world.is_first:
            write_json(self.writer.estimate, estimate)
            print(estimate_text(estimate), flush=True)
        return estimate

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.writer.log(step, **values)
        self.trackers.log(step, values)

    def _log_speed(self, step: int) -> None:
        """Logs how fast the steps since the last log were, in a file of its own: no two runs have the same numbers."""
        if self.training.speed is None:
            return
        self._rates = self.training.speed.report(self.run.world.data_ranks)
        if self.run.world.is_first:
            with logging_only(self.writer.speed):
                append_line(self.writer.speed, {"step": step, **self._rates})
        self.trackers.log(step, self._rates)

    def _print_epoch(self, epoch: int, steps_left: int, best: Best) -> None:
        """One line for each epoch, on rank 0."""
        losses, self.training.losses = self.training.losses, []
        if not self.run.world.is_first:
            return
        metric, rates = self.run.metric, self._rates
        won = " (best)" if best.value is not None and best.epoch == epoch else ""  # without `fall_back` epoch 0 never wins
        rate = max(group["lr"] for group in self.run.prepared.optimizer.param_groups)
        parts = [
            f"epoch {epoch}/{self.config.train.epochs}",
            f"training loss {mean(losses):.4g}" if losses else "",
            f"validation {metric} {self._validated[metric]:.4g}{won}",
            f"validation loss {self._validated['loss']:.4g}" if metric != "loss" else "",
            f"learning rate {rate:.2g}" if epoch else "before fine-tuning",
            f"{rates['speed/samples_per_s']:.3g} samples/s" if "speed/samples_per_s" in rates else "",
            f"{rates['speed/tokens_per_s']:.3g} tokens/s" if "speed/tokens_per_s" in rates else "",
            f"{rates['speed/mfu']:.1%} of the peak" if "speed/mfu" in rates else "",
            f"{timedelta(seconds=round(steps_left * median(self.step_seconds)))} left" if steps_left else "",
        ]
        tqdm.write(" | ".join(part for part in parts if part), file=sys.stdout)
        sys.stdout.flush()

    def _print_header(self, fundamental: FundamentalSet | None, steps: int) -> None:
        run, penalty = self.run, self.training.penalty
        if not run.world.is_first:
            return
        parts = [
            f"{self.config.name}: {self.config.method}",
            f"{counted(run.world.world_size, 'rank')} ({run.world.device.type})",
            self.config.engine,
            f"{run.num_weights:,} weights",
        ]
        if fundamental and penalty:
            parts += [
                f"{fundamental.num_selected:,} fundamental ({fundamental.num_selected / run.num_weights:.1%} of all, "
                f"{fundamental.num_selected / fundamental.num_eligible:.1%} of the eligible)",
                f"factor {penalty.factor:g} on the {penalty.level}",
            ]
        print(" | ".join([*parts, f"{self.config.optimizer.kind}, {steps} steps", *run.lowered]), flush=True)


def _checksum(file: Path) -> str | None:
    return sha256_of(file) if file.exists() else None


def _staging(config: Config) -> Path | None:
    """The folder of `checkpoint.staging` on this node; None without it. Collective.

    Raises:
        ConfigError: it names an environment variable that is not set on a node, or is no absolute path.
    """
    if (given := config.checkpoint.staging) is None:
        return None
    place = Path(os.path.expandvars(given)).expanduser()
    with collectives.agreed("checkpoint.staging"):
        empty = [
            name for pair in re.findall(r"\$(\w+)|\$\{(\w+)\}", given) for name in pair if name and not os.environ.get(name)
        ]
        if empty:
            raise ConfigError(f"checkpoint.staging = {given!r}: the environment variable {empty[0]} is not set")
        if not place.is_absolute():
            raise ConfigError(f"checkpoint.staging = {given!r} must be an absolute path")
    return place
