"""After a run: moves its weights back towards their start, a set and the rest by different shares (`dcft interpolate`).

Three families of places have 25 candidates each: shares of the selected set and of the rest; the same for a random set that
matches it in tensors and magnitudes; and one share for all (WiSE-FT). Each family's place is chosen on validation data, and
tested once. No second training is made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.checks import check_ranks
from ..config.toml import load_config
from ..config.trust import require_trust
from ..controls.control_sets import control_set
from ..controls.interpolation import Way
from ..distributed import collectives
from ..distributed.world import World
from ..engines.find import find_engine
from ..engines.whole_tensors import weights_checksum
from ..errors import RunError
from ..files import append_line, objects_in, read_json, write_json
from ..method.fundamental_set import FundamentalSet
from ..objectives.base import Metrics, oriented
from ..runs.folder import RunFolder
from ..runs.lock import locked
from ..runs.writer import RunWriter
from .batch_norm import renew_statistics
from .context import RunContext, make_context
from .find_set import score_or_load, select
from .handshake import greet
from .places import FAMILIES, Place, can_interpolate, candidates, places
from .testing import run_tests
from .warm_up import warm_up_or_load

log = logging.getLogger(__name__)

_TESTED = ("test", "test_intervals", "external")

Sets = dict[str, FundamentalSet | None]  # by family; None: all weights go the same share


def interpolate(run: Path, world: World, trust: bool = False) -> dict[str, Any]:
    """Interpolates a finished run. Its folder `interpolation` becomes that of another finished run. Collective.

    Args:
        run: folder of the run.
        world: the joined ranks.
        trust: whether the code that the run names may be imported (see `config.trust`).

    Returns:
        The summary of the interpolated run. Its `"interpolation"` has the chosen shares of each family, their validation
        metrics and, if the run was tested, what `run_tests` returns.

    Raises:
        RunError: the run is not finished, or its method or its best epoch leaves nothing to interpolate.
        DcftError: see `make_context`.
    """
    folder = RunFolder(run)
    given, _ = folder.finished()
    require_trust(given, run, trust)
    folder.require_unaltered()
    if not can_interpolate(given):
        what = "importance.after_epochs" if given.importance.after_epochs else f"method = {given.method!r}"
        raise RunError(f"{run}: a run with {what} cannot be interpolated")
    if not folder.model.is_dir():
        raise RunError(f"{folder.model} is missing: it was deleted, or the run had checkpoint.keep_last = 0")
    words = ["--runs_dir", str(run), "--name", "interpolation", "--start_from", str(run), "--method", "dcft"]
    words += ["--selection.kind", "top", "--removal.fractions", "[]", "--until", "train"]
    pull = {"pull_to_start": "0.0", "pull_by_importance": "0.0", "pull_selective": "false", "pull_levels": "scores"}
    words += [word for key, value in pull.items() for word in (f"--optimizer.{key}", value)]
    config = load_config(run / "config.toml", words)
    writer = RunWriter.of(config)
    if collectives.on_every_rank((result := writer.result()) is not None):
        log.info("%s: interpolated already: delete %s to do it again", run, writer.path)
        return result or {}
    with locked(writer.path, config.timeout_s), collectives.explained("interpolation"):
        greet(config)
        with collectives.agreed("set-up"):
            check_ranks(config, world.world_size)
            writer.check(config)
        writer.open(config)
        writer.take_from(run, config)
        if given.start_from and (Path(given.start_from) / writer.scores.name).is_file():
            writer.take_from(Path(given.start_from), config)  # scores under the same head
        writer.phase("setup")
        context = make_context(config, replace(world, together=config.sharding.tensor_parallel), writer)
        warm_up_or_load(context)
        way = Way(context.model, context.pretrained.head)
        selected, random = _sets(context)
        context.pretrained.load(context.model, folder.model)
        way.ended()
        if not way.length():
            raise RunError(f"{run}: its best epoch is 0, so the weights have gone nowhere: there is nothing to interpolate")
        return _choose(context, way, selected, random, read_json(folder.summary))


def _sets(run: RunContext) -> tuple[FundamentalSet, FundamentalSet]:
    """The selected set and the random one that matches it. Scores are those of the start, under the warmed-up head."""
    scores = score_or_load(run)
    run.writer.phase("select")
    top = select(run, scores)
    random = control_set(run.model, scores, top, "random_magnitude", run.config.seed)
    return top, random


def _choose(
    run: RunContext, way: Way, selected: FundamentalSet, random: FundamentalSet, before: dict[str, Any]
) -> dict[str, Any]:
    """Chooses each family's place, tests it, and exports the model at the place of the selected set."""
    writer = run.writer
    sets: Sets = {"selected": selected, "random": random, "diagonal": None}
    writer.phase("interpolate")
    found = _validated(run, way, sets, writer.plane)
    chosen = {family: max(candidates(family), key=lambda place: _rank(run, found[place], place)) for family in FAMILIES}
    writer.phase("test")
    families = {}
    for family, (owner, on_set, on_rest) in chosen.items():
        with _there(run, way, sets[owner], on_set, on_rest):
            tested = run_tests(run, writer.path, f"_{family}")
            there = {"movement": way.length(), "weights_checksum": weights_checksum(run.model)}
            if family == "selected":
                run.pretrained.save(run.model, writer.model)
        row = {"on_set": on_set, "on_rest": on_rest, "validation": found[owner, on_set, on_rest], "set": owner}
        families[family] = row | there | tested
    writer.phase("done")
    mine = families["selected"]
    summary = before | {
        "name": f"{before['name']}/interpolation",
        "engine": run.config.engine,
        "ranks": run.world.world_size,
        "removal": None,
        "validation": mine["validation"],
        "test": mine.get("test"),
        "test_intervals": mine.get("test_intervals"),
        "external": mine.get("external", {}),
        "seconds": before["seconds"] | {f"interpolation, {phase}": value for phase, value in writer.seconds.items()},
        "weights_checksum": mine["weights_checksum"],
        "interpolation": {
            "metric": run.metric,
            "families": families,
            "end": {"validation": found["diagonal", 1.0, 1.0], **{key: before.get(key) for key in _TESTED}},
            "criterion": selected.info.criterion,
            "fraction": selected.fraction,
            "jaccard_of_random": selected.jaccard(random),
        },
    }
    selected.save(writer.model / writer.fundamental.name)
    with collectives.agreed("write the results"):
        if run.world.is_first:
            run.pretrained.save_description(writer.model)
            write_json(writer.summary, summary | {"files": writer.checksums()})
    return summary


def _rank(run: RunContext, metrics: Metrics, place: Place) -> tuple[float, float, float]:
    """Higher is better: the metric that chooses epochs, then the loss, then how far the weights still are."""
    return oriented(run.metric, metrics[run.metric]), -metrics["loss"], place[1] + place[2]


def _validated(run: RunContext, way: Way, sets: Sets, plane: Path) -> dict[Place, Metrics]:
    """Validation metrics of every place. Those of an earlier start are read from the file."""
    known = objects_in(plane, "family", "on_set", "on_rest", "metrics") if run.world.is_first and plane.exists() else []
    text = collectives.broadcast_text(json.dumps(known), 0, what="places of an earlier start")
    found: dict[Place, Metrics] = {}
    for row in json.loads(text):
        place, metrics = (row["family"], row["on_set"], row["on_rest"]), row["metrics"]
        if place in places() and isinstance(metrics, dict) and metrics.keys() >= {run.metric, "loss"}:
            found[place] = metrics
    todo = [place for place in places() if place not in found]
    for family, on_set, on_rest in run.progress_bar(todo, "interpolate"):
        with _there(run, way, sets[family], on_set, on_rest):
            metrics = run.validate(f"at the place {on_set:g}, {on_rest:g}")
        found[family, on_set, on_rest] = metrics
        with collectives.agreed("write the plane"):
            if run.world.is_first:
                append_line(plane, {"family": family, "on_set": on_set, "on_rest": on_rest, "metrics": metrics})
    return found


@contextmanager
def _there(run: RunContext, way: Way, chosen: FundamentalSet | None, on_set: float, on_rest: float) -> Iterator[None]:
    """Inside, the weights are at a place, with statistics of batch normalisation from the training data."""
    buffers = [(buffer, buffer.clone()) for buffer in find_engine(run.model).module.buffers()]
    way.go(chosen, on_set, on_rest)
    if (on_set, on_rest) != (1.0, 1.0):
        renew_statistics(run)
    try:
        yield
    finally:
        way.back()
        for buffer, values in buffers:
            buffer.copy_(values)
