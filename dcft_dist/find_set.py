"""The fundamental set of a run: scores the weights, selects, and checks the selection by removal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from . import collectives
from .controls import control_set
from .data import order
from .files import write_json
from .fundamental import FundamentalSet
from .importance import Scores, score_importance
from .job import Job, micro_batch
from .objective import Metrics
from .prior import scores_after_training
from .removal import check_removal, choose_fraction
from .score_file import load_scores, save_scores
from .selection import select_fundamental

log = logging.getLogger(__name__)
TrainSteps = Callable[[range, int, str], None]  # (steps, number of all steps, what for): trains without penalty


def find_fundamental(job: Job, train: TrainSteps) -> FundamentalSet | None:
    """Finds the set, or loads that of an earlier attempt. None: the run was only to score. Collective.

    Args:
        train: for scores after a training.
    """
    directory, settings = job.directory, job.config.selection
    wants_check = bool(job.config.removal.fractions) and settings.kind == "top"
    done = directory.fundamental.exists() and (directory.removal.exists() or not wants_check)
    if collectives.on_every_rank(done):
        with collectives.agreed("load the fundamental set"):
            return FundamentalSet.load(directory.fundamental)
    scores = _scores(job, train)
    if job.config.until == "score":
        return None
    chance = job.objective.chance()
    if scores.loss >= 0.95 * chance.get("loss", math.inf):
        log.warning(
            "the loss while scoring (%.3f) is at chance level (%.3f): scores mean little", scores.loss, chance["loss"]
        )
    directory.phase("select")
    fundamental = _select(job, scores)
    if wants_check:
        directory.phase("removal_check")
        found = check_removal(job.model, scores, job.config.removal.fractions, lambda: _validate(job), job.config.seed)
        if job.world.is_first:
            write_json(directory.removal, {"chance": chance, **found})
    fundamental.save(directory.fundamental)
    return fundamental


def _validate(job: Job) -> Metrics:
    return job.evaluate(job.validation, job.config.removal.num_samples).metrics


def _select(job: Job, scores: Scores) -> FundamentalSet:
    """The set, with what else is known of it."""
    s, seed = job.config.selection, job.config.seed
    about: dict[str, Any] = {}
    fraction = s.fraction
    if fraction == "auto":
        fraction, about["fraction_curve"] = choose_fraction(job.model, scores, lambda: _validate(job), seed)
        log.info("selection.fraction: %g of the eligible weights", fraction)
    top = select_fundamental(scores, fraction, scope=s.scope, floor=s.floor, cap=s.cap)
    chosen = control_set(job.model, scores, top, s.kind, seed)
    if s.kind != "top" and scores.criterion != "random":  # a random set is found without scores: nothing was selected
        about["jaccard_with_top"] = top.jaccard(chosen)
    return chosen.with_extra(score_loss=None if math.isnan(scores.loss) else scores.loss, seed=seed, **about)


def _scores(job: Job, train: TrainSteps) -> Scores:
    """Scores the weights, or reads the scores of an earlier run; kept in a file if they are what was asked for."""
    job.directory.phase("score")
    settings, file, s = job.config.importance, job.directory.scores, job.config.selection
    if s.kind == "random" and s.fraction != "auto" and job.config.until != "score":  # no scores are needed
        return score_importance(
            job.model,
            None,
            None,
            head=job.pretrained.head,
            criterion="random",
            eligible=settings.eligible,
            seed=job.config.seed,
        )
    if collectives.on_every_rank(file.exists()):
        return load_scores(file, job.model)
    scores = _score_after_training(job, train) if settings.after_epochs else _score(job)
    if job.config.until == "score":
        save_scores(scores, file)
    return scores


def _score_after_training(job: Job, train: TrainSteps) -> Scores:
    """Nothing of it is logged or saved: a run that is stopped meanwhile starts it again."""
    settings, fraction = job.config.importance, job.config.selection.fraction
    total = settings.after_epochs * job.steps_per_epoch

    def one_round(turn: int) -> None:
        steps = range(turn * total // settings.rounds, (turn + 1) * total // settings.rounds)
        train(steps, total, f"{settings.after_epochs // settings.rounds} epochs before scoring")

    return scores_after_training(
        job.model,
        job.prepared.optimizer,
        rounds=settings.rounds,
        fraction=0.0 if fraction == "auto" else fraction,
        train=one_round,
        score=lambda: _score(job),
    )


def _score(job: Job) -> Scores:
    settings, size = job.config.importance, job.config.importance.score_batch
    wanted = order(job.config.seed, 0, len(job.train))[: settings.num_samples]
    parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    items = (item for part in job.progress_bar(parts, "score") for item in job.micro_batches(part, job.train, draw=0))
    ranks = job.world.world_size
    return score_importance(
        job.model,
        list(items) if settings.criterion == "obs" else items,  # it goes through them more than once
        job.loss,
        head=job.pretrained.head,
        criterion=settings.criterion,
        eligible=settings.eligible,
        accumulation=size // ranks // micro_batch(job.config, size, ranks),
        seed=job.config.seed,
        block=settings.block,
        damping=settings.damping,
    )
