"""What a run was begun with: code, packages, data, splits and weights, compared at each later start.

`facts.json` keeps what the first start had, and what has changed since. Other data or weights are an error. Other code or
packages are a warning, which the run's summary repeats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ..distributed.handshake import Facts, differences
from ..errors import MismatchError
from ..files import read_json, write_json
from .attempts import now

log = logging.getLogger(__name__)

_MAY_CHANGE = ("version of ", "code of ")


def compare_with_first_start(file: Path, facts: Facts) -> list[str]:
    """Compares facts with those of the run's first start. No communication; it writes nothing.

    Facts that only one of the two starts has are not compared: another engine has other ones.

    Args:
        file: `facts.json` of the run; need not exist.
        facts: what this start has.

    Returns:
        What may change, and has: "version of torch: 2.13.0, before 2.12.1".

    Raises:
        MismatchError: something that may not change has changed; the message names the first.
    """
    first: Mapping[str, str] = read_json(file)["first"] if file.exists() else {}
    changed = [(k, new, old) for k, new, old in differences(facts, first) if new is not None and old is not None]
    for key, _, _ in changed:
        if not key.startswith(_MAY_CHANGE):
            raise MismatchError(
                f"{file.parent} was begun with another {key}: put back what it was begun with, or give a new --name"
            )
    return [key if new.startswith("#") else f"{key}: {new}, before {old}" for key, new, old in changed]


def note_start(file: Path, facts: Facts, changes: list[str]) -> None:
    """Writes the facts of a run's first start, and what has changed at this one. One process calls it.

    Args:
        file: `facts.json` of the run.
        facts: what this start has.
        changes: as `compare_with_first_start` returned them.
    """
    kept = read_json(file) if file.exists() else {"first": {}, "changes": []}
    kept["first"] = {**facts, **kept["first"]}  # a start under another engine adds facts of its own
    if changes and (not kept["changes"] or kept["changes"][-1]["changed"] != changes):
        log.warning("since the run began, this has changed: %s", "; ".join(changes))
        kept["changes"].append({"time": now(), "changed": changes})
    write_json(file, kept)


def changes_since_begin(file: Path) -> list[str]:
    """Everything that has changed between the starts of a run, without repetitions."""
    notes = read_json(file)["changes"] if file.exists() else []
    return list(dict.fromkeys(text for note in notes for text in note["changed"]))
