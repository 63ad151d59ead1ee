"""Position embeddings of another length: interpolates them to the model's grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError

Shape = tuple[int, ...]


def _grid(name: str, old: Shape, new: Shape) -> tuple[int, int, int]:
    """(extra tokens before the grid, side of the old grid, of the new one) of position embeddings.

    Raises:
        CheckpointError: they are no square grids with equally many extra tokens.
    """
    most = 9
    if len(old) == len(new) == 2 and "relative" not in name:  # as CLIP has them, with one token before; texts have none such
        old, new, most = (1, *old), (1, *new), 2
    if len(old) == len(new) == 3 and old[0] == new[0] == 1 and old[2] == new[2]:
        for extra in range(most):
            sides = math.isqrt(max(old[1] - extra, 0)), math.isqrt(max(new[1] - extra, 0))
            if all(side and side**2 == shape[1] - extra for side, shape in zip(sides, (old, new), strict=True)):
                return extra, *sides
    if len(old) == len(new) == 4 and old[0] == new[0] == 1 and old[3] == new[3] and old[1] == old[2] and new[1] == new[2]:
        return 0, old[1], new[1]
    raise CheckpointError(f"{name} cannot be resized from {list(old)} to {list(new)}: these are no square grids of tokens")


def can_resize(name: str, old: Shape, new: Shape) -> bool:
    try:
        check_resize(name, old, new)
    except CheckpointError:
        return False
    return "pos" in name


def check_resize(name: str, old: Shape, new: Shape) -> None:
    """
    Raises:
        CheckpointError: see `_grid`.
    """
    if not _is_relative(name, old, new):
        _grid(name, old, new)


def _is_relative(name: str, old: Shape, new: Shape) -> bool:
    """Whether these are embeddings of distances along an axis, [distances, width]."""
    return name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w") and len(old) == len(new) == 2 and old[1] == new[1]


def resized(name: str, values: Tensor, shape: Shape) -> Tensor:
    """Bicubic interpolation of the grid; extra tokens stay. [1, tokens, width], [tokens, width] or [1, side, side, width].

    Of distances linear, as Segment Anything does it (Kirillov et al. 2023).
    """
    if _is_relative(name, tuple(values.shape), shape):
        return functional.interpolate(values.float().T.unsqueeze(0), shape[0], mode="linear")[0].T
    extra, old, new = _grid(name, tuple(values.shape), shape)
    flat = values.float().reshape(1, -1, values.shape[-1])
    grid = flat[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([flat[:, :extra], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], 1).reshape(shape)
