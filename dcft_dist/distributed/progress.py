"""What each rank has reached. After a collective that failed, this says which ranks lag behind or do not answer.

Each rank notes what it reaches. That costs a step nothing: a thread writes the latest note to the key-value store of the
process group once a second. Only after a failure do the ranks read each other's notes.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

from ..compat.pytorch import default_store

ANSWER_S = 5.0  # seconds that a rank waits after a failure for the other ranks to report it too


PUBLISH_S = 1.0  # seconds between two writes of a rank's latest note


class _Notes:
    """This rank's notes, and the thread that writes the latest one to the store.

    Attributes:
        count: number of notes so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._latest, self._written = "", 0
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def take(self, what: str) -> None:
        """Takes a note. The thread is started with the first one, and again in a process that was forked."""
        self._latest = what
        self.count += 1
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep_publishing, name="dcft_dist: progress", daemon=True)
            self._thread.start()

    def publish(self) -> None:
        """Writes the latest note to the store, if it is a new one."""
        if (count := self.count) > self._written:
            default_store().set(f"dcft_dist/progress/{dist.get_rank()}", f"{count} {socket.gethostname()} {self._latest}")
            self._written = count

    def _keep_publishing(self) -> None:
        while not self._ending.wait(PUBLISH_S):
            try:
                self.publish()
            except Exception:  # between two process groups there is no store, and a store that died is told of elsewhere
                continue

    def end(self) -> None:
        """Ends the thread. A thread that comes back from the store while the interpreter ends would abort the process."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(PUBLISH_S)


_notes = _Notes()
atexit.register(_notes.end)


def arrive(what: str) -> None:
    """Notes that this rank has reached `what`. The other ranks quote it if this rank does not arrive."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        _notes.take(what)


def missing_ranks() -> str:
    """After a failed collective: says which ranks lag behind this one or do not answer. Part of an error message."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_missing_ranks()), daemon=True)
    asking.start()
    asking.join(3 * ANSWER_S)  # a host that is suspended keeps the connection open, and says nothing
    return found[0] if found else f"the key-value store does not answer: {_store_host()} does not react"


def _store_host() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'its host')} (usually the host of rank 0)"


def _missing_ranks() -> str:
    try:
        _notes.publish()
        store, late_from = default_store(), time.monotonic() + 2 * PUBLISH_S  # by then every rank that lives has written
        others = [r for r in range(dist.get_world_size()) if r != dist.get_rank()]
        while True:
            notes = {r: _note(store, r) for r in others}
            missing = [
                f"rank {r}{host} has not arrived (its last report: {last_report})"
                for r, (count, host, last_report) in notes.items()
                if count < _notes.count
            ]
            if not missing:
                return _silent_ranks(store, {r: host for r, (_, host, _) in notes.items()})
            if time.monotonic() > late_from:
                return "; ".join(missing)
            time.sleep(0.05)
    except Exception:
        return f"the key-value store does not answer: {_store_host()} has died or lost its network"


def _note(store: Any, other_rank: int) -> tuple[int, str, str]:
    """Number, host and text of another rank's last note."""
    key = f"dcft_dist/progress/{other_rank}"
    if not store.check([key]):
        return 0, "", "nothing yet"
    count, host, what = store.get(key).decode().split(" ", 2)
    return int(count), f" on {host}", what


def _silent_ranks(store: Any, hosts: dict[int, str]) -> str:
    """Says which ranks do not answer, when all ranks have reached the same collective.

    Every rank that is alive reports the failure too, within moments.
    """
    store.set(f"dcft_dist/failed/{dist.get_rank()}", "")
    deadline, silent = time.monotonic() + ANSWER_S, list(hosts)
    while silent and time.monotonic() < deadline:
        silent = [r for r in silent if not store.check([f"dcft_dist/failed/{r}"])]
        time.sleep(0.05)
    lines = [f"rank {r}{hosts[r]} does not answer" for r in silent]
    return "; ".join(lines) or "every rank arrived and answers, so the network failed between some of them"
