"""A tensor that is spread over the ranks in equal parts, and gathered each time it is needed, ahead of need if asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import collectives


class Gathered:
    """A flat tensor of which each rank stores an equal part.

    Attributes:
        mine: this rank's part; the last parts are padded with zeros.
    """

    def __init__(self, whole: Tensor, what: str) -> None:
        """Keeps this rank's part.

        Args:
            whole: the whole tensor, flat, equal on every rank.
            what: what it is, for error messages.
        """
        self._numel, self._what = whole.numel(), what
        size = -(-self._numel // collectives.world_size())
        self.mine = whole.new_zeros(size)
        part = whole[collectives.rank() * size :][:size]
        self.mine[: part.numel()] = part
        self._coming: tuple[Tensor, Any] | None = None

    def ask(self) -> None:
        """Begins to gather. Every rank must ask at the same point among its collectives. Does nothing if it has begun."""
        if self._coming is None:
            self._coming = collectives.all_gather_begun(self.mine, what=self._what)

    def whole(self) -> Tensor:
        """The whole tensor. Collective, unless it was asked for."""
        if self._coming is None:
            return collectives.all_gather_equal(self.mine, what=self._what)[: self._numel]
        (gathered, work), self._coming = self._coming, None
        with collectives.explained(self._what):
            work.wait()
        return gathered[: self._numel]
