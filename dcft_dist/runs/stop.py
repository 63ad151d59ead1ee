"""Requests to stop a run: signals, and a file that the batch script creates before a time limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_signals: list[int] = []
_listening = False

ONE_EVENT_S = 1.0  # within it, a second SIGTERM is the same request: sent to the group, and again by torchrun


def listen_for_stop() -> None:
    """From this call on, SIGUSR1, SIGUSR2 and the first Ctrl-C request a stop at the next step, with a checkpoint.

    A second Ctrl-C ends the process at once.
    """
    global _listening
    _listening = True
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: _signals.append(received))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _signals.append(number)
    if os.environ.get("RANK", "0") == "0":
        _announce("Ctrl-C")


def _announce(again: str) -> None:
    with suppress(OSError):  # who reads it may have ended by the same signal
        os.write(2, f"\nstopping after this step, with a checkpoint; {again} again ends it at once\n".encode())


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """In this block the first SIGTERM requests a stop; a later one, or one after a batch script's request, ends the process.

    For a run of one rank that listens, while it makes steps. Elsewhere SIGTERM ends a process at once: torchrun sends it to
    the ranks that wait for one that is lost.
    """
    if not _listening or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process, first = os.getpid(), 0.0

    def terminate(number: int, frame: Any) -> None:
        nonlocal first
        repeated = first and time.monotonic() - first < ONE_EVENT_S
        if os.getpid() != process or (stop_requested() and not repeated):
            os._exit(128 + number)  # the default would not end the first process of a container
        if repeated:
            return
        first = time.monotonic()
        _signals.append(number)
        _announce("SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def terminated() -> bool:
    """Whether SIGTERM requested the stop."""
    return signal.SIGTERM in _signals


def stop_requested() -> bool:
    """Whether such a signal has arrived, or the file that DCFT_STOP_FILE names exists.

    Slurm warns the batch script of a time limit or a preemption, and the script creates the file. A signal to the ranks
    would end torchrun.
    """
    file = os.environ.get("DCFT_STOP_FILE")
    return bool(_signals) or (file is not None and os.path.exists(file))


class Stopped(Exception):
    """The run ends because it was asked to stop. Another start continues it."""
