"""A rank's whole life: joins the others, carries out the run, leaves word of how it ended."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..config.checks import check_ranks
from ..config.schema import Config
from ..distributed import collectives
from ..distributed.world import World, joined_world
from ..errors import WorldError
from ..files import read_json
from ..runs.attempts import begin_attempt, note_failed_meeting, refuse_repetition
from ..runs.lock import locked
from ..runs.provenance import git_commit
from ..runs.stop import Stopped, listen_for_stop
from ..runs.writer import RunWriter
from .context import make_context
from .fine_tune import Trainer

log = logging.getLogger(__name__)


def train(config: Config) -> bool:
    """Returns True when the run is done, and False when it has stopped because it was asked to.

    Raises:
        DcftError: see `trainer.run`.
    """
    folder, first = Path(config.runs_dir) / config.name, os.environ.get("RANK", "0") == "0"
    refuse_repetition(folder)
    listen_for_stop()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with ExitStack() as stack:
            try:
                world = stack.enter_context(joined_world(config.timeout_s))
            except WorldError as error:
                note_failed_meeting(folder, error)
                raise
            run(config, world)
            if world.is_first and (folder / "summary.json").exists():
                from ..reports.model_card import write_card  # late: one rank draws pictures, once
                from ..reports.run_report import write_report

                if (folder / "model").is_dir():
                    write_card(folder / "model", config, read_json(folder / "summary.json"))
                print(f"report: {write_report(folder)}", flush=True)
    except Stopped as stopped:
        if first:
            print(f"stopped {stopped}, as asked; start it again to go on", flush=True)
        return False
    return True


def run(config: Config, world: World) -> dict[str, Any]:
    """Carries out a run, or what is left of it, and returns its summary (also in `summary.json`). Collective.

    Raises:
        DcftError: bad input, a missing package, a damaged file; see the errors of each step.
    """
    directory = RunWriter.of(config)
    with collectives.agreed("set-up"):
        check_ranks(config, world.world_size)
        directory.check(config)
    for done in (directory.summary, directory.estimate):
        if collectives.on_every_rank(done.exists()):
            log.info("%s is finished already: delete it to run it again", directory.path)
            return dict(read_json(done))
    with locked(directory.path, config.timeout_s):
        directory.open(config)
        former = begin_attempt(directory.path, directory.reached(), config.max_attempts)
        if former and former["ranks"] != world.world_size:
            log.info(
                "going on with %d ranks instead of %d: the global batch stays %d, by accumulation",
                world.world_size,
                former["ranks"],
                config.train.global_batch,
            )
        if config.start_from:
            log.info("%s: %s", config.start_from, directory.take_from(Path(config.start_from), config))
        commit = git_commit()  # the one that begins: the tree may change meanwhile
        directory.phase("setup")
        return Trainer(make_context(config, world, directory)).carry_out(commit)
