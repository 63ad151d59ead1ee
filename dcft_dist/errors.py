"""The errors a user can meet. Each message says what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DcftError(Exception):
    """Base of every error raised on purpose by this package."""

    exit_code = 2  # bad input: running again unchanged cannot help
    alone = False  # True: the other ranks do not know of it


class ConfigError(DcftError):
    """A configuration file or override is wrong; the message lists every problem at once."""


class EngineError(DcftError):
    """The model is not prepared in a way this package supports."""


class PatternError(DcftError):
    """A pattern or a parameter name does not fit the model."""


class ScoreError(DcftError):
    """Importance scores cannot be computed, or are not usable."""


class SelectionError(DcftError):
    """The requested fraction, floor or cap cannot be met."""


class FundamentalSetError(DcftError):
    """A fundamental set does not fit the model, or its file is damaged."""


class PenaltyError(DcftError):
    """The penalty cannot be attached, or was not in force when it should have been."""


class DataError(DcftError):
    """A dataset or weights package is missing or unreadable."""


class CheckpointError(DcftError):
    """A checkpoint is damaged, or belongs to another run."""


class DivergedError(DcftError):
    """The loss is no longer a number."""


class RunError(DcftError):
    """A run directory cannot be used: held by another job, without a run, or getting nowhere."""


class PassingError(DcftError):
    """A fault of the moment, of a file system or of another rank: running again may help."""

    exit_code = 1


class UnfinishedError(PassingError):
    """Other shares of a study have not done theirs: start this one again when they have."""

    exit_code = 75  # EX_TEMPFAIL, as `dcft status --verdict` where a run should be started again


class WorldError(PassingError):
    """Ranks did not meet in a collective; the message names who is missing."""


def alone(error: DcftError) -> DcftError:
    """Marks an error that this rank has, and the others do not know of."""
    error.alone = True
    return error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def line_of(error: BaseException, which: int = 0) -> str:
    """The first line of a message (`which`: another), or the kind of error that has none."""
    lines: list[str] = str(error).strip().splitlines()
    return lines[which] if lines else type(error).__name__


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message, the tail of a long list counted instead of printed."""
    items = list(names)
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
