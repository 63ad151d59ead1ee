"""What happens to a run from outside: signals ahead of a limit, a second job, failures, starts; and where it stands.

All of it is kept in the run's directory, so that it can be read without access to the cluster:

lock              held by rank 0 of the job that is writing there
attempts.jsonl    a line for each start: time, step, ranks, nodes, Slurm job and restart count
errors/           a file for each rank that failed: what, where, when
progress.json     phase, step, steps, seconds a step
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from .errors import DcftError, PassingError, RunError, WorldError
from .files import read_json, read_lines, write_json

log = logging.getLogger(__name__)

REACHED = "reached"  # and what, is the phase of a run that was to go no further
AGAIN = 75  # exit code of `dcft status --verdict` where the run should be started again (EX_TEMPFAIL)
Verdict = Literal["finished", "again", "failed"]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


_signals: list[int] = []


def listen_for_stop() -> None:
    """From here on SIGUSR1 and SIGUSR2 ask this process to stop at its next step, instead of ending it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda got, frame: _signals.append(got))


def stop_requested() -> bool:
    """Whether such a signal came, or the file DCFT_STOP_FILE is there.

    A batch script that Slurm warns of a time limit or of preemption touches the file: a signal would end torchrun.
    """
    file = os.environ.get("DCFT_STOP_FILE")
    return bool(_signals) or (file is not None and os.path.exists(file))


class Stopped(Exception):
    """The run was asked to stop, and has left a checkpoint."""


@contextmanager
def owned(folder: Path, timeout_s: float) -> Iterator[None]:
    """Keeps any second job out of a run's directory for the block, and leaves word of the error that ends it. Collective.

    Raises:
        RunError: another job holds it. A former start of this job, cut off from the others, is waited for until its own
            collectives must have given up after `timeout_s`; others for half a minute at most.
    """
    from . import collectives  # late, as below: `dcft status` and `dcft --help` need no torch

    lock, began, held = None, time.monotonic(), True
    while held:
        with collectives.agreed("lock the run directory"):
            if collectives.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(folder, began, timeout_s)
        held = not any(got for (got,) in collectives.all_gather_ints([int(lock is not None)], what="lock"))
    if lock is not None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, {_job()}, since {now()} UTC")
        lock.flush()
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        note_error(folder, error)
        raise
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: Path, began: float, timeout_s: float) -> IO[str] | None:
    """The lock; None if it is to be tried again, after the other ranks have been told: they wait in a collective."""
    handle, pause = (folder / "lock").open("a+"), time.monotonic() + timeout_s / 4
    while (holder := _taken(handle)) and time.monotonic() < pause:
        if time.monotonic() > began + (timeout_s + 60 if _is_this_job(holder) else min(timeout_s / 2, 30)):
            handle.close()
            raise RunError(f"{folder} is being written by {holder}")
        time.sleep(0.2)
    if not holder:
        return handle
    handle.close()
    log.warning("waiting for %s, which is being written by %s", folder, holder)
    return None


def _taken(handle: IO[str]) -> str:
    """Takes the lock; or says who holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        handle.seek(0)
        return handle.read().strip() or "another job"


def _holder(folder: Path) -> str:
    """Who holds the lock; empty if nobody does."""
    if not (folder / "lock").exists():
        return ""
    with (folder / "lock").open("a+") as handle:
        return _taken(handle)


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {job}" if job else "no Slurm job"


def _is_this_job(holder: str) -> bool:
    """Whether an earlier start of the same Slurm job is meant."""
    return "SLURM_JOB_ID" in os.environ and f"{_job()}," in holder


def begin_attempt(folder: Path, at: str, limit: int) -> dict[str, Any] | None:
    """Writes down that the run starts, and what it goes on from; returns the start before, if any, on rank 0. Collective.

    Raises:
        RunError: `limit` starts have failed there already: it gets nowhere.
    """
    from . import collectives

    former: list[dict[str, Any]] = []
    with collectives.agreed("attempts"):
        if collectives.rank() == 0:
            former = attempts(folder)
            if _stuck(folder, former, at, limit):
                raise RunError(
                    f"{folder} was started {limit} times at {at} without getting further ({first_failure(folder)}): "
                    f"mend that, then delete {folder}/attempts.jsonl"
                )
            _note_attempt(folder, at, collectives.world_size())
    return next((start for start in reversed(former) if start["ranks"]), None)


def note_failed_meeting(folder: Path, error: WorldError) -> None:
    """For a start at which the ranks did not even meet: it counts, and its error is kept."""
    if os.environ.get("RANK", "0") == "0":
        before = attempts(folder)
        _note_attempt(folder, before[-1]["at"] if before else "the beginning", int(os.environ.get("WORLD_SIZE", 1)))
        note_error(folder, error)


def _note_attempt(folder: Path, at: str, ranks: int) -> None:
    entry = {"time": now(), "at": at, "ranks": ranks, "nodes": int(os.environ.get("SLURM_NNODES", 0)) or None, **_start()}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _start() -> dict[str, Any]:
    """What tells this start from others: Slurm's job and how often it was requeued."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}


def _stuck(folder: Path, starts: list[dict[str, Any]], at: str, limit: int) -> bool:
    """Whether `limit` of the last starts, all of them at `at`, failed: one that was preempted did not."""
    failed = 0
    for number, start in reversed(list(enumerate(starts, 1))):
        if start["at"] != at:
            break
        failed += bool(_error_files(folder, number))
    return failed >= limit


def attempts(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "attempts.jsonl")


def _error_files(folder: Path, attempt: int) -> list[Path]:
    return sorted((folder / "errors").glob(f"{attempt:05d}-*.json"))


def note_error(folder: Path, error: BaseException) -> None:
    """Leaves word of what ended this rank; never raises."""
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
        return


def refuse_repetition(folder: Path) -> None:
    """
    Raises:
        RunError: torchrun starts a rank again, though what ended the run will end it again.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) and _is_permanent(folder):
        raise RunError(f"not started again: {first_failure(folder)}")


def _is_permanent(folder: Path) -> bool:
    return any(e["permanent"] and e["attempt"] == len(attempts(folder)) for e in errors(folder))


def errors(folder: Path) -> list[dict[str, Any]]:
    """The errors of the last attempt that left any, first one first; a rank that only lost its peers comes last."""
    names = sorted(f.name for f in (folder / "errors").glob("*.json"))
    if not names:
        return []
    found = [read_json(folder / "errors" / name) for name in names if name.startswith(names[-1].split("-")[0])]
    return sorted(found, key=lambda e: (e["kind"] == WorldError.__name__, e["clock"]))


def first_failure(folder: Path) -> str:
    found = errors(folder)
    if not found:
        return ""
    e = found[0]
    more = f" (and {len(found) - 1} more ranks)" if len(found) > 1 else ""
    return f"rank {e['rank']} on {e['host']} at {e['time']} UTC: {e['kind']}: {e['message']}{more}"


def verdict(folder: Path, reached: str, limit: int, until: str = "train") -> tuple[Verdict, str]:
    """What a batch script should do after the ranks have ended, and why.

    Args:
        reached: what a start now would go on from.
        limit: failed starts in a row without progress after which the run counts as failed.
        until: the phase after which it was to end.
    """
    progress = folder / "progress.json"
    phase = read_json(progress)["phase"] if progress.exists() else ""
    if (folder / "summary.json").exists() or (folder / "estimate.json").exists() or phase == f"{REACHED} {until}":
        return "finished", "it is done"
    starts = attempts(folder)
    of_this_job = bool(starts) and {key: starts[-1][key] for key in _start()} == _start()
    if stop_requested():
        for file in _error_files(folder, len(starts)) if of_this_job else ():
            file.unlink()  # what ranks said while they were being ended: no failure
        return "again", f"it was asked to stop, and goes on from {reached}"
    if not of_this_job:
        holder = _holder(folder)
        if holder and not _is_this_job(holder):
            return "failed", f"it is being written by {holder}"
        _note_attempt(folder, reached, 0)  # it counts, or such starts would go on for ever
        starts = attempts(folder)
    if _is_permanent(folder):
        return "failed", first_failure(folder)
    if not _error_files(folder, len(starts)):
        ended = "it was ended from outside, or ran out of memory" if of_this_job else "its ranks did not start"
        note_error(folder, PassingError(f"{ended}: see the log"))
    if _stuck(folder, starts, reached, limit):
        return "failed", f"{limit} starts at {reached} got no further; {first_failure(folder)}"
    return "again", f"{first_failure(folder)}; it goes on from {reached}"


def status(folder: Path) -> str:
    """Where a run stands, in a few lines.

    Raises:
        RunError: there is no run.
    """
    if not (folder / "config.toml").exists():
        raise RunError(f"no run has begun in {folder}: a job may still be in the queue, or have failed before (see its log)")
    lines = []
    path, estimate = folder / "progress.json", folder / "estimate.json"
    if path.exists():
        p = read_json(path)
        line = f"{folder.name}: {p['phase']}"
        if p.get("steps"):
            line += f", step {p['step']} of {p['steps']}"
        if p.get("seconds_per_step") and p["phase"] == "train":
            line += f", {p['seconds_per_step']:.2f} s a step, {_span((p['steps'] - p['step']) * p['seconds_per_step'])} left"
        lines.append(f"{line} ({p.get('updated', 'unknown time')} UTC)")
    starts = attempts(folder)
    if starts:
        s = starts[-1]
        nodes = f" on {s['nodes']} nodes" if s["nodes"] else ""
        job = f", Slurm job {s['job']}, restart {s['restart']}" if s["job"] else ""
        lines.append(f"start {len(starts)}: {s['time']} UTC at {s['at']}, {s['ranks']} ranks{nodes}{job}")
    saved = sorted((folder / "checkpoints").glob("step_*"))
    lines.append(f"last checkpoint: step {int(saved[-1].name[5:])}" if saved else "no checkpoint yet")
    if estimate.exists():
        lines.append(estimate_text(read_json(estimate)))
    failure = first_failure(folder)
    if failure:
        lines.append(f"last failure: {failure}")
    return "\n".join(lines)


def estimate_text(e: dict[str, Any]) -> str:
    """What a run of `train.max_steps` found out about the whole run."""
    return (
        f"{e['seconds_per_step']:.3f} s a step; all {e['steps']:,} steps: {e['hours']:.2f} h, {e['device_hours']:.2f} "
        f"{e['device']}-hours; begun at {e['time']} they would end at {e['end']}"
    )


def _span(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
