"""Requests to stop a run: signals, and a file that the batch script creates before a time limit."""

from __future__ import annotations

import os
import signal
from typing import Any

_signals: list[int] = []


def listen_for_stop() -> None:
    """From this call on, SIGUSR1, SIGUSR2 and the first Ctrl-C request a stop at the next step, with a checkpoint.

    So does the first SIGTERM where there is one rank. Of several ranks, torchrun ends those that are left by SIGTERM, and
    they wait for a lost one, so there it ends them at once. So do a second Ctrl-C and a second SIGTERM.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: _signals.append(received))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, _interrupt)
    if os.environ.get("WORLD_SIZE", "1") == "1" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        # A pool ends its processes by SIGTERM and waits for them, even right after it has forked them.
        os.register_at_fork(before=_hold_back, after_in_parent=_let_in, after_in_child=_leave_to_parent)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _signals.append(number)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends it at once\n")


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop_requested():  # a script that waits no longer
        signal.raise_signal(signal.SIGTERM)
    _signals.append(number)
    os.write(2, b"\nstopping after this step, with a checkpoint; SIGTERM again ends it at once\n")


def _hold_back() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_in() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _leave_to_parent() -> None:
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_in()


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
