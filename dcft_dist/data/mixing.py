"""MixUp and CutMix: training images mixed in pairs, and their labels with them.

The images of a micro-batch are mixed with those one place further on, all by the same share, as in torchvision
(`transforms.v2.MixUp`, `CutMix`). The share is a function of (seed, step, micro-batch). So with micro-batches of one size
it does not depend on the number of ranks. The transforms of that name in MONAI are for segmentation; they do not mix labels
of classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .batches import Batch

_NO_INPUT = ("labels", "index", "real")


def mixed(batch: Batch, mixup: float, cutmix: float, classes: int, seed: int) -> Batch:
    """A batch with mixed images.

    Args:
        batch: with images or volumes [size, channels, *space].
        mixup: alpha of MixUp (Zhang et al. 2018): images and labels are lam x one + (1 - lam) x the other, lam from
            Beta(alpha, alpha). 0: no MixUp.
        cutmix: alpha of CutMix (Yun et al. 2019): a box with the share 1 - lam of the other image. 0: no CutMix. With both,
            each is taken half of the time.
        classes: number of classes of labels [size]; labels [size, findings] are mixed as they are.
        seed: of this batch.

    Returns:
        The same with mixed images, and with labels [size, classes or findings] as shares.
    """
    generator = np.random.default_rng(seed)
    cut = cutmix > 0.0 and (mixup == 0.0 or bool(generator.random() < 0.5))
    alpha = cutmix if cut else mixup
    share = float(generator.beta(alpha, alpha))
    images = {name: value for name, value in batch.items() if name not in _NO_INPUT}
    if cut:
        space = next(iter(images.values())).shape[2:]
        box = _box(space, share, generator)
        share = 1.0 - math.prod(part.stop - part.start for part in box) / math.prod(space)
        images = {name: _pasted(value, box) for name, value in images.items()}
    else:
        images = {name: _blended(value, share) for name, value in images.items()}
    labels = batch["labels"]
    shares = labels if labels.ndim == 2 else functional.one_hot(labels, classes)
    return {**batch, **images, "labels": _blended(shares.float(), share)}


def _blended(values: Tensor, share: float) -> Tensor:
    return values.mul(share).add_(values.roll(1, 0), alpha=1.0 - share)


def _pasted(images: Tensor, box: list[slice]) -> Tensor:
    found = images.clone()
    place: tuple[Any, ...] = (..., *box)
    found[place] = images.roll(1, 0)[place]
    return found


def _box(space: torch.Size, share: float, generator: np.random.Generator) -> list[slice]:
    """A box around a random place with the share 1 - `share` of the space, cut at the borders."""
    half = 0.5 * (1.0 - share) ** (1 / len(space))
    box = []
    for size in space:
        middle, reach = int(generator.integers(size)), int(half * size)
        box.append(slice(max(middle - reach, 0), min(middle + reach, size)))
    return box
