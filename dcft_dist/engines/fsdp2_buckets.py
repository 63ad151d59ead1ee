"""The flat buffers in which FSDP2 reduces gradients: one for each parameter group, in the order of the reduce-scatter.

FSDP2 copies the unsharded gradients of a group into one buffer, padded and by rank, and hands it to a communication object
that a user may replace (`set_custom_reduce_scatter`). A wrapper around that object sees the buffer right before the
reduction, on its stream. A group that is sharded over one rank communicates nothing; there the hook after the reduction
(`set_all_reduce_hook`) sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..compat.pytorch import (
    chunk_cat,
    fsdp2_accumulates,
    fsdp2_dim,
    fsdp2_knows_unused,
    fsdp2_leaf,
    fsdp2_members,
    fsdp2_ranks,
    fsdp2_reduction,
    fsdp2_reductions,
    fsdp2_set_reduction,
    fsdp2_with_unused,
)
from .base import Bucket, Leaf, Segment

Before = Callable[[Tensor, frozenset[str]], None]


_KEPT = 1000  # combinations of leaves that are remembered with their names


class FSDP2Bucket(Bucket):
    """The buffer of one parameter group."""

    def __init__(self, unit: Any, group: Any, leaves: Mapping[int, Leaf]) -> None:
        """
        Args:
            unit: an FSDP2 module of the group.
            group: the parameter group.
            leaves: id of an unsharded parameter -> its leaf.
        """
        self._unit, self.group = unit, group
        self._ranks = fsdp2_ranks(group)
        found = [(leaves[id(leaf)], fsdp2_dim(p)) for p in fsdp2_members(group) if id(leaf := fsdp2_leaf(p)) in leaves]
        self.leaves = [leaf for leaf, _ in found]
        self._dims = {leaf.segments[0].name: dim for leaf, dim in found}
        self.segments: tuple[Segment, ...] = tuple(leaf.segments[0] for leaf in self.leaves)
        self.device = self.leaves[0].tensor.device
        self.reached: list[Tensor] = []
        self._knows_unused = fsdp2_knows_unused(group)
        self._every = frozenset(self._dims)
        self._names = {id(leaf.tensor): leaf.segments[0].name for leaf in self.leaves}
        self._seen: dict[frozenset[int], frozenset[str]] = {}  # ids of the leaves reached -> their names
        self._handles: list[Any] = []
        self._before: Before | None = None
        self._token = object()  # of the wrapper that counts
        self.ours: Any = None  # what stands in the communication's place

    def lay_out(self, masks: Mapping[str, Tensor], present: Collection[str]) -> Tensor:
        parts = []
        for s in self.segments:
            if s.name in present:
                mask = masks[s.name] if s.name in masks else torch.zeros(s.box.size, dtype=torch.bool)
                if (dim := self._dims[s.name]) != 0 and self._ranks > 1:
                    mask = torch.cat(mask.chunk(self._ranks, dim))
                parts.append(mask.contiguous().view(torch.uint8))
        return chunk_cat(parts, self._ranks).bool()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        masks = {}
        for s in self.segments:
            cells = flat[self.lay_out({s.name: torch.ones(s.box.size, dtype=torch.bool)}, self._dims)]
            if (dim := self._dims[s.name]) == 0 or self._ranks == 1:
                masks[s.name] = cells.view(s.box.size)
            else:  # the ranks' parts one after the other
                part = list(s.box.size)
                part[dim] //= self._ranks
                masks[s.name] = torch.cat([piece.view(part) for piece in cells.chunk(self._ranks)], dim)
        return masks

    def intercept(self, before: Before) -> None:
        self._before = before
        for leaf in self.leaves:  # a bound method of a list: no Python runs
            self._handles.append(leaf.tensor.register_post_accumulate_grad_hook(self.reached.append))
        self._wrap()

    @classmethod
    def renew(cls, buckets: Sequence[FSDP2Bucket]) -> None:
        for bucket, found in zip(buckets, map(fsdp2_reductions, map(_group, buckets)), strict=True):
            if bucket.ours not in found:
                bucket._wrap()

    def _wrap(self) -> None:
        """Puts a wrapper around the communication. An earlier one, which the user may have wrapped, then does nothing."""
        current = fsdp2_reduction(self.group, self._ranks)
        self._token = object()
        see = partial(self.see, self._token)
        if self._ranks == 1 and current is None:
            self.ours = see  # without a wrapper, one call less
        else:
            self.ours = _Reduction(see, current) if self._ranks > 1 else _Hook(see, current)
        fsdp2_set_reduction(self._unit, self.group, self._ranks, self.ours)

    def waits(self) -> bool:
        return fsdp2_accumulates(self.group)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before = None  # also for a wrapper that somebody has wrapped in turn
        if self.ours is not None and fsdp2_reduction(self.group, self._ranks) == self.ours:
            fsdp2_set_reduction(self._unit, self.group, self._ranks, getattr(self.ours, "inner", None))
        self.ours = None

    def see(self, token: object, buffer: Tensor) -> None:
        """Called with the buffer, right before it is reduced; `token` is that of the wrapper."""
        if self._before is None or token is not self._token:
            return
        reached = frozenset(map(id, self.reached))
        self.reached.clear()
        if (names := self._seen.get(reached)) is None:
            if len(self._seen) > _KEPT:
                self._seen.clear()
            names = self._seen[reached] = frozenset(self._names[key] for key in reached)
        if self._knows_unused and fsdp2_with_unused(self.group):
            names = self._every
        self._before(buffer, names)


class _Reduction:
    """The communication of a group, with a look at its input."""

    def __init__(self, see: Callable[[Tensor], None], inner: Any) -> None:
        self.see, self.inner = see, inner
        self.allocate = inner.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **others: Any) -> Any:
        self.see(input_tensor)
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op, **others)


class _Hook:
    """The hook after the reduction of a group on one rank, before a hook that the user has set."""

    def __init__(self, see: Callable[[Tensor], None], inner: Any) -> None:
        self.see, self.inner = see, inner

    def __call__(self, reduced: Tensor) -> None:
        self.see(reduced)
        if self.inner is not None:
            self.inner(reduced)


_group = attrgetter("group")
