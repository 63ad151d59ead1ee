"""One rank's entry point: join the other ranks, carry out the run, record how it ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.checks import check_ranks
from ..config.schema import Config
from ..config.trust import remember
from ..data.batches import is_of_worker, worker_error
from ..distributed import collectives
from ..distributed.world import World, joined_world
from ..errors import WorldError, counted
from ..files import read_json
from ..runs.attempts import begin_attempt, note_failed_meeting, refuse_repetition
from ..runs.folder import RunFolder
from ..runs.lock import locked
from ..runs.provenance import git_commit
from ..runs.stop import Stopped, listen_for_stop
from ..runs.writer import RunWriter, logging_only
from .context import make_context
from .fine_tune import Trainer
from .handshake import greet
from .packed_trial import try_packing
from .trackers import require_trackers

log = logging.getLogger(__name__)


def train(config: Config) -> bool:
    """Joins the other ranks, carries out the run, and writes its report. Every rank calls it.

    Args:
        config: configuration of the run.

    Returns:
        True if the run is done, False if it stopped because it was asked to.

    Raises:
        DcftError: the ranks do not meet, earlier attempts failed in the same way, or an error of `run`.
    """
    folder, first = Path(config.runs_dir) / config.name, os.environ.get("RANK", "0") == "0"
    refuse_repetition(folder)
    if config.private:
        os.umask(0o077)
    if first:
        remember(config)  # to start a training is the user's word for its code
    listen_for_stop()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with ExitStack() as stack:
            try:
                world = stack.enter_context(joined_world(config.timeout_s, folder))
            except WorldError as error:
                note_failed_meeting(folder, error)
                raise
            reported = (folder / "summary.json").exists() and (folder / "report.html").exists()
            run(config, world)
            if world.is_first and (folder / "summary.json").exists():
                from ..reports.model_card import write_card  # late imports: only rank 0 draws pictures, once
                from ..reports.render import test_line
                from ..reports.run_report import outcome_of, write_report

                summary = read_json(folder / "summary.json")
                if tested := test_line(summary):
                    print(tested, flush=True)
                with logging_only(folder / "report.html"):
                    print("\n".join(outcome_of(folder, summary, config, tested=False)).replace("`", ""), flush=True)
                    if (folder / "model").is_dir() and not (folder / "model/README.md").exists():
                        write_card(folder / "model", config, summary)
                    # One of a finished run may show examples, and is left alone.
                    print(f"report: {folder / 'report.html' if reported else write_report(folder)}", flush=True)
    except Stopped as stopped:
        if first:
            print(f"stopped {stopped}, as asked; start it again to go on", flush=True)
        return False
    return True


def run(config: Config, world: World) -> dict[str, Any]:
    """Carries out a run, or the phases of it that are not complete. Collective.

    Args:
        config: configuration of the run.
        world: the joined ranks.

    Returns:
        The run's summary, as in `summary.json`; its estimate with `train.max_steps`; {} if `until` ends it before training.

    Raises:
        DcftError: bad input, a missing package, or a damaged file.
        Stopped: the run was asked to stop.
    """
    writer = RunWriter.of(config)
    if (result := _earlier_result(writer)) is not None:
        with collectives.agreed("set-up"):
            writer.check(config)
        log.info("%s is finished already: another one needs another --name, or delete this one", writer.path)
        return result
    with locked(writer.path, config.timeout_s), collectives.explained("training"), _named_workers():
        writer.begin_anew(config)
        previous = begin_attempt(writer.path, writer.reached(), config.max_attempts)
        greet(config)  # under the lock, so that an error is recorded and the verdict is `failed`
        with collectives.agreed("set-up"):
            check_ranks(config, world.world_size)
            require_trackers(config.trackers if world.is_first else [])
            writer.check(config)
        writer.open(config)
        if previous and previous["ranks"] != world.world_size:
            log.info(
                "going on with %s instead of %d: the global batch stays %d, by accumulation",
                counted(world.world_size, "rank"),
                previous["ranks"],
                config.train.global_batch,
            )
        if config.start_from:
            log.info("%s: %s", config.start_from, writer.take_from(Path(config.start_from), config))
        commit = git_commit()  # now, since the working tree may change during the run
        writer.phase("setup")
        world = replace(world, together=config.sharding.tensor_parallel)
        context = make_context(config, world, writer)
        if config.data.packing:
            try_packing(context)
        return Trainer(context).carry_out(commit)


@contextmanager
def _named_workers() -> Iterator[None]:
    """Names the cause if a process that reads data ends while this one does something else."""
    try:
        yield
    except RuntimeError as error:
        if is_of_worker(error):
            raise worker_error(error) from error
        raise


def _earlier_result(folder: RunFolder) -> dict[str, Any] | None:
    """The summary or the estimate of an earlier start; None if there is none, or if it is damaged. Collective."""
    result = folder.result()
    if collectives.on_every_rank(result is not None):
        return result
    for file in (folder.summary, folder.estimate):
        if result is None and file.exists():
            log.warning("%s is damaged: it is made again from the checkpoints", file)
    return None
