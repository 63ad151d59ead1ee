"""The errors that users see. Each message says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DcftError(Exception):
    """Base of all errors that this package raises deliberately.

    Attributes:
        exit_code: exit code of `dcft`. 2: bad input, another run without changes fails again.
        alone: True: only this rank knows of the error. False: every rank raises it.
    """

    exit_code = 2
    alone = False


class ConfigError(DcftError):
    """A configuration file or override is wrong; the message lists every problem at once."""


class EngineError(DcftError):
    """The model is wrapped or sharded in a way that this package does not support."""


class PatternError(DcftError):
    """A pattern or a parameter name does not fit the model."""


class ScoreError(DcftError):
    """Importance scores cannot be computed, or cannot be used."""


class SelectionError(DcftError):
    """No set fulfils the requested fraction, floor and cap."""


class FundamentalSetError(DcftError):
    """A fundamental set does not fit the model, or its file is damaged."""


class PenaltyError(DcftError):
    """The penalty cannot be attached, or did not act on a step as it should."""


class DataError(DcftError):
    """A dataset or weights package is missing or unreadable."""


class CheckpointError(DcftError):
    """A checkpoint is damaged, or belongs to another run."""


class DamagedError(DcftError, ValueError):
    """A file of a run or a study is not what was written: it was cut, altered, or replaced."""


class TrustError(DcftError):
    """A folder or a configuration names code, and the user has not said that it may run."""


class MismatchError(DcftError):
    """Ranks of one start, or two starts of one run, do not have the same configuration, code, data or weights."""


class DivergedError(DcftError):
    """The loss is no longer a number."""


class RunError(DcftError):
    """A run directory cannot be used: another job writes to it, it has no run, or its starts make no progress."""


class TemporaryError(DcftError):
    """A temporary failure, of a file system or of another rank: another start may succeed."""

    exit_code = 1


class UnfinishedError(TemporaryError):
    """Other shares of a study are not finished: start this share again when they are."""

    exit_code = 75  # EX_TEMPFAIL, as `dcft status --verdict` returns for a run to start again


class WorldError(TemporaryError):
    """Ranks did not meet in a collective. The message names the missing ranks."""


def alone(error: DcftError) -> DcftError:
    """Marks an error as known to this rank only, and returns it."""
    error.alone = True
    return error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggests the most similar of the known words, for an error message.

    Args:
        word: the unknown word.
        known: words that would be right.

    Returns:
        `" (did you mean 'x'?)"`, or an empty string if no known word is similar.
    """
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def line_of(error: BaseException, which: int = 0) -> str:
    """One line of an error's message.

    Args:
        error: the error.
        which: index of the line; 0 is the first, -1 the last.

    Returns:
        The line, or the name of the error's class if the message is empty.
    """
    lines: list[str] = str(error).strip().splitlines()
    return lines[which] if lines else type(error).__name__


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Lists names for an error message: `a, b, c and 5 more`.

    Args:
        names: names to list.
        limit: maximum number of names to print.
    """
    items = list(names)
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def counted(number: int, what: str) -> str:
    """A number and its noun: `1 channel`, `3 channels`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
