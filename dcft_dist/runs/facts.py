"""What a run was begun with: code, packages, data, splits and weights, compared at each later start.

`facts.json` keeps what the first start had, and what has changed since. Other data or weights are an error. Other code or
packages are a warning, which the run's summary repeats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..distributed.handshake import Facts, differences
from ..errors import CheckpointError, DamagedError, MismatchError
from ..files import read_json, write_json
from ..tensor_file import stored_checksum
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
    first: Mapping[str, str] = _kept(file)["first"]
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
    kept = _kept(file)
    kept["first"] = {**facts, **kept["first"]}  # a start under another engine adds facts of its own
    if changes and (not kept["changes"] or kept["changes"][-1]["changed"] != changes):
        log.warning("since the run began, this has changed: %s", "; ".join(changes))
        kept["changes"].append({"time": now(), "changed": changes})
    write_json(file, kept)


def note_file(file: Path, result: Path) -> None:
    """Writes down which file a run has made. One process calls it.

    Args:
        file: `facts.json` of the run.
        result: the file, written by `TensorFile`.
    """
    kept = _kept(file)
    kept["files"] = {**kept.get("files", {}), result.name: stored_checksum(result)}
    write_json(file, kept)


def require_own(file: Path, result: Path) -> None:
    """Checks that a file is the one that the run has made, as far as that was written down.

    Raises:
        CheckpointError: it is another, though it may be whole.
    """
    own = _kept(file).get("files", {}).get(result.name)
    if own is not None and own != stored_checksum(result):
        raise CheckpointError(f"{result} is not the file that this run made: restore it, or delete it to make it again")


def _kept(file: Path) -> dict[str, Any]:
    """The content of `facts.json`.

    Raises:
        DamagedError: it is damaged.
    """
    try:
        return dict(read_json(file, "first", "changes")) if file.exists() else {"first": {}, "changes": []}
    except DamagedError as error:
        raise DamagedError(
            f"{error}: restore it; without it (delete it) the run goes on, but nothing can be compared with its beginning"
        ) from error


def changes_since_begin(file: Path) -> list[str]:
    """Everything that has changed between the starts of a run, without repetitions."""
    notes = _kept(file)["changes"]
    return list(dict.fromkeys(text for note in notes for text in note["changed"]))
