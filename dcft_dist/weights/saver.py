"""Writes checkpoints, if asked beside the training: it waits only while the tensors are copied into host memory.

The guarantees are those of `save_checkpoint`. A checkpoint gets its name when every rank has written its part, and older
ones go only then. Until that is so, an interrupted run goes on from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..distributed import collectives
from .checkpoint import FlatPiece, State, publish, require_finite, save_checkpoint, temporary_folder, write_tensors


class Saver:
    """Writes the checkpoints of one run. Every rank must make the same calls."""

    def __init__(self, background: bool, timeout_s: float) -> None:
        """
        Args:
            background: whether to write in a thread. It communicates in a process group of its own.
            timeout_s: seconds after which a collective of that group gives up.
        """
        self._background, self._timeout = background, timedelta(seconds=timeout_s)
        self._writer: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._under_way: list[tuple[int, Path, Future[None]]] = []  # step, temporary folder

    def save(
        self,
        folder: Path,
        step: int,
        tensors: State,
        state: dict[str, Any],
        identity: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        """Saves a checkpoint, or begins to. Collective.

        Waits for checkpoints of earlier steps, so that no more than one step is held in memory twice.

        Args:
            folder: folder of the checkpoint.
            step: optimizer steps done.
            tensors, state, identity: as for `save_checkpoint`.
            then: rank 0 calls it when the checkpoint has its name.

        Raises:
            DivergedError, TemporaryError: as `save_checkpoint`; also for an earlier checkpoint.
        """
        if not self._background:
            save_checkpoint(folder, tensors, state, identity)
            if collectives.rank() == 0:
                then()
            return
        if any(earlier != step for earlier, _, _ in self._under_way):
            self.finish()
        require_finite(tensors)
        temporary = temporary_folder(folder, [path for _, path, _ in self._under_way])
        copies = {name: _copied(entry) for name, entry in tensors.items()}
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "dcft_dist: checkpoints")
            several = collectives.world_size() > 1
            self._group = dist.new_group(timeout=self._timeout, backend="gloo") if several else None
        job = self._writer.submit(self._write, temporary, folder, copies, state, identity, then)
        self._under_way.append((step, temporary, job))

    def _write(
        self,
        temporary: Path,
        folder: Path,
        tensors: State,
        state: dict[str, Any],
        identity: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        write_tensors(temporary, tensors, self._group)
        if collectives.rank() == 0:
            publish(temporary, folder, state, identity)
            then()

    def finish(self) -> None:
        """Waits until everything is written. Collective.

        Raises:
            TemporaryError: the file system failed.
        """
        under_way, self._under_way = self._under_way, []
        if under_way:
            with collectives.agreed("checkpoint: written in the background"):
                for _, _, job in under_way:
                    job.result()


def _copied(entry: Any) -> Any:
    """A copy in host memory, which the training does not change."""
    if isinstance(entry, FlatPiece):
        return FlatPiece(entry.values.detach().to("cpu", copy=True), entry.numel, entry.begin)
    return entry.detach().to("cpu", copy=True)
