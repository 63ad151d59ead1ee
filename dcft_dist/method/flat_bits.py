"""The bits of several weights in the order of one flat tensor: a leaf, or the buffer that a collective reduces.

The numbers that cells may be multiplied by are spread over *planes*. A plane has a bit for each cell of the tensor, and
multiplies the cells with a bit by one number. If the tensor is one weight, one plane does it all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..compat.pytorch import has_values
from ..distributed.gathered import Gathered
from ..engines.base import Segment
from .bits import Packed, num_bytes, pack, unpack
from .multipliers import Multipliers, Number, Plane, on

Masks = Mapping[str, Tensor | None]  # name -> fundamental cells of the weight, in its box's shape; None: an unscored weight


LayOut = Callable[[Mapping[str, Tensor]], Tensor]  # masks of weights, by name -> mask of the flat tensor


def masks_of(segments: Sequence[Segment], bits: Mapping[str, Packed | None], values: bool = True) -> Masks:
    """Unpacks the bits of the penalised weights among these. `values`: False in `dcft plan`, where nobody reads them."""
    found: dict[str, Tensor | None] = {}
    for s in segments:
        if s.name in bits:
            packed = bits[s.name]
            mask = None if packed is None else unpack(packed, s.box.numel) if values else torch.empty(s.box.numel).bool()
            found[s.name] = None if mask is None else mask.view(s.box.size)
    return found


def planes_of(
    segments: Sequence[Segment],
    masks: Masks,
    multipliers: Multipliers,
    lay_out: LayOut,
    device: torch.device,
    shared: bool = False,
) -> tuple[Plane, ...]:
    """Lays out the bits of penalised weights in a flat tensor.

    Args:
        segments: the weights in the tensor.
        masks: the fundamental cells of those that are penalised.
        multipliers: says which numbers differ from 1.
        lay_out: puts masks of weights in the order of the tensor. Cells of weights without a mask are False.
        device: where the bits are stored.
        shared: True: each rank stores an equal part of them.

    Returns:
        The planes, that of the factor first. Applied one after the other, they multiply each cell at most once by another
        number than 1.
    """
    chosen = {name: mask for name, mask in masks.items() if mask is not None}
    planes: list[tuple[Number, Mapping[str, Tensor]]] = [("factor", chosen)]
    if multipliers.rest != 1.0 and chosen:
        planes.append(("rest", {name: ~mask for name, mask in chosen.items()}))
    if multipliers.unscored != 1.0 and len(chosen) < len(masks):
        boxes = {s.name: s.box for s in segments}
        unscored = {n: torch.ones(boxes[n].size, dtype=torch.bool) for n, mask in masks.items() if mask is None}
        planes.append(("unscored", unscored))
    what = f"bits of {segments[0].name}"
    found = []
    for number, cells in planes:
        flat = lay_out(cells)
        packed = pack(flat) if has_values(flat) else np.zeros(num_bytes(flat.numel()), np.uint8)
        found.append(Plane(_stored(packed, device, shared, what), number, "one"))
    return tuple(found)


def single_plane(name: str, bits: Packed | None, device: torch.device, shared: bool = False) -> tuple[Plane, ...]:
    """The plane of a tensor that is one weight; arguments as for `planes_of`."""
    if bits is None:
        return (Plane(None, "unscored", "unscored"),)
    return (Plane(_stored(bits, device, shared, f"bits of {name}"), "factor", "rest"),)


def side_by_side(segments: Sequence[Segment], numel: int) -> LayOut:
    """The order of a flattened leaf: each weight at its offset."""

    def lay_out(masks: Mapping[str, Tensor]) -> Tensor:
        flat = torch.zeros(numel, dtype=torch.bool)
        for s in segments:
            if s.name in masks:
                flat[s.offset : s.offset + s.box.numel] = masks[s.name].reshape(-1)
        return flat

    return lay_out


def _stored(packed: Packed, device: torch.device, shared: bool, what: str) -> Tensor | Gathered:
    octets = on(device, packed)
    return Gathered(octets, what) if shared else octets
