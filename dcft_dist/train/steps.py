"""Optimizer steps: data, learning rate, dropout and a scheduled factor depend only on the seed and the step."""

from __future__ import annotations

import math

import torch

from ..data.batches import Batch, Feed, order
from ..data.mixing import mixed
from ..data.splits import file_of
from ..distributed import collectives
from ..distributed.late import LateSum
from ..distributed.progress import arrive
from ..engines.find import find_engine
from ..errors import DivergedError, PenaltyError
from ..method.learned_factor import LearnedFactor
from ..method.penalty import Penalty
from ..runs.stop import Stopped, stop_requested
from ..seeds import seed_of, seed_step
from ..weights.averages import AveragedWeights
from .context import RunContext
from .group_norms import GroupNorms
from .optimizer import factor_at, set_learning_rate
from .speed import Speed, tokens_in

Values = dict[str, float]


class Training:
    """Makes optimizer steps, with the penalty if one is attached.

    Attributes:
        run: the context of the run.
        stopping: True after a step at which some rank was asked to stop, or after the next one.
        penalty: the attached penalty; None before fine-tuning, and for methods without one.
        averages: averages the weights if `train.ema` is set, otherwise None.
        learned: learns the penalty's factor if `penalty.schedule = "learned"`, otherwise None.
        feed: reads the micro-batches of each step.
        speed: measures how fast the steps are, if it is set.
        losses: mean training loss of each step, as far as it was read; who uses them clears them.
    """

    def __init__(self, run: RunContext) -> None:
        self.run, self.stopping = run, False
        self.penalty: Penalty | None = None
        self.learned: LearnedFactor | None = None
        self.averages: AveragedWeights | None = None
        self.speed: Speed | None = None
        self.losses: list[float] = []
        self._began = False  # the fine-tuning
        self._calls = 0  # of the penalty, up to the last check
        self._sums: LateSum[tuple[int, list[Batch]]] = LateSum("training loss")  # of each step: loss, requests to stop
        self._drawn: tuple[int, list[int]] = (-1, [])  # epoch, order of its examples
        self.feed = Feed(self._micro_batches, run.config.train.workers, run.world.device)

    def begin(self, penalty: Penalty | None) -> None:
        """Starts fine-tuning.

        Args:
            penalty: the attached penalty; None if the method uses none.
        """
        self.penalty, self._began, settings = penalty, True, self.run.config.penalty
        if (decay := self.run.config.train.ema) and self.run.config.train.epochs:
            self.averages = AveragedWeights(self.run.model, decay)
        if penalty and settings.schedule == "learned":
            self.learned = LearnedFactor(self.run.model, penalty, self.run.loss, settings.learn_rate)

    def steps(self, steps: range, total: int, what: str) -> None:
        """Makes several steps without logging them.

        Args:
            steps: the steps to make, counted from 0.
            total: number of all steps, for the learning rate.
            what: label for the progress bar, and for the message if the run stops.

        Raises:
            Stopped: the run was asked to stop.
            DivergedError: the training loss is NaN or infinite.
        """
        for step in self.run.progress_bar(steps, what):
            self.step(step, total, None)
            if self.stopping:
                self.run.writer.phase("stopped")
                raise Stopped(f"in the {what}")
        self.settle()

    def step(self, step: int, total: int, groups: GroupNorms | None) -> Values:
        """Makes one optimizer step. Collective.

        Args:
            step: the step, counted from 0.
            total: number of all steps.
            groups: measures gradient norms, and lets the penalty measure what it applies; None: neither is measured.

        Returns:
            Values to log, by log key.

        Raises:
            DivergedError: the training loss is NaN or infinite, at this step or at the one before.
            PenaltyError: the penalty is not the one that the configuration asks for.
        """
        run, config, penalty, mark = self.run, self.run.config, self.penalty, self._mark
        prepared = run.prepared
        mark("")
        micro_batches = self.feed.get(step, total)
        mark("data")
        lr = set_learning_rate(prepared.optimizer, config, step, total)
        arrive(f"training step {step}")
        prepared.model.train()
        prepared.zero_grad()
        if penalty:
            penalty.watch = groups is not None
            if config.penalty.schedule in ("linear", "cosine"):
                penalty.set_factor(factor_at(config.penalty, step, total))
        stop, loss_sum = stop_requested(), torch.zeros((), dtype=torch.float64, device=run.world.device)
        for i, batch in enumerate(micro_batches):
            seed_step(config.seed, step, run.world.data_rank * len(micro_batches) + i)
            with prepared.accumulating(last=i == len(micro_batches) - 1):
                loss = run.loss(prepared.model, batch) / len(micro_batches)
                mark("forward")
                prepared.backward(loss)
                mark("backward")
            loss_sum = loss_sum + loss.detach().double()
        norms = self._clip(groups)
        prepared.step()
        if self.averages is not None:
            self.averages.update()
        if (step + 1) % config.penalty.learn_every == 0:
            self._learn_factor(step)
        mark("step")
        if self.speed is not None:
            self.speed.step(tokens_in(micro_batches))
        sums = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop))])
        self._understand(self._sums.push(sums, (step, micro_batches)))
        if groups is None:  # what is not logged is read one step late
            return norms
        self._check_pull()
        values = {"train/loss": self.settle(), "train/learning_rate": lr, "train/epoch": (step + 1) / run.steps_per_epoch}
        if penalty:
            values |= {
                "penalty/factor": penalty.factor,
                "penalty/applied_over_proposed": self._in_force(penalty, step, total),
            }
        return values | norms

    def _mark(self, part: str) -> None:
        if self.speed is not None:
            self.speed.clock.mark(part)

    def settle(self) -> float:
        """Reads the loss of the last step, if it was not read yet. Collective.

        Returns:
            The mean loss over the ranks; NaN if there is none to read.

        Raises:
            DivergedError: it is NaN or infinite.
        """
        return self._understand(self._sums.flush())

    def _understand(self, found: tuple[list[float], tuple[int, list[Batch]]] | None) -> float:
        """Reads the sums of a step; returns and raises as `settle`."""
        if found is None:
            return math.nan
        (total_loss, stops), (step, micro_batches) = found
        mean_loss, self.stopping = total_loss / self.run.world.world_size, self.stopping or stops > 0
        if not math.isfinite(mean_loss):
            raise DivergedError(f"the training loss is {mean_loss} at step {step}: {self._cause(micro_batches)}")
        self.losses.append(mean_loss)
        return mean_loss

    def check_penalty(self) -> None:
        """Checks, if there is a penalty or a pull, that it is in force on every rank. Collective.

        Raises:
            PenaltyError: it is not; see `Penalty.in_force` and `PullToStart.check`.
        """
        self._check_pull()
        if self.penalty:
            self.penalty.in_force()

    def _check_pull(self) -> None:
        if (pull := find_engine(self.run.model).pull) is not None:
            pull.check()
        elif self.run.config.optimizer.pull_to_start and self._began:
            raise PenaltyError(f"rank {collectives.rank()}: the pull to the start was taken off the model")

    def _cause(self, micro_batches: list[Batch]) -> str:
        """Why a loss is no number: names the first example of the step with a NaN in its input, on any rank. Collective."""
        broken = [
            int(index)
            for batch in micro_batches
            for key, value in batch.items()
            if value.is_floating_point() and key != "labels"
            for index, good in zip(batch["index"], torch.isfinite(value).flatten(1).all(1), strict=True)
            if not good
        ]
        found = collectives.all_gather_ints([broken[0] if broken else -1], what="cause of a loss that is no number")
        if first := next((index + 1 for (index,) in found if index >= 0), 0):
            place = file_of(self.run.task.train.inputs[first - 1])
            return f"the input of training example {first - 1} {place} has values that are NaN or infinite"
        return "lower optimizer.lr"

    def _in_force(self, penalty: Penalty, step: int, total: int) -> float:
        """Checks that the penalty is the one that the configuration asks for, and measures it. Collective.

        Raises:
            PenaltyError: it is not: somebody has removed it, changed its factor, or taken its hooks off.
        """
        measured = penalty.in_force()
        settings, calls = self.run.config.penalty, sum(penalty.calls.values())
        wanted = penalty.factor if self.learned else factor_at(settings, step, total)
        new_calls, self._calls = calls - self._calls, calls
        if penalty.factor != wanted:
            raise PenaltyError(
                f"the factor is {penalty.factor:g} at step {step}, but the configuration asks for {wanted:g}: something has "
                "changed it during the run"
            )
        if math.isinf(measured):
            raise PenaltyError(
                f"the penalty has applied an infinite change at step {step}: a weight or its step is infinite"
            )
        if not collectives.reduce_numbers([new_calls], what="multiplied weights")[0]:
            raise PenaltyError(
                f"no weight was multiplied up to step {step}, though a penalty is attached: a hook was taken off"
            )
        return measured

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of a step's global batch, on the CPU. It depends only on (seed, step, rank)."""
        run, size = self.run, self.run.config.train.global_batch
        epoch, position = divmod(step, run.steps_per_epoch)
        if self._drawn[0] != epoch:
            balanced = run.config.train.sampling == "balanced"
            weights = run.train.labels if balanced else None
            self._drawn = epoch, order(run.config.seed, epoch + 1, len(run.train), weights)
        indices = self._drawn[1][position * size : (position + 1) * size]
        batches = run.micro_batches(indices, run.train, draw=epoch + 1, device=torch.device("cpu"))
        return [self._mixed(batch, step, i, len(batches)) for i, batch in enumerate(batches)]

    def _mixed(self, batch: Batch, step: int, i: int, count: int) -> Batch:
        """A micro-batch after `train.mixup` and `train.cutmix`. Only the fine-tuning and epochs before it mix examples."""
        run, settings = self.run, self.run.config.train
        if not (settings.mixup or settings.cutmix):
            return batch
        seed = seed_of(run.config.seed, "mix", step, run.world.data_rank * count + i)
        return mixed(batch, settings.mixup, settings.cutmix, run.objective.num_outputs, seed)

    def _learn_factor(self, step: int) -> None:
        """If the factor is learned: updates it on a batch of validation examples, drawn anew each time."""
        if self.learned is not None:
            drawn = order(self.run.config.seed, (1 << 32) + step, len(self.run.validation))
            self.learned.update(
                self.run.micro_batches(drawn[: self.run.config.train.global_batch], self.run.validation, draw=0)
            )

    def _clip(self, groups: GroupNorms | None) -> Values:
        """Clips before or after the penalty (`train.clip_order`). Returns the groups' gradient norms before clipping."""
        if self.penalty and self.run.config.train.clip_order != "before_penalty":
            self.penalty.apply()
        norms = groups.gradient_norms() if groups else {}
        self.run.prepared.clip()
        return {f"gradient_norm/{group}": norm for group, norm in norms.items()}
