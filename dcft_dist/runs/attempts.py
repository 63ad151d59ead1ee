"""The starts of a run and their failures: `attempts.jsonl` and `errors/`."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import DcftError, RunError, WorldError
from ..files import append_line, read_json_or, read_lines, write_json

# A start with a damaged line.
_UNKNOWN: dict[str, Any] = {"time": "unknown time", "at": "an unknown point", "ranks": 0, "job": "unknown", "restart": -1}
_UNKNOWN |= {"nodes": None}

_RECORD = ("time", "clock", "rank", "host", "kind", "message", "permanent", "attempt")  # keys of an error's file


def now() -> str:
    """The current time in UTC, as `2026-01-31 23:59:59`."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def begin_attempt(folder: Path, at: str, limit: int) -> dict[str, Any] | None:
    """Records a start of the run in `attempts.jsonl`. Collective.

    Args:
        folder: the run's directory.
        at: the point that the run continues from, in words (`RunFolder.reached`).
        limit: number of failed starts in a row at `at` after which the run is not started again.

    Returns:
        On rank 0 the previous start at which ranks met, None if there is none. None on the other ranks.

    Raises:
        RunError: `limit` starts at `at` have failed already.
    """
    from ..distributed import collectives

    previous: list[dict[str, Any]] = []
    with collectives.agreed("attempts"):
        if collectives.rank() == 0:
            previous = attempts(folder)
            if is_stuck(folder, previous, at, limit):
                raise RunError(
                    f"{folder} was started {limit} times at {at} without progress ({first_failure(folder)}): "
                    f"fix the cause, then delete {folder}/attempts.jsonl"
                )
            note_attempt(folder, at, collectives.world_size())
    return next((start for start in reversed(previous) if start["ranks"]), None)


def note_failed_meeting(folder: Path, error: WorldError) -> None:
    """Records a start at which the ranks did not meet, and its error. Such a start counts as failed."""
    if os.environ.get("RANK", "0") == "0":
        previous = attempts(folder)
        with suppress(OSError):  # a full disk; the error itself is told anyway
            note_attempt(folder, previous[-1]["at"] if previous else "the beginning", int(os.environ.get("WORLD_SIZE", 1)))
        note_error(folder, error)


def note_attempt(folder: Path, at: str, ranks: int) -> None:
    """Appends a start to `attempts.jsonl`.

    Args:
        folder: the run's directory; created if it does not exist.
        at: the point that the run continues from, in words.
        ranks: number of ranks; 0 if the ranks did not begin.
    """
    entry = {
        "time": now(),
        "at": at,
        "ranks": ranks,
        "nodes": int(os.environ.get("SLURM_NNODES", 0)) or None,
        **this_start(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder / "attempts.jsonl", entry)


def this_start() -> dict[str, Any]:
    """Identifies this start: Slurm's job id, and how often Slurm has requeued the job."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}


def is_stuck(folder: Path, starts: list[dict[str, Any]], at: str, limit: int) -> bool:
    """Whether the last starts, all of them at `at`, include at least `limit` failures. A preempted start is no failure."""
    failed = 0
    for number, start in reversed(list(enumerate(starts, 1))):
        if start["at"] != at:
            break
        failed += bool(error_files(folder, number))
    return failed >= limit


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first: time, at, ranks, nodes, job, restart. A damaged line still counts as a start."""
    try:
        rows = read_lines(folder / "attempts.jsonl", damaged=_UNKNOWN)
    except OSError:
        return []
    return [row if isinstance(row, dict) and _UNKNOWN.keys() <= row.keys() else _UNKNOWN for row in rows]


def error_files(folder: Path, attempt: int) -> list[Path]:
    """Error files of one start, sorted by rank. The first start has number 1."""
    return sorted((folder / "errors").glob(f"{attempt:05d}-*.json"))


def note_error(folder: Path, error: BaseException) -> bool:
    """Saves the error that ended this rank to `errors/`. Never raises; returns whether the error was written."""
    rank = int(os.environ.get("RANK", 0))
    text = str(error).strip()
    try:
        attempt = len(attempts(folder))
        record = {
            "time": now(),
            "clock": time.time(),
            "rank": rank,
            "host": socket.gethostname(),
            "kind": type(error).__name__,
            "message": text.splitlines()[0] if text else "",
            "permanent": isinstance(error, DcftError) and error.exit_code == 2,
            "attempt": attempt,
        }
        write_json(folder / "errors" / f"{attempt:05d}-rank{rank:05d}.json", record)
    except (OSError, ValueError):
        return False
    return True


def refuse_repetition(folder: Path) -> None:
    """Stops torchrun from starting a rank again after a permanent error.

    Raises:
        RunError: torchrun has restarted this rank, and the error that ended the run would occur again.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) and is_permanent(folder):
        raise RunError(f"not started again: {first_failure(folder)}")


def is_permanent(folder: Path) -> bool:
    """Whether the last start left an error that another start cannot avoid, such as a wrong configuration."""
    return any(e["permanent"] and e["attempt"] == len(attempts(folder)) for e in errors(folder))


def errors(folder: Path) -> list[dict[str, Any]]:
    """The errors of the last start that left any.

    Returns:
        Records sorted by time. Errors of ranks that only lost contact to others (`WorldError`) come last.
    """
    names = sorted(f.name for f in (folder / "errors").glob("*.json"))
    if not names:
        return []
    last = [name for name in names if name.startswith(names[-1].split("-")[0])]
    records = [read_json_or(folder / "errors" / name, None, *_RECORD) for name in last]
    whole = [record for record in records if record is not None and isinstance(record["clock"], float | int)]
    return sorted(whole, key=lambda e: (e["kind"] == WorldError.__name__, e["clock"]))


def first_failure(folder: Path) -> str:
    """One line about the first of the last `errors`: rank, host, time, message. Empty if there is none."""
    records = errors(folder)
    if not records:
        return ""
    first = records[0]
    others = f" (and {len(records) - 1} more ranks)" if len(records) > 1 else ""
    return f"rank {first['rank']} on {first['host']} at {first['time']} UTC: {first['kind']}: {first['message']}{others}"
