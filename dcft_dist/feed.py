"""The batches of each training step, made ahead by worker processes if there are any.

What a step gets is a function of the step alone, so workers change nothing but the time, and a run that goes on at any step
gets what it would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from .data import Batch
from .errors import DataError, DcftError, alone

Make = Callable[[int], list[Batch]]  # step -> this rank's micro-batches, on the CPU


class _Steps(Dataset[list[Batch] | DcftError]):
    def __init__(self, make: Make) -> None:
        self._make = make

    def __getitem__(self, step: int) -> list[Batch] | DcftError:
        try:
            return self._make(step)
        except DcftError as error:  # a worker would wrap it into its own traceback
            return error


class Feed:
    """Gives the micro-batches of one step after the other."""

    def __init__(self, make: Make, workers: int, device: torch.device) -> None:
        self._steps, self._workers, self._device = _Steps(make), workers, device
        self._made: Iterator[list[Batch] | DcftError] = iter(())
        self._next: int | None = None

    def get(self, step: int, end: int) -> list[Batch]:
        """The micro-batches of a step, on the device. `end`: no step from there on will be asked for.

        Raises:
            DataError: an input cannot be read, or a worker process was killed.
        """
        if step != self._next:
            loader = DataLoader(self._steps, batch_size=None, sampler=range(step, end), num_workers=self._workers)
            self._made = iter(loader)
        try:
            found = next(self._made)
        except RuntimeError as error:
            raise alone(DataError(f"a process that reads training data has died at step {step}: {error}")) from error
        if isinstance(found, DcftError):
            raise found
        self._next = step + 1
        return [{key: value.to(self._device, non_blocking=True) for key, value in batch.items()} for batch in found]
