"""Status of a run, and the decision whether a batch script starts it again.

The status comes from these files in the run's directory alone, so it needs no access to the cluster:

lock              held by rank 0 of the job that writes to the directory
attempts.jsonl    one line for each start: time, point of the run, ranks, nodes, Slurm job, restart count
errors/           one file for each rank that failed: error, host, time
progress.json     phase, step, number of steps, seconds per step

The decision also uses the stop request and Slurm's environment variables.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError, TemporaryError, counted, listing
from ..files import FULL, read_json_or, temporary_name, write_atomic
from .attempts import attempts, error_files, first_failure, is_permanent, is_stuck, note_attempt, note_error, this_start
from .folder import ESTIMATE_KEYS, RunFolder, runs_in
from .lock import is_this_job, lock_holder
from .stop import stop_requested

REACHED = "reached"  # phase prefix: `reached score` means that the run was configured to end after scoring


AGAIN = 75  # exit code of `dcft status --verdict`: start the run again (EX_TEMPFAIL)


Verdict = Literal["finished", "again", "failed"]


_ASKED = "it was asked to stop, and goes on from {}"


def run_verdict(folder: Path, reached: str, limit: int, until: str = "train") -> tuple[Verdict, str]:
    """Decides what a batch script does after the ranks have ended.

    Call it once for each start, inside the batch script. If the start left no record, this function writes one, so that
    the start counts. After a request to stop it deletes the errors of the start, since they are no failures.

    Args:
        folder: the run's directory.
        reached: the point that the next start would continue from, in words (`RunFolder.reached`).
        limit: number of failed starts in a row at `reached` after which the run counts as failed.
        until: the last phase that the configuration asks for: `score`, `select` or `train`.

    Returns:
        The verdict and its reason in words. Verdicts: `finished` (the run is complete), `again` (start the run again) and
        `failed` (do not start it again).
    """
    phase = read_json_or(folder / "progress.json", {}, "phase").get("phase", "")
    if RunFolder(folder).result() is not None or phase == f"{REACHED} {until}":
        return "finished", "it is done"
    starts = attempts(folder)
    of_this_job = bool(starts) and {key: starts[-1][key] for key in this_start()} == this_start()
    if stop_requested():
        for file in error_files(folder, len(starts)) if of_this_job else ():
            with suppress(OSError):
                file.unlink()  # errors of ranks that the stop ended: no failures
        return "again", _ASKED.format(reached)
    if of_this_job and phase == "stopped" and not error_files(folder, len(starts)):  # by a signal, which is no failure
        return "again", _ASKED.format(reached)
    if not of_this_job:
        holder = lock_holder(folder)
        if holder and not is_this_job(holder):
            return "failed", f"it is being written by {holder}"
        try:
            note_attempt(folder, reached, 0)  # count it; otherwise such starts would repeat forever
        except OSError as error:
            return _without_record(folder, starts, reached, limit, error)
        starts = attempts(folder)
    if is_permanent(folder):
        return "failed", first_failure(folder)
    if not error_files(folder, len(starts)):
        cause = "it was killed, or ran out of memory" if of_this_job else "its ranks did not start"
        if not note_error(folder, TemporaryError(f"{cause}: see the log")):
            return _without_record(folder, starts, reached, limit, OSError(errno.EIO, "no error could be recorded"))
    if is_stuck(folder, starts, reached, limit):
        return "failed", f"{limit} starts at {reached} made no progress; {first_failure(folder)}"
    return "again", f"{first_failure(folder)}; it goes on from {reached}"


def _without_record(
    folder: Path, starts: list[dict[str, Any]], reached: str, limit: int, error: OSError
) -> tuple[Verdict, str]:
    """The verdict if the run's directory cannot be written: Slurm's count of restarts stands for the missing records."""
    why = space_problem(folder) or f"{folder} cannot be written: {error.strerror}"
    this = this_start()
    of_this_job = [start for start in starts if start["job"] == this["job"]]
    here = list(takewhile(lambda start: start["at"] == reached, reversed(of_this_job)))
    tries = max(this["restart"] + 1 - len(of_this_job), len(here))
    if this["job"] is None or tries >= limit:
        return "failed", f"{why}; {tries} starts at {reached} could not be recorded"
    return "again", f"{why}; it goes on from {reached}"


def space_problem(folder: Path) -> str:
    """Whether the disk of a folder is full, or a small file cannot be written there; empty if all is well."""
    probe = temporary_name(folder / "space")
    try:
        write_atomic(probe, b" " * 65536)
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        if error.errno in FULL:
            return f"no space: the disk of {folder} is full, or your quota is used up"
    return ""


def status(folder: Path) -> str:
    """Status of a run in a few lines: phase, step, time left, last start, last checkpoint or results, last failure.

    Args:
        folder: the run's directory.

    Raises:
        RunError: no run has started there.
    """
    if not (folder / "config.toml").exists() and not attempts(folder):
        if (folder / "study.toml").exists():
            raise RunError(f"{folder} is a study: dcft table {folder} shows what is finished, and dcft compare goes on")
        if runs := runs_in(folder):
            raise RunError(f"{folder} has the runs {listing(run.name for run in runs)}: name one, as in {runs[0]}")
        raise RunError(f"no run has started in {folder}: the job may still be queued, or failed earlier (see its log)")
    lines, run = [], RunFolder(folder)
    progress = read_json_or(run.progress, None, "phase", "step")
    if progress is not None:
        lines.append(f"{folder.name}: {_point(progress, folder)}")
    elif run.progress.exists():
        lines.append(f"{folder.name}: unknown, since {run.progress.name} is damaged; the next start writes it again")
    starts = attempts(folder)
    if starts:
        last = starts[-1]
        nodes = f" on {last['nodes']} nodes" if last["nodes"] else ""
        job = f", Slurm job {last['job']}, restart {last['restart']}" if last["job"] else ""
        lines.append(
            f"start {len(starts)}: {last['time']} UTC at {last['at']}, {counted(last['ranks'], 'rank')}{nodes}{job}"
        )
    steps = run.steps()
    if (result := run.result()) is not None:
        lines.append(f"finished: {run.model}" if run.model.is_dir() else "finished, without an exported model")
        lines += [f"{split}: {text}" for split in ("validation", "test") if (text := _metrics(result.get(split)))]
    else:
        lines.append(f"last checkpoint: step {steps[-1]}" if steps else "no checkpoint yet")
        if starts and not lock_holder(folder):
            lines.append(f"to go on: the same command again, such as dcft train {folder}/config.toml")
    if (estimate := read_json_or(run.estimate, None, *ESTIMATE_KEYS)) is not None:
        lines.append(estimate_text(estimate))
    failure = first_failure(folder)
    if failure:
        lines.append(f"last failure: {failure}")
    if problem := space_problem(folder):
        lines.append(problem)
    return "\n".join(lines)


def _point(progress: dict[str, Any], folder: Path) -> str:
    """Phase, step and time left. A phase in which nobody holds the lock is one that was ended from outside."""
    phase = str(progress["phase"])
    ended = phase in ("done", "stopped") or phase.startswith(REACHED)
    text = phase if ended or lock_holder(folder) else f"not running; it was interrupted in the phase {phase}"
    steps, seconds = progress.get("steps"), progress.get("seconds_per_step")
    if steps:
        text += f", step {progress['step']} of {steps}"
    if steps and seconds and text.startswith("train"):
        text += f", {seconds:.2f} s a step, {_span((steps - progress['step']) * seconds)} left"
    return f"{text} ({progress.get('updated', 'unknown time')} UTC)"


def _metrics(metrics: Any) -> str:
    """The first metrics of a split; the others are in the report. Nothing if these are none: the file may be damaged."""
    found = metrics.items() if isinstance(metrics, dict) else ()
    return ", ".join([f"{name} {value:.4g}" for name, value in found if isinstance(value, int | float)][:3])


def estimate_text(e: dict[str, Any]) -> str:
    """The estimate that a run with `train.max_steps` made for the whole run, as one line.

    Args:
        e: the content of `estimate.json`.
    """
    return (
        f"{e['seconds_per_step']:.3f} s a step; all {e['steps']:,} steps: {e['hours']:.2f} h, {e['device_hours']:.2f} "
        f"{e['device']}-hours; begun at {e['time']} they would end at {e['end']}"
    )


def _span(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
