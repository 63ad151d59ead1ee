"""What a run takes from its scores: the fundamental set, checked by removal, and levels for a pull by importance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..controls.control_sets import control_set, permuted_levels
from ..controls.removal import check_removal, choose_fraction
from ..data.batches import Batch, order
from ..distributed import collectives
from ..files import read_json, write_json
from ..method.fundamental_set import FundamentalSet
from ..method.gradual_pruning import scores_after_training
from ..method.importance import score_importance
from ..method.levels import Levels, levels_of, load_levels, save_levels
from ..method.scores import Scores, load_scores, save_scores
from ..method.selection import select_fundamental
from ..objectives.base import Metrics
from .context import RunContext, micro_batch
from .custom_optimizer import group_values, set_group_values

log = logging.getLogger(__name__)

TrainSteps = Callable[[range, int, str], None]  # (steps, number of all steps, label): trains without penalty


@dataclass(frozen=True)
class Importance:
    """What a run takes from its scores.

    Attributes:
        fundamental: the fundamental set; None if the method uses none.
        levels: levels of the weights; None if no pull depends on them.
    """

    fundamental: FundamentalSet | None = None
    levels: Levels | None = None


def find_importance(run: RunContext, train: TrainSteps) -> Importance:
    """Finds set and levels, or loads those of an earlier start. Scores the weights once at most. Collective.

    Args:
        run: the context of the run.
        train: trains without penalty, as (steps, number of all steps, label); used if scoring follows a training
            (`importance.after_epochs`).
    """
    config = run.config
    known: list[Scores] = []

    def scores() -> Scores:
        if not known:
            known.append(_scores(run, train))
        return known[0]

    if not config.uses_scores:
        return Importance()
    if config.until == "score":
        scores()
        return Importance()
    levels = _levels(run, scores) if config.optimizer.pull_by_importance else None
    return Importance(find_fundamental(run, scores) if config.uses_set else None, levels)


def _levels(run: RunContext, scores: Callable[[], Scores]) -> Levels:
    writer = run.writer
    if collectives.on_every_rank(writer.levels.exists()):
        writer.require_own(writer.levels)
        return load_levels(writer.levels, run.model)
    levels = levels_of(scores())
    if run.config.optimizer.pull_levels == "permuted":
        levels = permuted_levels(run.model, levels, run.config.seed)
    save_levels(levels, writer.levels)
    writer.keep(writer.levels)
    return levels


def find_fundamental(run: RunContext, scores_of: Callable[[], Scores]) -> FundamentalSet:
    """Finds the fundamental set, or loads the set of an earlier attempt. Collective.

    Args:
        run: the context of the run.
        scores_of: returns the scores.
    """
    writer, settings = run.writer, run.config.selection
    wants_check = bool(run.config.removal.fractions) and settings.kind == "top"
    complete = writer.fundamental.exists() and (writer.removal.exists() or not wants_check)
    if collectives.on_every_rank(complete):
        writer.require_own(writer.fundamental)
        with collectives.agreed("load the fundamental set"):
            if writer.removal.exists():
                read_json(writer.removal, "base", "removed")
            return FundamentalSet.load(writer.fundamental)
    scores = scores_of()
    chance = run.objective.chance()
    if scores.loss >= 0.95 * chance.get("loss", math.inf):
        log.warning(
            "the loss while scoring (%.3f) is at chance level (%.3f): scores mean little", scores.loss, chance["loss"]
        )
    writer.phase("select")
    fundamental = select(run, scores)
    if wants_check:
        writer.phase("removal_check")
        log.info("removal check: the model is evaluated without sets of weights (removal.fractions; [] leaves it out)")
        check = check_removal(run.model, scores, run.config.removal.fractions, lambda: _validate(run), run.config.seed)
        if run.world.is_first:
            write_json(writer.removal, {"chance": chance, **check})
    fundamental.save(writer.fundamental)
    writer.keep(writer.fundamental)
    return fundamental


def _validate(run: RunContext) -> Metrics:
    return run.evaluate(run.validation, run.config.removal.num_samples).metrics


def select(run: RunContext, scores: Scores) -> FundamentalSet:
    """Selects the set, and stores with it how it was selected. Collective.

    Args:
        run: the context of the run; its `selection` says how.
        scores: importance scores of the eligible weights.
    """
    selection, seed = run.config.selection, run.config.seed
    extra: dict[str, Any] = {}
    fraction = selection.fraction
    if fraction == "auto":
        fraction, extra["fraction_curve"] = choose_fraction(run.model, scores, lambda: _validate(run), seed)
        log.info("selection.fraction: %g of the eligible weights", fraction)
    top = select_fundamental(scores, fraction, scope=selection.scope, floor=selection.floor, cap=selection.cap)
    chosen = control_set(run.model, scores, top, selection.kind, seed)
    if selection.kind != "top" and scores.criterion != "random":  # with random scores `top` is itself a random set
        extra["jaccard_with_top"] = top.jaccard(chosen)
    return chosen.with_extra(score_loss=None if math.isnan(scores.loss) else scores.loss, seed=seed, **extra)


def _scores(run: RunContext, train: TrainSteps) -> Scores:
    """Scores the weights, after a training if the run says so, or loads scores; random ones if no others are needed."""
    run.writer.phase("score")
    settings, selection = run.config.importance, run.config.selection
    needed = run.config.until == "score" or selection.fraction == "auto" or run.config.optimizer.pull_by_importance
    if selection.kind == "random" and not needed:
        return score_importance(
            run.model,
            None,
            None,
            head=run.pretrained.head,
            criterion="random",
            eligible=settings.eligible,
            seed=run.config.seed,
        )
    return score_or_load(run, (lambda: _score_after_training(run, train)) if settings.after_epochs else None)


def score_or_load(run: RunContext, make: Callable[[], Scores] | None = None) -> Scores:
    """Loads the scores of an earlier run, or scores the weights. Saves them only if the run ends after scoring. Collective.

    Args:
        run: the context of the run.
        make: scores the weights; None: as they are.
    """
    run.writer.phase("score")
    file = run.writer.scores
    if collectives.on_every_rank(file.exists()):
        if file.parent == run.writer.path:
            run.writer.require_own(file)
        return load_scores(file, run.model)
    scores = make() if make else score(run)
    if run.config.until == "score":
        save_scores(scores, file)
        run.writer.keep(file)
    return scores


def _score_after_training(run: RunContext, train: TrainSteps) -> Scores:
    """Scores after a training that logs and saves nothing: a run stopped meanwhile repeats this training."""
    settings, fraction = run.config.importance, run.config.selection.fraction
    total = settings.after_epochs * run.steps_per_epoch

    def train_round(index: int) -> None:
        steps = range(index * total // settings.rounds, (index + 1) * total // settings.rounds)
        train(steps, total, f"{settings.after_epochs // settings.rounds} epochs before scoring")

    before = group_values(run.prepared.optimizer)
    scores = scores_after_training(
        run.model,
        run.prepared.optimizer,
        rounds=settings.rounds,
        fraction=0.0 if fraction == "auto" else fraction,
        train=train_round,
        score=lambda: score(run),
    )
    set_group_values(run.prepared.optimizer, before)
    return scores


class _ScoreItems:
    """This rank's micro-batches of all score batches, read as they are needed. Their number is known ahead."""

    def __init__(self, run: RunContext, batches: list[list[int]]) -> None:
        """
        Args:
            run: the context of the run.
            batches: the examples of each score batch, by position in the training split.
        """
        self._run, self._batches = run, batches

    def __len__(self) -> int:
        limit, shares = self._run.config.train.micro_batch, [len(b) // self._run.world.data_ranks for b in self._batches]
        return sum(share // micro_batch(limit, share) for share in shares)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._run.progress_bar(self._batches, "score"):
            yield from self._run.micro_batches(batch, self._run.train, draw=0)


def score(run: RunContext) -> Scores:
    """Scores the weights as they are. Collective.

    Args:
        run: the context of the run; its `importance` says how.
    """
    settings, size = run.config.importance, run.config.importance.score_batch
    indices = order(run.config.seed, 0, len(run.train))[: settings.num_samples]
    batches = [indices[first : first + size] for first in range(0, len(indices), size)]
    items = _ScoreItems(run, batches)
    share = size // run.world.data_ranks
    return score_importance(
        run.model,
        list(items) if settings.criterion == "obs" else items,  # obs needs more than one pass
        run.loss,
        head=run.pretrained.head,
        criterion=settings.criterion,
        eligible=settings.eligible,
        accumulation=share // micro_batch(run.config.train.micro_batch, share),
        seed=run.config.seed,
        block=settings.block,
        damping=settings.damping,
    )
