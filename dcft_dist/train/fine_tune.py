"""One run from pre-trained weights to a tested model: warm up, score, select, check, fine-tune, test.

Each phase leaves a file, and a run that is started again goes on after the last one that is complete. Data order and
dropout are functions of (seed, step, micro-batch), not of a running state, so a run that was interrupted ends with the same
bits as one that was not, and one on other ranks, with micro-batches of the same size, with the same numbers up to rounding.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..distributed import collectives
from ..engines.whole_tensors import average_buffers
from ..errors import CheckpointError, RunError
from ..files import sha256_of, write_json
from ..method.fundamental_set import FundamentalSet
from ..objectives.base import Metrics, oriented
from ..runs.status import REACHED, estimate_text
from ..runs.stop import Stopped, stop_requested
from ..weights.checkpoint import load_checkpoint, model_state, read_state, save_checkpoint
from .context import RunContext
from .find_set import find_fundamental
from .finish import finish
from .group_norms import GroupNorms
from .methods import begin
from .steps import Training
from .warm_up import warm_up_or_load

log = logging.getLogger(__name__)


@dataclass
class Best:
    """The best epoch so far by the validation metric (ties: the earlier one); epoch 0 is the warmed-up head."""

    epoch: int = 0
    value: float | None = None
    step: int = 0


class Trainer:
    """The phases of a run, in the order of the methods."""

    def __init__(self, run: RunContext) -> None:
        self.run, self.config, self.writer = run, run.config, run.writer
        self.training = Training(run)
        self.step_seconds: list[float] = []

    def carry_out(self, commit: str | None) -> dict[str, Any]:
        """
        Raises:
            Stopped: it was asked to.
        """
        self.writer.phase("warm_up")
        warm_up_or_load(self.run)
        self._stop_between_phases()
        fundamental = find_fundamental(self.run, self.training.steps) if self.config.uses_set else None
        if self.config.until != "train":
            self.writer.phase(f"{REACHED} {self.config.until}")
            return {}
        self._stop_between_phases()
        best = self.fine_tune(fundamental)
        if self.config.train.max_steps:
            return self._estimate()
        return finish(self.run, fundamental, self._best_folder(best), self.training.penalty, commit)

    def _stop_between_phases(self) -> None:
        if any(wanted for (wanted,) in collectives.all_gather_ints([int(stop_requested())], what="stop request")):
            self.writer.phase("stopped")
            raise Stopped("between two phases")

    def fine_tune(self, fundamental: FundamentalSet | None) -> Best:
        """Trains and validates; returns the best epoch, whose weights are in its folder."""
        run, config, settings = self.run, self.config, self.config.train
        per_epoch = run.steps_per_epoch
        epochs = 0 if config.method == "linear_probe" else settings.epochs
        groups = GroupNorms(run.model, fundamental, run.pretrained.head)
        groups.remember_start()
        self.training.begin(begin(run.prepared, fundamental, config, run.pretrained.head))
        self._print_plan(fundamental, epochs * per_epoch)
        self.writer.phase("train")
        step, best, validated = self._resume()
        first_new = step + (validated or step > 0)  # the row of a checkpoint's step was written before it
        writer = SummaryWriter(str(self.writer.tensorboard), purge_step=first_new) if run.world.is_first else None
        if not validated and step % per_epoch == 0:
            best = self._end_of_epoch(step, step // per_epoch, best, groups, writer, write=epochs > 0)
        total = epochs * per_epoch
        end = min(total, settings.max_steps or total)
        for done in run.progress_bar(range(step + 1, end + 1), "train", initial=step, total=end):
            epoch, rest = divmod(done, per_epoch)
            log_now = done % config.log_every == 0 or rest == 0
            began = time.monotonic()
            values = self.training.step(done - 1, total, groups if log_now else None)
            self.step_seconds = [*self.step_seconds[-49:], time.monotonic() - began]
            if log_now:
                self._log(writer, done, values)
                self.writer.phase("train", done, total, median(self.step_seconds))
            if self.training.stopping:  # there may be no time to validate
                self._save(done, best, validated=False)
                self.writer.phase("stopped", done, total, median(self.step_seconds))
                raise Stopped(f"at step {done}")
            if rest == 0:
                best = self._end_of_epoch(done, epoch, best, groups, writer)
            elif config.checkpoint.every and done % config.checkpoint.every == 0:
                self._save(done, best, validated=False)
        if writer:
            writer.close()
        return best

    # -- epochs ----------------------------------------------------------------------------------------------------

    def _end_of_epoch(
        self,
        step: int,
        epoch: int,
        best: Best,
        groups: GroupNorms,
        writer: SummaryWriter | None,
        write: bool = True,
    ) -> Best:
        """Validates; keeps the weights of the best epoch; saves a checkpoint to go on from."""
        self.writer.phase("validate", step)
        average_buffers(self.run.model)
        found = self.run.validate(f"after epoch {epoch}")
        values = {f"validation/{key}": value for key, value in found.items()}
        values |= {f"movement/{key}": value for key, value in groups.movement().items()}
        self._log(writer, step, values | {"train/epoch": float(epoch)})
        self.writer.phase("checkpoint", step)
        fell_back = epoch == 0 and self.config.method != "linear_probe" and not self.config.train.fall_back
        value = self._judged(found)
        if not fell_back and (best.value is None or value > best.value):
            best = Best(epoch, value, step)
            save_checkpoint(self._best_folder(best), model_state(self.run.model), {"epoch": epoch, "validation": found})
        if write:
            self._save(step, best, validated=True)
        self.writer.phase("train", step)
        return best

    def _judged(self, metrics: Metrics) -> float:
        """The metric that chooses the epoch, the higher the better."""
        name = self.run.metric
        if name not in metrics:  # of a segmentation, if no example has or is given any structure
            raise RunError(f"train.metric: {name!r} is not defined on the validation data")
        return oriented(name, metrics[name])

    def _save(self, step: int, best: Best, validated: bool) -> None:
        if self.config.checkpoint.keep_last == 0:
            if self.run.world.is_first:
                self._remove_old("best", best.step, self.config.checkpoint.keep_best)
            return
        average_buffers(self.run.model)  # what goes on from here is then what would go on from the file
        state = model_state(self.run.model, self.run.prepared.optimizer)
        about = {"step": step, "best": best.__dict__, "validated": validated, "fundamental": self._set_checksum()}
        about["data"] = self.run.task.checksum
        about["factor"] = self.training.learned.state() if self.training.learned else None
        save_checkpoint(self.writer.checkpoint(step), state, about)
        if self.run.world.is_first:  # the new checkpoint is whole: older ones are no longer needed
            self._remove_old("step", step, self.config.checkpoint.keep_last)
            self._remove_old("best", best.step, self.config.checkpoint.keep_best)

    def _remove_old(self, kind: str, newest: int, keep: int) -> None:
        """Keeps the checkpoints of the `keep` highest steps up to `newest`; later ones are of a future that was lost."""
        steps = sorted(int(folder.name[5:]) for folder in self.writer.checkpoints.glob(f"{kind}_*"))
        kept = [step for step in steps if step <= newest][-keep:]
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.writer.checkpoints / f"{kind}_{step:08d}")

    def _set_checksum(self) -> str | None:
        file = self.writer.fundamental
        return sha256_of(file) if file.exists() else None

    def _best_folder(self, best: Best) -> Path:
        return self.writer.checkpoints / f"best_{best.step:08d}"

    def _resume(self) -> tuple[int, Best, bool]:
        """(steps done, best epoch so far, whether the weights of this step were validated)."""
        latest = self.writer.latest_checkpoint() if self.config.train.max_steps is None else None
        if latest is None:
            self.writer.forget_after(-1)
            return 0, Best(), False
        state = read_state(latest)
        if state["fundamental"] != self._set_checksum():
            raise CheckpointError(f"{self.writer.fundamental} is not the set that {latest} was trained with")
        if state.get("data") != self.run.task.checksum:
            raise CheckpointError(
                f"the data are not those that {latest} was trained with: put them back, or give a new --name"
            )
        load_checkpoint(latest, self.run.model, self.run.prepared.optimizer)
        if self.training.learned:
            self.training.learned.load_state(state["factor"])
        self.writer.forget_after(state["step"])
        log.info("going on from step %d", state["step"])
        return int(state["step"]), Best(**state["best"]), bool(state["validated"])

    def _estimate(self) -> dict[str, Any]:
        """After `train.max_steps`: how long all steps would take. Nothing is tested."""
        steps = self.config.train.epochs * self.run.steps_per_epoch
        seconds = median(self.step_seconds)
        hours = steps * seconds / 3600
        begin, device = datetime.now(), "GPU" if self.run.world.device.type == "cuda" else "rank"
        found = {
            "seconds_per_step": seconds,
            "steps": steps,
            "hours": hours,
            "device": device,
            "device_hours": hours * self.run.world.world_size,
            "preparation_seconds": sum(v for k, v in self.writer.seconds.items() if k != "train"),
            "time": f"{begin:%Y-%m-%d %H:%M}",
            "end": f"{begin + timedelta(hours=hours):%Y-%m-%d %H:%M}",
        }
        self.writer.phase("done", self.config.train.max_steps or 0)
        if self.run.world.is_first:
            write_json(self.writer.estimate, found)
            print(estimate_text(found), flush=True)
        return found

    def _log(self, writer: SummaryWriter | None, step: int, values: dict[str, float]) -> None:
        self.writer.log(step, **values)
        if writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def _print_plan(self, fundamental: FundamentalSet | None, steps: int) -> None:
        run, penalty = self.run, self.training.penalty
        if not run.world.is_first:
            return
        parts = [
            f"{self.config.name}: {self.config.method}",
            f"{run.world.world_size} ranks ({run.world.device.type})",
            self.config.engine,
            f"{run.num_weights:,} weights",
        ]
        if fundamental and penalty:
            parts += [
                f"{fundamental.num_selected:,} fundamental ({fundamental.num_selected / run.num_weights:.1%} of all, "
                f"{fundamental.num_selected / fundamental.num_eligible:.1%} of the eligible)",
                f"factor {penalty.factor:g} on the {penalty.level}",
            ]
        print(" | ".join([*parts, f"{self.config.optimizer.name}, {steps} steps"]), flush=True)
