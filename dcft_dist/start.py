"""A rank's whole life: joins the others, carries out the run, leaves word of how it ended."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path

from . import life
from .errors import WorldError
from .files import read_json
from .schema import Config
from .trainer import run
from .world import joined_world


def train(config: Config) -> bool:
    """Returns True when the run is done, and False when it has stopped because it was asked to.

    Raises:
        DcftError: see `trainer.run`.
    """
    folder, first = Path(config.runs_dir) / config.name, os.environ.get("RANK", "0") == "0"
    life.refuse_repetition(folder)
    life.listen_for_stop()
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with ExitStack() as stack:
            try:
                world = stack.enter_context(joined_world(config.timeout_s))
            except WorldError as error:
                life.note_failed_meeting(folder, error)
                raise
            run(config, world)
            if world.is_first and (folder / "summary.json").exists():
                from .card import write_card  # late: one rank draws pictures, once
                from .report import write_report

                if (folder / "model").is_dir():
                    write_card(folder / "model", config, read_json(folder / "summary.json"))
                print(f"report: {write_report(folder)}", flush=True)
    except life.Stopped as stopped:
        if first:
            print(f"stopped {stopped}, as asked; start it again to go on", flush=True)
        return False
    return True
