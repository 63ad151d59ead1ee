"""One run from pre-trained weights to a tested model: warm up, score, select, check, fine-tune, test.

Each phase leaves a file, and a run that is started again goes on after the last one that is complete. Data order and
dropout are functions of (seed, step, micro-batch), not of a running state, so a run that was interrupted ends with the same
bits as one that was not, and one on other ranks, with micro-batches of the same size, with the same numbers up to rounding.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import collectives, life
from .checkpoint import load_checkpoint, model_state, read_state, save_checkpoint
from .config import Config, check_ranks, check_sizes
from .controls import control_set
from .data import Batch, Examples, evaluation_batches, micro_batches, order
from .engines.wrap import Plan, prepare
from .errors import CheckpointError, DivergedError
from .evaluate import EVALUATION_BATCH, evaluate
from .factor import LearnedFactor
from .files import read_json, sha256_of, write_atomic, write_json
from .fundamental import FundamentalSet
from .head import Head
from .importance import Scores, score_importance
from .measure import Groups
from .methods import begin, choose_trained, depths, merge_adapters
from .models import HEAD, build_model
from .optim import factor_at, make_optimizer, seed_randomness, set_learning_rate
from .penalty import Penalty
from .prior import scores_after_training
from .provenance import git_commit, machine, peak_memory_gib, versions, weights_checksum
from .removal import check_removal, choose_fraction
from .run_dir import RunDirectory
from .score_file import load_scores, save_scores
from .selection import select_fundamental
from .splits import TaskData
from .tasks import load_task
from .weights import save_weights
from .world import World

log = logging.getLogger(__name__)


def run(config: Config, world: World) -> dict[str, Any]:
    """Carries out a run, or what is left of it, and returns its summary (also in `summary.json`). Collective.

    Raises:
        DcftError: bad input, a missing package, a damaged file; see the errors of each step.
    """
    directory = RunDirectory.of(config)
    with collectives.agreed("set-up"):
        check_ranks(config, world.world_size)
        directory.check(config)
    for done in (directory.summary, directory.estimate):
        if collectives.on_every_rank(done.exists()):
            log.info("%s is finished already: delete it to run it again", directory.path)
            return dict(read_json(done))
    with life.owned(directory.path, config.timeout_s):
        directory.open(config)
        former = life.begin_attempt(directory.path, directory.reached(), config.max_attempts)
        if former and former["ranks"] != world.world_size:
            log.info(
                "going on with %d ranks instead of %d: the global batch stays %d, by accumulation",
                world.world_size,
                former["ranks"],
                config.train.global_batch,
            )
        if config.start_from:
            log.info("%s: %s", config.start_from, directory.take_from(Path(config.start_from), config))
        return Trainer(config, world, directory).run()


@dataclass
class Best:
    """The best epoch so far, judged by validation accuracy (ties: the earlier one); epoch 0 is the warmed-up head."""

    epoch: int = 0
    accuracy: float = -1.0
    step: int = 0


class Trainer:
    """The phases of a run, in the order of the methods."""

    def __init__(self, config: Config, world: World, directory: RunDirectory) -> None:
        self.config, self.world, self.directory = config, world, directory
        self.stopping, self.commit = False, git_commit()  # the commit that began: the tree may change meanwhile
        self.step_seconds: list[float] = []
        self.learned: LearnedFactor | None = None
        self.directory.phase("setup")
        with collectives.agreed("set-up"):
            self.task: TaskData = load_task(config.task)
            self.model, self.processor = build_model(config, len(self.task.class_names))
            splits = (self.task.train, self.task.validation, self.task.test)
            self.train, self.validation, self.test = [self.processor(split) for split in splits]
            check_sizes(config, len(self.train))
        self.num_weights = sum(p.numel() for p in self.model.parameters())

    def run(self) -> dict[str, Any]:
        """
        Raises:
            Stopped: it was asked to.
        """
        config = self.config
        self.directory.phase("warm_up")
        head = Head(self.model, config.head_warmup, config.seed, self.world)
        head.warm_up_or_load(self.directory.head, self.train, self.validation)
        self._stop_between_phases()
        choose_trained(self.model, config)
        places = depths(self.model)
        self.prepared = prepare(self.model, self._plan(), lambda weights: make_optimizer(weights, config, places))
        fundamental = self.find_fundamental() if config.uses_set else None
        if config.until != "train":
            self.directory.phase(f"{life.REACHED} {config.until}")
            return {}
        self._stop_between_phases()
        best, penalty = self.fine_tune(fundamental)
        return self._estimate() if config.train.max_steps else self.finish(fundamental, best, penalty)

    def _stop_between_phases(self) -> None:
        if any(wanted for (wanted,) in collectives.all_gather_ints([int(life.stop_requested())], what="stop request")):
            self.directory.phase("stopped")
            raise life.Stopped("between two phases")

    def _plan(self) -> Plan:
        train, sharding = self.config.train, self.config.sharding
        micro_batch = self._micro_batch(train.global_batch)
        return Plan(
            engine=self.config.engine,
            device=self.world.device,
            blocks=self.model.blocks(),
            bf16=train.precision == "bf16",
            replicas=sharding.replicas,
            offload=sharding.offload,
            zero_stage=sharding.zero_stage,
            micro_batch=micro_batch,
            accumulation=train.global_batch // self.world.world_size // micro_batch,
            clip_grad_norm=train.clip_grad_norm,
        )

    # -- fundamental set -------------------------------------------------------------------------------------------

    def find_fundamental(self) -> FundamentalSet | None:
        """Scores, selects and runs the removal check; or loads the set of an earlier attempt. None: it was only to score."""
        wants_check = bool(self.config.removal.fractions) and self.config.selection.kind == "top"
        done = self.directory.fundamental.exists() and (self.directory.removal.exists() or not wants_check)
        if collectives.on_every_rank(done):
            with collectives.agreed("load the fundamental set"):
                return FundamentalSet.load(self.directory.fundamental)
        scores = self._scores()
        if self.config.until == "score":
            return None
        chance = math.log(len(self.task.class_names))
        if scores.loss >= 0.95 * chance:
            log.warning("the loss while scoring (%.3f) is at chance level (%.3f): scores mean little", scores.loss, chance)
        self.directory.phase("select")
        s, curve = self.config.selection, None
        limit = self.config.removal.num_samples

        def validate() -> dict[str, float]:
            return self._evaluate(self.validation, limit)

        fraction = s.fraction
        if fraction == "auto":
            fraction, curve = choose_fraction(self.prepared.model, scores, validate, self.config.seed)
            log.info("selection.fraction: %g of the eligible weights", fraction)
        fundamental = select_fundamental(scores, fraction, scope=s.scope, floor=s.floor, cap=s.cap)
        top, fundamental = fundamental, control_set(self.prepared.model, scores, fundamental, s.kind, self.config.seed)
        fundamental = fundamental.with_extra(
            score_loss=None if math.isnan(scores.loss) else scores.loss,
            seed=self.config.seed,
            **({"fraction_curve": curve} if curve else {}),
            **({"jaccard_with_top": top.jaccard(fundamental)} if s.kind != "top" else {}),
        )
        if wants_check:
            self.directory.phase("removal_check")
            fractions = self.config.removal.fractions
            found = check_removal(self.prepared.model, scores, fractions, validate, self.config.seed)
            if self.world.is_first:
                write_json(
                    self.directory.removal,
                    {"chance_loss": chance, "chance_accuracy": 1 / len(self.task.class_names), **found},
                )
        fundamental.save(self.directory.fundamental)
        return fundamental

    def _scores(self) -> Scores:
        """Scores the weights, or reads the scores of an earlier run; kept in a file if they are what was asked for."""
        self.directory.phase("score")
        settings, file = self.config.importance, self.directory.scores
        s = self.config.selection
        if s.kind == "random" and s.fraction != "auto" and self.config.until != "score":  # no scores are needed
            return score_importance(
                self.prepared.model,
                None,
                None,
                head=HEAD,
                criterion="random",
                eligible=settings.eligible,
                seed=self.config.seed,
            )
        if collectives.on_every_rank(file.exists()):
            return load_scores(file, self.prepared.model)
        scores = self._score_after_training() if settings.after_epochs else self._score()
        if self.config.until == "score":
            save_scores(scores, file)
        return scores

    def _score_after_training(self) -> Scores:
        """Nothing of it is logged or saved: a run that is stopped meanwhile starts it again."""
        settings, fraction = self.config.importance, self.config.selection.fraction
        epochs = settings.after_epochs // settings.rounds
        total = settings.after_epochs * (len(self.train) // self.config.train.global_batch)

        def train(turn: int) -> None:
            steps = range(turn * total // settings.rounds, (turn + 1) * total // settings.rounds)
            for step in self._progress_bar(steps, f"{epochs} epochs before scoring"):
                self._step(step, total, None, None)
                if self.stopping:
                    self.directory.phase("stopped")
                    raise life.Stopped("before scoring")

        return scores_after_training(
            self.prepared.model,
            self.prepared.optimizer,
            rounds=settings.rounds,
            fraction=0.0 if fraction == "auto" else fraction,
            train=train,
            score=self._score,
        )

    def _score(self) -> Scores:
        settings = self.config.importance
        wanted = order(self.config.seed, 0, len(self.train))[: settings.num_samples]
        items = []
        for first in range(0, len(wanted), settings.score_batch):
            batch = wanted[first : first + settings.score_batch]
            items += micro_batches(
                batch,
                self.world.rank,
                self.world.world_size,
                self._micro_batch(settings.score_batch),
                self.train,
                self.world.device,
            )
        per_batch = settings.score_batch // self.world.world_size // self._micro_batch(settings.score_batch)
        return score_importance(
            self.prepared.model,
            items if settings.criterion == "obs" else self._progress_bar(items, "score"),
            self._loss,
            head=HEAD,
            criterion=settings.criterion,
            eligible=settings.eligible,
            accumulation=per_batch,
            seed=self.config.seed,
            block=settings.block,
            damping=settings.damping,
        )

    def _micro_batch(self, global_batch: int) -> int:
        """The largest micro-batch within the limit that divides this rank's share of a batch."""
        share = global_batch // self.world.world_size
        return max(n for n in range(1, self.config.train.micro_batch + 1) if share % n == 0)

    # -- fine-tuning -----------------------------------------------------------------------------------------------

    def fine_tune(self, fundamental: FundamentalSet | None) -> tuple[Best, Penalty | None]:
        settings, config = self.config.train, self.config
        steps_per_epoch = len(self.train) // settings.global_batch
        epochs = 0 if config.method == "linear_probe" else settings.epochs
        groups = Groups(self.prepared.model, fundamental, HEAD)
        groups.remember_start()
        penalty = begin(self.prepared, fundamental, config)
        if penalty and config.penalty.schedule == "learned":
            self.learned = LearnedFactor(self.prepared.model, penalty, self._loss, config.penalty.learn_rate)
        self._print_plan(fundamental, penalty, epochs * steps_per_epoch)
        self.directory.phase("train")
        step, best, validated = self._resume()
        first_new = step + (validated or step > 0)  # the row of a checkpoint's step was written before it
        writer = SummaryWriter(str(self.directory.tensorboard), purge_step=first_new) if self.world.is_first else None
        if not validated and step % steps_per_epoch == 0:
            best = self._end_of_epoch(step, step // steps_per_epoch, best, groups, writer, write=epochs > 0)
        total = epochs * steps_per_epoch
        end = min(total, settings.max_steps or total)
        for done in self._progress_bar(range(step + 1, end + 1), "train", initial=step, total=end):
            epoch, rest = divmod(done, steps_per_epoch)
            log_now = done % config.log_every == 0 or rest == 0
            began = time.monotonic()
            values = self._step(done - 1, total, penalty, groups if log_now else None)
            self.step_seconds = [*self.step_seconds[-49:], time.monotonic() - began]
            if log_now:
                self._log(writer, done, values)
                self.directory.phase("train", done, total, median(self.step_seconds))
            if self.stopping:  # there may be no time to validate
                self._save(done, best, validated=False)
                self.directory.phase("stopped", done, total, median(self.step_seconds))
                raise life.Stopped(f"at step {done}")
            if rest == 0:
                best = self._end_of_epoch(done, epoch, best, groups, writer)
            elif config.checkpoint.every and done % config.checkpoint.every == 0:
                self._save(done, best, validated=False)
        if writer:
            writer.close()
        return best, penalty

    def _step(self, step: int, total: int, penalty: Penalty | None, groups: Groups | None) -> dict[str, float]:
        """One optimizer step; returns what to log. With `groups`, the penalty is watched."""
        settings, world = self.config.train, self.world
        steps_per_epoch = len(self.train) // settings.global_batch
        epoch, place = divmod(step, steps_per_epoch)
        begin, end = place * settings.global_batch, (place + 1) * settings.global_batch
        indices = order(self.config.seed, epoch + 1, len(self.train))[begin:end]
        size = self._micro_batch(settings.global_batch)
        micros = micro_batches(indices, world.rank, world.world_size, size, self.train, world.device)
        prepared = self.prepared
        lr = set_learning_rate(prepared.optimizer, self.config, step, total)
        collectives.arrive(f"training step {step}")
        prepared.model.train()
        prepared.zero_grad()
        if penalty:
            penalty.watch = groups is not None
            if self.config.penalty.schedule in ("linear", "cosine"):
                penalty.set_factor(factor_at(self.config.penalty, step, total))
        stop, losses = life.stop_requested(), []
        for i, batch in enumerate(micros):
            seed_randomness(self.config.seed, step, world.rank * len(micros) + i)
            with prepared.accumulating(last=i == len(micros) - 1):
                loss = self._loss(prepared.model, batch) / len(micros)
                prepared.backward(loss)
            losses.append(loss.detach().double())
        norms = self._clip(penalty, groups)
        prepared.step()
        if (step + 1) % self.config.penalty.learn_every == 0:
            self._learn_factor(step)
        total_loss, stops = collectives.reduce_numbers([sum(losses), stop], what="training loss")
        mean_loss, self.stopping = total_loss / world.world_size, stops > 0
        if not math.isfinite(mean_loss):
            raise DivergedError(f"the training loss is {mean_loss} at step {step}: lower optimizer.lr")
        values = {"train/loss": mean_loss, "train/learning_rate": lr, "train/epoch": (step + 1) / steps_per_epoch}
        if penalty and groups:
            values |= {"penalty/factor": penalty.factor, "penalty/applied_over_proposed": penalty.in_force()}
        return values | norms

    def _learn_factor(self, step: int) -> None:
        """If it is to be learned: on a batch of validation texts, another one each time."""
        if self.learned is None:
            return
        size, world = self.config.train.global_batch, self.world
        drawn = order(self.config.seed, (1 << 32) + step, len(self.validation))[:size]
        items = micro_batches(drawn, world.rank, world.world_size, self._micro_batch(size), self.validation, world.device)
        self.learned.update(items)

    def _clip(self, penalty: Penalty | None, groups: Groups | None) -> dict[str, float]:
        """Clips before or after the penalty, as configured; returns the gradient norms of both groups before clipping."""
        settings = self.config.train
        if penalty and settings.clip_order != "before_penalty":
            penalty.apply()
        found = groups.gradient_norms() if groups else {}
        self.prepared.clip()
        return {f"gradient_norm/{group}": norm for group, norm in found.items()}

    def _end_of_epoch(
        self,
        step: int,
        epoch: int,
        best: Best,
        groups: Groups,
        writer: SummaryWriter | None,
        write: bool = True,
    ) -> Best:
        """Validates; keeps the weights of the best epoch; saves a checkpoint to go on from."""
        self.directory.phase("validate", step)
        found = self._evaluate(self.validation)
        values = {f"validation/{key}": value for key, value in found.items()}
        values |= {f"movement/{key}": value for key, value in groups.movement().items()}
        self._log(writer, step, values | {"train/epoch": float(epoch)})
        self.directory.phase("checkpoint", step)
        fell_back = epoch == 0 and self.config.method != "linear_probe" and not self.config.train.fall_back
        if found["accuracy"] > best.accuracy and not fell_back:
            best = Best(epoch, found["accuracy"], step)
            state = model_state(self.prepared.model)
            save_checkpoint(self._best_folder(best), state, {"epoch": epoch, "validation": found})
        if write:
            self._save(step, best, validated=True)
        self.directory.phase("train", step)
        return best

    def _save(self, step: int, best: Best, validated: bool) -> None:
        if self.config.checkpoint.keep_last == 0:
            if self.world.is_first:
                self._remove_old("best", best.step, self.config.checkpoint.keep_best)
            return
        state = model_state(self.prepared.model, self.prepared.optimizer)
        about = {"step": step, "best": best.__dict__, "validated": validated, "fundamental": self._set_checksum()}
        about["factor"] = self.learned.state() if self.learned else None
        save_checkpoint(self.directory.checkpoint(step), state, about)
        if self.world.is_first:  # the new checkpoint is whole: older ones are no longer needed
            self._remove_old("step", step, self.config.checkpoint.keep_last)
            self._remove_old("best", best.step, self.config.checkpoint.keep_best)

    def _remove_old(self, kind: str, newest: int, keep: int) -> None:
        """Keeps the checkpoints of the `keep` highest steps up to `newest`; later ones are of a future that was lost."""
        steps = sorted(int(folder.name[5:]) for folder in self.directory.checkpoints.glob(f"{kind}_*"))
        kept = [step for step in steps if step <= newest][-keep:]
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.directory.checkpoints / f"{kind}_{step:08d}")

    def _set_checksum(self) -> str | None:
        file = self.directory.fundamental
        return sha256_of(file) if file.exists() else None

    def _best_folder(self, best: Best) -> Path:
        return self.directory.checkpoints / f"best_{best.step:08d}"

    def _resume(self) -> tuple[int, Best, bool]:
        """(steps done, best epoch so far, whether the weights of this step were validated)."""
        latest = self.directory.latest_checkpoint() if self.config.train.max_steps is None else None
        if latest is None:
            self.directory.forget_after(-1)
            return 0, Best(), False
        state = read_state(latest)
        if state["fundamental"] != self._set_checksum():
            raise CheckpointError(f"{self.directory.fundamental} is not the set that {latest} was trained with")
        load_checkpoint(latest, self.prepared.model, self.prepared.optimizer)
        if self.learned:
            self.learned.load_state(state["factor"])
        self.directory.forget_after(state["step"])
        log.info("going on from step %d", state["step"])
        return int(state["step"]), Best(**state["best"]), bool(state["validated"])

    def _estimate(self) -> dict[str, Any]:
        """After `train.max_steps`: how long all steps would take. Nothing is tested."""
        steps = self.config.train.epochs * (len(self.train) // self.config.train.global_batch)
        seconds = median(self.step_seconds)
        hours = steps * seconds / 3600
        begin, device = datetime.now(), "GPU" if self.world.device.type == "cuda" else "rank"
        found = {
            "seconds_per_step": seconds,
            "steps": steps,
            "hours": hours,
            "device": device,
            "device_hours": hours * self.world.world_size,
            "preparation_seconds": sum(v for k, v in self.directory.seconds.items() if k != "train"),
            "time": f"{begin:%Y-%m-%d %H:%M}",
            "end": f"{begin + timedelta(hours=hours):%Y-%m-%d %H:%M}",
        }
        self.directory.phase("done", self.config.train.max_steps or 0)
        if self.world.is_first:
            write_json(self.directory.estimate, found)
            print(life.estimate_text(found), flush=True)
        return found

    # -- end -------------------------------------------------------------------------------------------------------

    def finish(self, fundamental: FundamentalSet | None, best: Best, penalty: Penalty | None) -> dict[str, Any]:
        """Tests the weights of the best epoch, once, and writes the summary."""
        self.directory.phase("test")
        folder = self._best_folder(best)
        state = read_state(folder)
        load_checkpoint(folder, self.prepared.model)
        test = self._test() if self.config.test else None
        if self.config.checkpoint.keep_last:
            self._export(fundamental)
        self.directory.phase("done", best.step)
        config = self.config
        summary = {
            "name": config.name,
            "method": config.method,
            "engine": config.engine,
            "ranks": self.world.world_size,
            "device": self.world.device.type,
            "seed": config.seed,
            "criterion": fundamental.info.criterion if fundamental else None,
            "fraction": fundamental.fraction if fundamental else None,
            "num_selected": fundamental.num_selected if fundamental else None,
            "num_eligible": fundamental.num_eligible if fundamental else None,
            "num_weights": self.num_weights,
            "factor": penalty.factor if penalty else None,
            "level": penalty.level if penalty else None,
            "where": penalty.where if penalty and penalty.level == "gradient" else None,
            "optimizer": config.optimizer.name,
            "best_epoch": best.epoch,
            "jaccard_with_top": fundamental.info.extra.get("jaccard_with_top") if fundamental else None,
            "validation": state["validation"],
            "test": test,
            "seconds": self.directory.seconds,
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "versions": versions(),
            "machine": machine(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "git_commit": self.commit,
            "data_checksum": self.task.checksum,
            "weights_checksum": weights_checksum(self.prepared.model),
            "caveat": self.task.caveat,
            "removal": read_json(self.directory.removal) if self.directory.removal.exists() else None,
        }
        if self.world.is_first:
            write_json(self.directory.summary, summary)
        return summary

    def _test(self) -> dict[str, float]:
        """Metrics on the test data; the prediction for each example goes into a file."""
        predicted: dict[int, int] = {}
        found = self._evaluate(self.test, predictions=predicted)
        if self.world.is_first:
            split = self.task.test
            rows = [f"{split.groups[i]},{split.labels[i]},{predicted[i]}" for i in range(len(split))]
            write_atomic(self.directory.predictions, "\n".join(["group,label,predicted", *rows]) + "\n")
        return found

    def _export(self, fundamental: FundamentalSet | None) -> None:
        """The adapted model as a folder that `AutoModel` and `AutoTokenizer` read; its head; the fundamental set."""
        folder = self.directory.model
        if self.config.method == "lora":
            merge_adapters(self.model.backbone)
        save_weights(self.prepared.model, folder, prefix="backbone.")
        save_weights(self.prepared.model, folder / HEAD, prefix=f"{HEAD}.")
        if fundamental is not None:
            fundamental.save(folder / self.directory.fundamental.name)
        with collectives.agreed("export"):
            if self.world.is_first:
                self.model.describe(folder)
                self.processor.save(folder)

    # -- shared ----------------------------------------------------------------------------------------------------

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.prepared.computing():
            logits = model(batch)
        return functional.cross_entropy(logits.float(), batch["labels"])

    def _evaluate(
        self, examples: Examples, limit: int | None = None, predictions: dict[int, int] | None = None
    ) -> dict[str, float]:
        batches = evaluation_batches(
            examples, self.world.rank, self.world.world_size, EVALUATION_BATCH, self.world.device, limit
        )
        return evaluate(self.prepared.model, batches, len(self.task.class_names), self.prepared.computing, predictions)

    def _log(self, writer: SummaryWriter | None, step: int, values: dict[str, float]) -> None:
        self.directory.log(step, **values)
        if writer:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    def _progress_bar(self, items: Any, what: str, **options: Any) -> Any:
        off = not self.world.is_first or bool(os.environ.get("TQDM_DISABLE"))
        return tqdm(items, desc=f"{self.config.name}: {what}", disable=off, mininterval=2.0, **options)

    def _print_plan(self, fundamental: FundamentalSet | None, penalty: Penalty | None, steps: int) -> None:
        if not self.world.is_first:
            return
        parts = [
            f"{self.config.name}: {self.config.method}",
            f"{self.world.world_size} ranks ({self.world.device.type})",
            self.config.engine,
            f"{self.num_weights:,} weights",
        ]
        if fundamental and penalty:
            parts += [
                f"{fundamental.num_selected:,} fundamental ({fundamental.num_selected / self.num_weights:.1%} of all, "
                f"{fundamental.num_selected / fundamental.num_eligible:.1%} of the eligible)",
                f"factor {penalty.factor:g} on the {penalty.level}",
            ]
        print(" | ".join([*parts, f"{self.config.optimizer.name}, {steps} steps"]), flush=True)
