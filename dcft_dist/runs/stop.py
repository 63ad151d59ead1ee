"""Requests to stop a run: signals, and a file that the batch script creates before a time limit."""

from __future__ import annotations

import os
import signal
from typing import Any

_signals: list[int] = []


def listen_for_stop() -> None:
    """From this call on, SIGUSR1, SIGUSR2 and the first Ctrl-C request a stop at the next step, with a checkpoint.

    A second Ctrl-C ends the process at once.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: _signals.append(received))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _signals.append(number)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends it at once\n")


def stop_requested() -> bool:
    """Whether SIGUSR1, SIGUSR2 or a Ctrl-C has arrived, or the file that DCFT_STOP_FILE names exists.

    Slurm warns the batch script of a time limit or a preemption, and the script creates the file. A signal to the ranks
    would end torchrun.
    """
    file = os.environ.get("DCFT_STOP_FILE")
    return bool(_signals) or (file is not None and os.path.exists(file))


class Stopped(Exception):
    """The run ends because it was asked to stop. Another start continues it."""
