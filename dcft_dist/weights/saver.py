"""Writes checkpoints, if asked beside the training: it waits only while the tensors are copied out of its way.

They are copied into host memory, or into files on a disk of the node. The guarantees are those of `save_checkpoint`: a
checkpoint gets its name when every rank has written its part, and older ones go only then. Until that is so, an interrupted
run goes on from the one before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..distributed import collectives
from .checkpoint import check_tensors, files_of_all, publish, save_checkpoint, sizes_of, temporary_folder, write_mine
from .shard_files import FlatPiece, State


class Saver:
    """Writes the checkpoints of one run. Every rank must make the same calls."""

    def __init__(self, background: bool, timeout_s: float, staging: Path | None = None) -> None:
        """
        Args:
            background: whether to write in a thread. It communicates in a process group of its own.
            timeout_s: seconds after which a collective of that group gives up.
            staging: folder on a disk of the node, in which files wait for the thread; None: tensors wait in host memory.
        """
        self._background, self._timeout, self._staging = background, timedelta(seconds=timeout_s), staging
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

        Waits for checkpoints of earlier steps, so that no more than one step is held twice.

        Args:
            folder: folder of the checkpoint.
            step: optimizer steps done.
            tensors, state, identity: as for `save_checkpoint`.
            then: rank 0 calls it when the checkpoint has its name.

        Raises:
            DivergedError, CheckpointError, TemporaryError: as `save_checkpoint`; also for an earlier checkpoint.
        """
        if not self._background:
            save_checkpoint(folder, tensors, state, identity)
            if collectives.rank() == 0:
                then()
            return
        if any(earlier != step for earlier, _, _ in self._under_way):
            self.finish()
        check_tensors(tensors)
        if self._writer is None:
            self._begin(folder.parent)
        temporary = temporary_folder(folder, [path for _, path, _ in self._under_way])
        part: State | Path | None
        sizes = sizes_of(tensors)
        if self._staging is None:
            part = {name: _copied(entry) for name, entry in tensors.items()}
        else:
            with collectives.agreed("checkpoint: write to the disk of the node"):
                part = write_mine(self._staging / folder.name, tensors)

        def write() -> None:
            with collectives.agreed("checkpoint: write", self._group):
                mine = write_mine(temporary, part) if isinstance(part, dict) else part
            files = files_of_all(mine, self._group)
            with collectives.agreed("checkpoint: copy from the disk of the node", self._group):
                if isinstance(part, Path):
                    _move(part, temporary)
            if collectives.rank() == 0:
                publish(temporary, folder, state, identity, files, sizes)
                then()

        self._under_way.append((step, temporary, self._writer.submit(write)))  # type: ignore[union-attr]

    def _begin(self, checkpoints: Path) -> None:
        """Makes thread, process group, and this rank's folder on the disk of the node. Collective."""
        self._writer = ThreadPoolExecutor(1, "dcft_dist: checkpoints")
        several = collectives.world_size() > 1
        self._group = dist.new_group(timeout=self._timeout, backend="gloo") if several else None
        if self._staging is not None:
            mine = f"dcft_{hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:16]}"
            with collectives.agreed("checkpoint: clear the disk of the node"):
                for left in self._staging.glob(f"{mine}_*"):  # by an earlier start of this run
                    shutil.rmtree(left, ignore_errors=True)  # several ranks do so at once
            with collectives.agreed("checkpoint: make a folder on the disk of the node"):
                self._staging.mkdir(parents=True, exist_ok=True)  # in it, one that only this user can read
                self._staging = Path(tempfile.mkdtemp(prefix=f"{mine}_{collectives.rank()}_", dir=self._staging))

    def finish(self) -> None:
        """Waits until everything is written. Collective.

        Raises:
            TemporaryError: the file system failed.
            CheckpointError: rank 0 does not see a file of another rank.
        """
        under_way, self._under_way = self._under_way, []
        if under_way:
            with collectives.agreed("checkpoint: written in the background"):
                for _, _, job in under_way:
                    job.result()

    def close(self) -> None:
        """Waits as `finish` does, and deletes what is left on the disk of the node. Collective."""
        self.finish()
        self._clear()

    def leave(self, wait_s: float) -> None:
        """After an error: what is under way may still be written. Deletes what is then left on the disk of the node.

        Args:
            wait_s: seconds to wait at most.
        """
        wait([job for _, _, job in self._under_way], wait_s)
        self._clear()

    def _clear(self) -> None:
        if self._writer is not None and self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)


def _copied(entry: Any) -> Any:
    """A copy in host memory, which the training does not change."""
    if isinstance(entry, FlatPiece):
        return FlatPiece(entry.values.detach().to("cpu", copy=True), entry.numel, entry.begin)
    return entry.detach().to("cpu", copy=True)


def _move(file: Path, folder: Path) -> None:
    """Copies a file through to the disk, and deletes it where it was."""
    with file.open("rb") as source, (folder / file.name).open("wb") as target:
        shutil.copyfileobj(source, target, 16 * 2**20)
        target.flush()
        os.fsync(target.fileno())
    shutil.rmtree(file.parent)
