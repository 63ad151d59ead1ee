"""Multiplies gradients before their reduction: in the flat buffers that the engine reduces, elsewhere on autograd leaves.

Each hook has a count beside it, so that `PenaltyWatch` can tell whether every gradient was multiplied once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compat.pytorch import has_values
from ..distributed.gathered import Gathered
from ..engines.base import Bucket, Engine, Leaf, Segment, local_tensor
from ..errors import EngineError, listing
from .bits import Packed, unpack
from .flat_bits import Masks, masks_of, planes_of, side_by_side, single_plane
from .multipliers import Job, Multipliers, Plane

_KEPT = 16  # layouts of a buffer in which some weights are missing


@dataclass
class LeafCount:
    """Counts of one leaf with a hook.

    Attributes:
        names: penalised weights in the leaf.
        fired: how often the hook fired since the last step.
        reached: one entry for each backward that has reached the leaf since the last step.
        forwards: the number of forwards of the model at the last step (`PenaltyWatch.forwards`).
    """

    names: list[str]
    fired: int = 0
    reached: list[Tensor] = field(default_factory=list)
    forwards: int = 0


@dataclass
class BucketCount:
    """Counts of one flat buffer.

    Attributes:
        names: penalised weights that may be in the buffer.
        bucket: the buffer.
        fired: those that were multiplied since the last step.
        problem: what is wrong with a reduction since the last step, or an empty string.
        forwards: as of `LeafCount`.
    """

    names: list[str]
    bucket: Bucket
    fired: set[str] = field(default_factory=set)
    problem: str = ""
    forwards: int = 0


@dataclass
class _Layout:
    """The bits of a buffer that holds the gradients of some weights.

    Attributes:
        numel: cells of the buffer.
        names: penalised weights in it.
        planes: the bits.
        following: the layout that was needed after this one the last time.
    """

    numel: int
    names: list[str]
    planes: tuple[Plane, ...]
    following: _Layout | None = None


class GradientHooks:
    """The hooks of one penalty.

    Attributes:
        leaves: counts of the leaves with a hook.
        buckets: counts of the flat buffers.
        handles: of the hooks on leaves.
    """

    def __init__(
        self,
        engine: Engine,
        leaves: Sequence[Leaf],
        bits: Mapping[str, Packed | None],
        multipliers: Multipliers,
        calls: Counter[str],
        shared: bool,
    ) -> None:
        """Installs the hooks.

        Args:
            engine: the engine of the model.
            leaves: its leaves.
            bits: name -> packed bits of the weight's cells on this rank; None for an unscored weight.
            multipliers: the numbers to multiply by.
            calls: counts how often each weight was multiplied.
            shared: True: each rank stores an equal part of the bits.

        Raises:
            EngineError: a penalised weight belongs to no leaf.
        """
        self._multipliers, self._calls, self._shared = multipliers, calls, shared
        self.leaves: list[LeafCount] = []
        self.buckets: list[BucketCount] = []
        self.handles: list[Any] = []
        self._buckets: list[Bucket] = []
        self._planes: list[Plane] = []  # of the leaves
        self._layouts: list[dict[frozenset[str], _Layout]] = []  # of the buckets, by the weights that are present
        self._last: _Layout | None = None
        self._values = all(has_values(local_tensor(leaf.tensor)) for leaf in leaves[:1])
        covered: set[str] = set()
        for bucket in engine.buckets(leaves):
            names = [s.name for s in bucket.segments if s.name in bits]
            covered.update(s.name for s in bucket.segments)
            if names:
                self._hook_bucket(bucket, names, bits)
        for leaf in leaves:
            segments = [s for s in leaf.segments if s.name in bits]
            if segments and segments[0].name not in covered:
                self._hook_leaf(leaf, segments, bits)
        known = {name for leaf_count in self.leaves for name in leaf_count.names}
        known |= {name for bucket_count in self.buckets for name in bucket_count.names}
        if missed := [name for name in bits if name not in known]:
            raise EngineError(f"no autograd leaf receives the gradient of {listing(missed)}")

    @property
    def num_bytes(self) -> int:
        """Memory of the bits on this rank."""
        layouts = [layout for found in self._layouts for layout in found.values()]
        return sum(plane.num_bytes for plane in [*self._planes, *(p for layout in layouts for p in layout.planes)])

    def renew(self) -> None:
        """Puts the hooks back around a communication that the user has set since. Called before each forward."""
        if self._buckets:
            type(self._buckets[0]).renew(self._buckets)

    def remove(self) -> None:
        """Removes all hooks. May be called more than once."""
        for handle in self.handles:
            handle.remove()
        for count in self.buckets:
            count.bucket.release()
        self.handles.clear()
        for known in (self.leaves, self.buckets, self._buckets):
            known.clear()

    # -- flat buffers -------------------------------------------------------------------------------------------------

    def _hook_bucket(self, bucket: Bucket, names: list[str], bits: Mapping[str, Packed | None]) -> None:
        count = BucketCount(names, bucket)
        every = frozenset(s.name for s in bucket.segments)
        scored = {name for name in names if bits[name] is not None}
        whole = self._layout(bucket, every, masks_of(bucket.segments, bits, self._values))
        layouts, multiply = {every: whole}, self._multipliers.multiply
        self._layouts.append(layouts)

        def before(buffer: Tensor, present: frozenset[str]) -> None:
            layout = layouts.get(present)
            if layout is None:
                chosen = bucket.split(_read(whole)) if scored else {}
                masks = {name: chosen[name] if name in scored else None for name in names if name in present}
                if len(layouts) > _KEPT:  # the oldest one, but not that of all weights
                    del layouts[list(layouts)[1]]
                layout = layouts[present] = self._layout(bucket, present, masks)
            if not present or layout.numel != buffer.numel():
                count.problem = _other_members(names, present, layout.numel, buffer.numel())
                return
            for plane in layout.planes:
                multiply(((buffer, plane, buffer, None),))
            for name in layout.names:
                self._calls[name] += 1
            count.fired.update(layout.names)
            if self._shared:
                self._ask_ahead(layout)

        bucket.intercept(before)
        self.buckets.append(count)
        self._buckets.append(bucket)

    def _layout(self, bucket: Bucket, present: frozenset[str], masks: Masks) -> _Layout:
        """Lays out the bits of a buffer with these weights."""

        def lay_out(cells: Mapping[str, Tensor]) -> Tensor:
            return bucket.lay_out(cells, present)

        names = [s.name for s in bucket.segments if s.name in masks]
        if not present:
            return _Layout(0, [], ())
        planes = planes_of(bucket.segments, masks, self._multipliers, lay_out, bucket.device, self._shared)
        return _Layout(lay_out({}).numel(), names, planes)

    def _ask_ahead(self, layout: _Layout) -> None:
        """Begins to gather the bits that were needed next the last time."""
        if self._last is not None:
            self._last.following = layout
        self._last = layout
        if layout.following is not None:
            for plane in layout.following.planes:
                if isinstance(plane.octets, Gathered):
                    plane.octets.ask()

    # -- leaves ---------------------------------------------------------------------------------------------------------

    def _hook_leaf(self, leaf: Leaf, segments: list[Segment], bits: Mapping[str, Packed | None]) -> None:
        device = local_tensor(leaf.tensor).device
        cells = max(s.offset + s.box.numel for s in leaf.segments)
        if len(leaf.segments) == 1 and leaf.segments[0].offset == 0:
            planes = single_plane(segments[0].name, bits[segments[0].name], device, self._shared)
        else:
            order = side_by_side(leaf.segments, cells)
            masks = masks_of(segments, bits, self._values)
            planes = planes_of(segments, masks, self._multipliers, order, device, self._shared)
        self._planes += planes
        count = LeafCount([s.name for s in segments])
        self.leaves.append(count)
        self.handles.append(leaf.tensor.register_hook(self._leaf_hook(count, planes, cells)))
        # A bound method of a list: no Python runs.
        self.handles.append(leaf.tensor.register_post_accumulate_grad_hook(count.reached.append))

    def _leaf_hook(self, count: LeafCount, planes: tuple[Plane, ...], cells: int) -> Callable[[Tensor], Tensor]:
        multiply, calls, names = self._multipliers.multiply, self._calls, count.names
        first, others = planes[0], planes[1:]

        def hook(gradient: Tensor) -> Tensor:
            # Out of place, since other leaves may share this memory. Gradients are enabled under create_graph.
            if type(gradient) is Tensor and not torch.is_grad_enabled() and gradient.is_contiguous():
                scaled, source = torch.empty_like(gradient), gradient.detach().view(-1)
                flat = scaled.view(-1)
                if source.numel() > cells:  # padding at the end of a flat parameter
                    flat[cells:].copy_(source[cells:])
            else:
                scaled = gradient.clone(memory_format=torch.contiguous_format)
                flat = source = local_tensor(scaled).detach().view(-1)
            source, flat = source[:cells], flat[:cells]
            jobs: list[Job] = [(source, first, flat, None)]
            for plane in others:
                jobs.append((flat, plane, flat, None))
            multiply(jobs)
            for name in names:
                calls[name] += 1
            count.fired += 1
            return scaled

        return hook


def _read(layout: _Layout) -> Tensor:
    """The bits of the first plane as booleans. Collective if they are spread over the ranks."""
    octets = layout.planes[0].octets
    whole = octets.whole() if isinstance(octets, Gathered) else octets
    if whole is None:
        return torch.ones(layout.numel, dtype=torch.bool)
    return unpack(whole.cpu().numpy(), layout.numel)


def _other_members(names: list[str], present: frozenset[str], expected: int, found: int) -> str:
    if not present:
        return (
            f"the gradients of {listing(names, 3)} were reduced, but no backward was seen to reach them since the last "
            "reduction: a hook of the penalty is there twice, or was taken off"
        )
    return (
        f"the buffer with the gradients of {listing(names, 3)} has {found} elements, not the {expected} of the weights that "
        "the backward has reached: gradients were set by hand, or a hook of the penalty was taken off"
    )
