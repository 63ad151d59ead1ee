"""One optimizer step after the other: data, learning rate, dropout and factor are functions of the step."""

from __future__ import annotations

import math

import torch

from ..data.batches import Batch, Feed, order
from ..distributed import collectives
from ..errors import DivergedError
from ..method.learned_factor import LearnedFactor
from ..method.penalty import Penalty
from ..runs.stop import Stopped, stop_requested
from ..seeds import seed_step
from .context import RunContext
from .group_norms import GroupNorms
from .optimizer import factor_at, set_learning_rate

Values = dict[str, float]


class Training:
    """Makes steps, with the penalty in force if there is one. `stopping`: some rank was asked to stop."""

    def __init__(self, run: RunContext) -> None:
        self.run, self.stopping = run, False
        self.penalty: Penalty | None = None
        self.learned: LearnedFactor | None = None
        self._drawn: tuple[int, list[int]] = (-1, [])  # epoch, and the order of the examples in it
        self.feed = Feed(self._micro_batches, run.config.train.workers, run.world.device)

    def begin(self, penalty: Penalty | None) -> None:
        """From now on with that penalty."""
        self.penalty, settings = penalty, self.run.config.penalty
        if penalty and settings.schedule == "learned":
            self.learned = LearnedFactor(self.run.model, penalty, self.run.loss, settings.learn_rate)

    def steps(self, steps: range, total: int, what: str) -> None:
        """Makes these of `total` steps.

        Raises:
            Stopped: it was asked to.
        """
        for step in self.run.progress_bar(steps, what):
            self.step(step, total, None)
            if self.stopping:
                self.run.writer.phase("stopped")
                raise Stopped(f"in the {what}")

    def step(self, step: int, total: int, groups: GroupNorms | None) -> Values:
        """One optimizer step; returns what to log. With `groups`, the penalty is watched.

        Raises:
            DivergedError: the loss is no number.
        """
        run, config, penalty = self.run, self.run.config, self.penalty
        prepared = run.prepared
        micros = self.feed.get(step, total)
        lr = set_learning_rate(prepared.optimizer, config, step, total)
        collectives.arrive(f"training step {step}")
        prepared.model.train()
        prepared.zero_grad()
        if penalty:
            penalty.watch = groups is not None
            if config.penalty.schedule in ("linear", "cosine"):
                penalty.set_factor(factor_at(config.penalty, step, total))
        stop, losses = stop_requested(), []
        for i, batch in enumerate(micros):
            seed_step(config.seed, step, run.world.rank * len(micros) + i)
            with prepared.accumulating(last=i == len(micros) - 1):
                loss = run.loss(prepared.model, batch) / len(micros)
                prepared.backward(loss)
            losses.append(loss.detach().double())
        norms = self._clip(groups)
        prepared.step()
        if (step + 1) % config.penalty.learn_every == 0:
            self._learn_factor(step)
        total_loss, stops = collectives.reduce_numbers([sum(losses), stop], what="training loss")
        mean_loss, self.stopping = total_loss / run.world.world_size, stops > 0
        if not math.isfinite(mean_loss):
            raise DivergedError(f"the training loss is {mean_loss} at step {step}: lower optimizer.lr")
        values = {"train/loss": mean_loss, "train/learning_rate": lr, "train/epoch": (step + 1) / run.steps_per_epoch}
        if penalty and groups:
            values |= {"penalty/factor": penalty.factor, "penalty/applied_over_proposed": penalty.in_force()}
        return values | norms

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of a step's batch, on the CPU: a function of (seed, step, rank)."""
        run, size = self.run, self.run.config.train.global_batch
        epoch, place = divmod(step, run.steps_per_epoch)
        if self._drawn[0] != epoch:
            balanced = run.config.train.sampling == "balanced"
            weights = run.train.labels if balanced else None
            self._drawn = epoch, order(run.config.seed, epoch + 1, len(run.train), weights)
        indices = self._drawn[1][place * size : (place + 1) * size]
        return run.micro_batches(indices, run.train, draw=epoch + 1, device=torch.device("cpu"))

    def _learn_factor(self, step: int) -> None:
        """If it is to be learned: on a batch of validation examples, another one each time."""
        if self.learned is not None:
            drawn = order(self.run.config.seed, (1 << 32) + step, len(self.run.validation))
            self.learned.update(
                self.run.micro_batches(drawn[: self.run.config.train.global_batch], self.run.validation, draw=0)
            )

    def _clip(self, groups: GroupNorms | None) -> Values:
        """Clips before or after the penalty, as configured; returns the gradient norms of both groups before clipping."""
        if self.penalty and self.run.config.train.clip_order != "before_penalty":
            self.penalty.apply()
        found = groups.gradient_norms() if groups else {}
        self.run.prepared.clip()
        return {f"gradient_norm/{group}": norm for group, norm in found.items()}
