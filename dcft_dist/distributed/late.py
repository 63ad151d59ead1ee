"""Sums over ranks that are read one call later, so that no step of a training waits for its own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from . import collectives

Note = TypeVar("Note")


@dataclass
class _Coming(Generic[Note]):
    """A sum that has begun: wait for `work` and `copied`, if any, then read `values`."""

    values: Tensor
    work: Any
    copied: Any
    note: Note


class LateSum(Generic[Note]):
    """A sum over ranks, of the same numbers at every step."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: what is summed, for error messages.
        """
        self._what = what
        self._coming: _Coming[Note] | None = None

    def push(self, values: Tensor, note: Note) -> tuple[list[float], Note] | None:
        """Begins to sum, and returns the sum before, which has mostly arrived by now. Collective.

        Args:
            values: flat float64 tensor on this rank's device.
            note: what to return with the sum.

        Returns:
            (sums, note) of the last call; None at the first one, and after `flush`.
        """
        before = self.flush()
        summed, work = collectives.all_reduce_begun(values, what=self._what)
        copied = None
        if summed.is_cuda:
            if work is not None:
                work.wait()  # the stream waits, the host does not
            summed = torch.empty_like(summed, device="cpu", pin_memory=True).copy_(summed, non_blocking=True)
            work, copied = None, torch.cuda.Event()
            copied.record()
        self._coming = _Coming(summed, work, copied, note)
        return before

    def flush(self) -> tuple[list[float], Note] | None:
        """Returns the sum that has begun, if there is one."""
        coming, self._coming = self._coming, None
        if coming is None:
            return None
        with collectives.explained(self._what):
            if coming.work is not None:
                coming.work.wait()
            if coming.copied is not None:
                coming.copied.synchronize()
        return coming.values.tolist(), coming.note
