"""The objective of segmentation: Dice and cross-entropy on patches; whole volumes are evaluated window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed import collectives
from ..errors import ConfigError
from .base import Metrics, Objective

Call = Callable[[dict[str, Tensor]], Tensor]


class Segmentation(Objective):
    """A class for each voxel; class 0 is the background.

    Outputs are logits [size, classes, *space], labels [size, 1, *space]. Records of an example: cross-entropy, then Dice and
    the 95th percentile of the Hausdorff distance of each class but the background. Where a class is neither in the mask nor
    found, both are NaN and left out of means (as nnU-Net does); where it is in one of them alone, Dice is 0 and the
    distance the diagonal of the volume, so that to find nothing never pays.
    """

    best = "dice"

    def __init__(
        self, names: Sequence[str], patch: Sequence[int], overlap: float, spacing: Sequence[float] | None = None
    ) -> None:
        """`patch`, `overlap`: of the windows of an evaluation; `spacing`: mm of a voxel along each axis, to measure
        distances in mm; None: in voxels."""
        self.num_outputs, self._names = len(names), list(names[1:])
        self.width = 1 + 2 * len(self._names)
        self._spacing = [1.0] * len(patch) if spacing is None else list(spacing)
        self._patch, self._overlap = tuple(patch), overlap

    def check(self, outputs: Tensor) -> None:
        if outputs.ndim != 2 + len(self._patch) or outputs.shape[1] != self.num_outputs:
            raise ConfigError(
                f"the model gives outputs of shape {list(outputs.shape)}, not [size, {self.num_outputs}, *space]: "
                'say the number in model.args, such as out_channels = "num_outputs"'
            )

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        from monai.losses import DiceCELoss

        if not len(outputs):
            return outputs.flatten(1).sum(1)  # of a rank that has no example, for the gradient's sake
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        pairs = zip(outputs.unsqueeze(1), labels.unsqueeze(1), strict=True)
        return torch.stack([loss(found, wanted) for found, wanted in pairs])

    def whole(self, call: Call, batch: dict[str, Tensor]) -> Tensor:
        """By a sliding window. Collective: ranks with fewer windows than others run the model on nothing meanwhile."""
        from monai.inferers import sliding_window_inference

        image = batch["image"]
        slide = partial(
            sliding_window_inference, image, roi_size=self._patch, sw_batch_size=1, overlap=self._overlap, mode="gaussian"
        )
        mine = 0

        def count(window: Tensor) -> Tensor:
            nonlocal mine
            mine += 1
            return torch.zeros_like(window)  # MONAI weights in place what it gets, and the window is a view of the image

        slide(predictor=count)
        # Before the first forward: in it the ranks wait for each other.
        most = max(n for (n,) in collectives.all_gather_ints([mine], what="count of windows"))
        found: Any = slide(predictor=lambda window: call({"image": window}))
        for _ in range(most - mine):
            call({"image": image.new_zeros(1, image.shape[1], *self._patch)})
        return found  # type: ignore[no-any-return]

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        from monai.metrics import compute_dice, compute_hausdorff_distance

        rows = []
        for logits, mask in zip(outputs, labels, strict=True):
            found, wanted = (_one_hot(classes, self.num_outputs) for classes in (logits.argmax(0), mask[0]))
            loss = functional.cross_entropy(logits.unsqueeze(0), mask).double().reshape(1)
            dice = compute_dice(found, wanted, include_background=False, ignore_empty=False)[0].double().cpu()
            far = (
                compute_hausdorff_distance(found, wanted, include_background=False, percentile=95, spacing=self._spacing)[0]
                .double()
                .cpu()
            )
            said, there = (one.flatten(2).any(-1)[0, 1:].cpu() for one in (found, wanted))
            far = torch.where(said & there, far, self._diagonal(mask.shape[1:]))
            nowhere = ~said & ~there
            rows.append(torch.cat([loss.cpu(), dice.masked_fill(nowhere, torch.nan), far.masked_fill(nowhere, torch.nan)]))
        return torch.stack(rows) if rows else torch.zeros(0, self.width, dtype=torch.float64)

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        n = len(self._names)
        dice, far = records[:, 1 : 1 + n], records[:, 1 + n :]
        found = {"dice": float(dice.nanmean()), "hd95": float(far.nanmean())}
        found |= {f"dice_{name}": float(dice[:, i].nanmean()) for i, name in enumerate(self._names)}
        defined = {name: value for name, value in found.items() if value == value}  # a class that is nowhere has none
        return {"loss": float(records[:, 0].mean()), **defined}

    def _diagonal(self, shape: Sequence[int]) -> Tensor:
        return torch.tensor(math.hypot(*((n - 1) * mm for n, mm in zip(shape, self._spacing, strict=True))))

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        n = len(self._names)
        return {
            **{f"dice_{name}": records[:, 1 + i].tolist() for i, name in enumerate(self._names)},
            **{f"hd95_{name}": records[:, 1 + n + i].tolist() for i, name in enumerate(self._names)},
        }


def _one_hot(mask: Tensor, classes: int) -> Tensor:
    """[1, classes, *space]."""
    return functional.one_hot(mask.long(), classes).movedim(-1, 0).unsqueeze(0)
