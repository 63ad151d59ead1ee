"""The fundamental set of a run: scores the weights, selects, and checks the selection by removal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from ..controls.control_sets import control_set
from ..controls.removal import check_removal, choose_fraction
from ..data.batches import order
from ..distributed import collectives
from ..files import write_json
from ..method.fundamental_set import FundamentalSet
from ..method.gradual_pruning import scores_after_training
from ..method.importance import score_importance
from ..method.scores import Scores, load_scores, save_scores
from ..method.selection import select_fundamental
from ..objectives.base import Metrics
from .context import RunContext, micro_batch

log = logging.getLogger(__name__)

TrainSteps = Callable[[range, int, str], None]  # (steps, number of all steps, what for): trains without penalty


def find_fundamental(run: RunContext, train: TrainSteps) -> FundamentalSet | None:
    """Finds the set, or loads that of an earlier attempt. None: the run was only to score. Collective.

    Args:
        train: for scores after a training.
    """
    directory, settings = run.writer, run.config.selection
    wants_check = bool(run.config.removal.fractions) and settings.kind == "top"
    done = directory.fundamental.exists() and (directory.removal.exists() or not wants_check)
    if collectives.on_every_rank(done):
        with collectives.agreed("load the fundamental set"):
            return FundamentalSet.load(directory.fundamental)
    scores = _scores(run, train)
    if run.config.until == "score":
        return None
    chance = run.objective.chance()
    if scores.loss >= 0.95 * chance.get("loss", math.inf):
        log.warning(
            "the loss while scoring (%.3f) is at chance level (%.3f): scores mean little", scores.loss, chance["loss"]
        )
    directory.phase("select")
    fundamental = _select(run, scores)
    if wants_check:
        directory.phase("removal_check")
        found = check_removal(run.model, scores, run.config.removal.fractions, lambda: _validate(run), run.config.seed)
        if run.world.is_first:
            write_json(directory.removal, {"chance": chance, **found})
    fundamental.save(directory.fundamental)
    return fundamental


def _validate(run: RunContext) -> Metrics:
    return run.evaluate(run.validation, run.config.removal.num_samples).metrics


def _select(run: RunContext, scores: Scores) -> FundamentalSet:
    """The set, with what else is known of it."""
    s, seed = run.config.selection, run.config.seed
    about: dict[str, Any] = {}
    fraction = s.fraction
    if fraction == "auto":
        fraction, about["fraction_curve"] = choose_fraction(run.model, scores, lambda: _validate(run), seed)
        log.info("selection.fraction: %g of the eligible weights", fraction)
    top = select_fundamental(scores, fraction, scope=s.scope, floor=s.floor, cap=s.cap)
    chosen = control_set(run.model, scores, top, s.kind, seed)
    if s.kind != "top" and scores.criterion != "random":  # a random set is found without scores: nothing was selected
        about["jaccard_with_top"] = top.jaccard(chosen)
    return chosen.with_extra(score_loss=None if math.isnan(scores.loss) else scores.loss, seed=seed, **about)


def _scores(run: RunContext, train: TrainSteps) -> Scores:
    """Scores the weights, or reads the scores of an earlier run; kept in a file if they are what was asked for."""
    run.writer.phase("score")
    settings, file, s = run.config.importance, run.writer.scores, run.config.selection
    if s.kind == "random" and s.fraction != "auto" and run.config.until != "score":  # no scores are needed
        return score_importance(
            run.model,
            None,
            None,
            head=run.pretrained.head,
            criterion="random",
            eligible=settings.eligible,
            seed=run.config.seed,
        )
    if collectives.on_every_rank(file.exists()):
        return load_scores(file, run.model)
    scores = _score_after_training(run, train) if settings.after_epochs else _score(run)
    if run.config.until == "score":
        save_scores(scores, file)
    return scores


def _score_after_training(run: RunContext, train: TrainSteps) -> Scores:
    """Nothing of it is logged or saved: a run that is stopped meanwhile starts it again."""
    settings, fraction = run.config.importance, run.config.selection.fraction
    total = settings.after_epochs * run.steps_per_epoch

    def one_round(turn: int) -> None:
        steps = range(turn * total // settings.rounds, (turn + 1) * total // settings.rounds)
        train(steps, total, f"{settings.after_epochs // settings.rounds} epochs before scoring")

    return scores_after_training(
        run.model,
        run.prepared.optimizer,
        rounds=settings.rounds,
        fraction=0.0 if fraction == "auto" else fraction,
        train=one_round,
        score=lambda: _score(run),
    )


def _score(run: RunContext) -> Scores:
    settings, size = run.config.importance, run.config.importance.score_batch
    wanted = order(run.config.seed, 0, len(run.train))[: settings.num_samples]
    parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    items = (item for part in run.progress_bar(parts, "score") for item in run.micro_batches(part, run.train, draw=0))
    ranks = run.world.world_size
    return score_importance(
        run.model,
        list(items) if settings.criterion == "obs" else items,  # it goes through them more than once
        run.loss,
        head=run.pretrained.head,
        criterion=settings.criterion,
        eligible=settings.eligible,
        accumulation=size // ranks // micro_batch(run.config, size, ranks),
        seed=run.config.seed,
        block=settings.block,
        damping=settings.damping,
    )
