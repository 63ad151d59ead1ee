"""Resizes position embeddings of another length by interpolation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError

Shape = tuple[int, ...]


def _grid(name: str, old: Shape, new: Shape) -> tuple[int, int, int]:
    """(extra tokens before the grid, side of the old grid, side of the new grid) of position embeddings.

    Raises:
        CheckpointError: the embeddings are not square grids with the same number of extra tokens.
    """
    extra_limit = 9
    if len(old) == len(new) == 2 and "relative" not in name:  # CLIP: [tokens, width], at most one extra token
        old, new, extra_limit = (1, *old), (1, *new), 2
    if len(old) == len(new) == 3 and old[0] == new[0] == 1 and old[2] == new[2]:
        for extra in range(extra_limit):
            sides = math.isqrt(max(old[1] - extra, 0)), math.isqrt(max(new[1] - extra, 0))
            if all(side and side**2 == shape[1] - extra for side, shape in zip(sides, (old, new), strict=True)):
                return extra, *sides
    if len(old) == len(new) == 4 and old[0] == new[0] == 1 and old[3] == new[3] and old[1] == old[2] and new[1] == new[2]:
        return 0, old[1], new[1]
    raise CheckpointError(f"{name} cannot be resized from {list(old)} to {list(new)}: these are not square grids of tokens")


def can_resize(name: str, old: Shape, new: Shape) -> bool:
    """Whether a tensor looks like position embeddings that `resized` can interpolate.

    Args:
        name: name of the weight.
        old: its shape in the file.
        new: its shape in the model.
    """
    try:
        check_resize(name, old, new)
    except CheckpointError:
        return False
    return "pos" in name


def check_resize(name: str, old: Shape, new: Shape) -> None:
    """Checks that position embeddings can be interpolated.

    Args:
        name: name of the weight.
        old: its shape in the file.
        new: its shape in the model.

    Raises:
        CheckpointError: the shapes are not square grids of tokens with the same number of extra tokens.
    """
    if not _is_relative(name, old, new):
        _grid(name, old, new)


def _is_relative(name: str, old: Shape, new: Shape) -> bool:
    """Whether these are embeddings of relative distances along an axis, [distances, width]."""
    return name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w") and len(old) == len(new) == 2 and old[1] == new[1]


def resized(name: str, values: Tensor, shape: Shape) -> Tensor:
    """Interpolates position embeddings to another shape, in float32. Extra tokens, such as the class token, stay unchanged.

    Grids are interpolated bicubically. Relative distances are interpolated linearly, as in Segment Anything (Kirillov et al.
    2023).

    Args:
        name: name of the weight; `rel_pos_h` and `rel_pos_w` are relative distances.
        values: [1, tokens, width], [tokens, width], [1, side, side, width], or [distances, width].
        shape: shape to interpolate to.

    Raises:
        CheckpointError: see `check_resize`.
    """
    if _is_relative(name, tuple(values.shape), shape):
        return functional.interpolate(values.float().T.unsqueeze(0), shape[0], mode="linear")[0].T
    extra, old, new = _grid(name, tuple(values.shape), shape)
    flat = values.float().reshape(1, -1, values.shape[-1])
    grid = flat[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([flat[:, :extra], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], 1).reshape(shape)
