"""Requests to stop a run: signals, and a file that the batch script creates before a time limit."""

from __future__ import annotations

import os
import signal

_signals: list[int] = []


def listen_for_stop() -> None:
    """From this call on, SIGUSR1 and SIGUSR2 request a stop at the next step instead of ending the process."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: _signals.append(received))


def stop_requested() -> bool:
    """Whether SIGUSR1 or SIGUSR2 has arrived, or the file that DCFT_STOP_FILE names exists.

    Slurm warns the batch script of a time limit or a preemption, and the script creates the file. A signal to the ranks
    would end torchrun.
    """
    file = os.environ.get("DCFT_STOP_FILE")
    return bool(_signals) or (file is not None and os.path.exists(file))


class Stopped(Exception):
    """The run ends because it was asked to stop. Another start continues it."""
