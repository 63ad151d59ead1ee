"""The objective of segmentation: Dice and cross-entropy on patches, and evaluation of whole volumes window by window."""

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

Call = Callable[[dict[str, Tensor]], Tensor]  # runs the model on a batch


class Segmentation(Objective):
    """A class for each voxel; class 0 is the background.

    Outputs are logits [size, classes, *space], labels [size, 1, *space]. A record contains the cross-entropy, the Dice of
    each class, and the 95th percentile of the Hausdorff distance of each class. The background has no Dice and no distance.

    If a class is neither in the mask nor in the prediction, both values are NaN and left out of means, as in nnU-Net. If it
    is in only one of the two, Dice is 0 and the distance is the diagonal of the volume. So predicting nothing never pays.
    """

    best = "dice"

    def __init__(
        self, names: Sequence[str], patch: Sequence[int], overlap: float, spacing: Sequence[float] | None = None
    ) -> None:
        """Prepares the objective.

        Args:
            names: names of the classes, the background first.
            patch: size of an evaluation window along each axis, in voxels.
            overlap: overlap of neighbouring windows, from 0 to below 1.
            spacing: size of a voxel along each axis in mm, to measure distances in mm. None: distances are in voxels.
        """
        self.num_outputs, self._names = len(names), list(names[1:])
        self.width = 1 + 2 * len(self._names)
        self._spacing = [1.0] * len(patch) if spacing is None else list(spacing)
        self._patch, self._overlap = tuple(patch), overlap

    def check(self, outputs: Tensor) -> None:
        """Checks the shape of the model's outputs.

        Raises:
            ConfigError: outputs are not [size, classes, *space].
        """
        if outputs.ndim != 2 + len(self._patch) or outputs.shape[1] != self.num_outputs:
            raise ConfigError(
                f"the model returns outputs of shape {list(outputs.shape)}, not [size, {self.num_outputs}, *space]: "
                'set the number in model.args, such as out_channels = "num_outputs"'
            )

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        from monai.losses import DiceCELoss

        if not len(outputs):
            return outputs.flatten(1).sum(1)  # [0], with a gradient, for a rank without examples
        loss = DiceCELoss(to_onehot_y=True, softmax=True)
        pairs = zip(outputs.unsqueeze(1), labels.unsqueeze(1), strict=True)
        return torch.stack([loss(logits, mask) for logits, mask in pairs])

    def whole(self, call: Call, batch: dict[str, Tensor]) -> Tensor:
        """Predicts whole volumes with a sliding window. Collective.

        Ranks with fewer windows than others run the model on zeros, so that every rank takes part in every forward.

        Args:
            call: runs the model on a batch.
            batch: contains `image` [size, channels, *whole].

        Returns:
            Logits [size, classes, *whole].
        """
        from monai.inferers import sliding_window_inference

        image = batch["image"]
        slide = partial(
            sliding_window_inference, image, roi_size=self._patch, sw_batch_size=1, overlap=self._overlap, mode="gaussian"
        )
        num_windows = 0

        def count(window: Tensor) -> Tensor:
            nonlocal num_windows
            num_windows += 1
            # Not the window itself: MONAI changes the predictor's output in place, and the window is a view of the image.
            return torch.zeros_like(window)

        slide(predictor=count)
        # The number must be known before the first forward, in which the ranks wait for each other.
        most = max(n for (n,) in collectives.all_gather_ints([num_windows], what="number of windows"))
        logits: Any = slide(predictor=lambda window: call({"image": window}))
        for _ in range(most - num_windows):
            call({"image": image.new_zeros(1, image.shape[1], *self._patch)})
        return logits  # type: ignore[no-any-return]

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        from monai.metrics import compute_dice, compute_hausdorff_distance

        rows = []
        for logits, mask in zip(outputs, labels, strict=True):
            predicted, target = (_one_hot(classes, self.num_outputs) for classes in (logits.argmax(0), mask[0]))
            loss = functional.cross_entropy(logits.unsqueeze(0), mask).double().reshape(1)
            dice = compute_dice(predicted, target, include_background=False, ignore_empty=False)[0].double().cpu()
            distance = (
                compute_hausdorff_distance(
                    predicted, target, include_background=False, percentile=95, spacing=self._spacing
                )[0]
                .double()
                .cpu()
            )
            in_prediction, in_mask = (one_hot.flatten(2).any(-1)[0, 1:].cpu() for one_hot in (predicted, target))
            distance = torch.where(in_prediction & in_mask, distance, self._diagonal(mask.shape[1:]))
            absent = ~in_prediction & ~in_mask
            rows.append(
                torch.cat([loss.cpu(), dice.masked_fill(absent, torch.nan), distance.masked_fill(absent, torch.nan)])
            )
        return torch.stack(rows) if rows else torch.zeros(0, self.width, dtype=torch.float64)

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        n = len(self._names)
        dice, distance = records[:, 1 : 1 + n], records[:, 1 + n :]
        means = {"dice": float(dice.nanmean()), "hd95": float(distance.nanmean())}
        means |= {f"dice_{name}": float(dice[:, i].nanmean()) for i, name in enumerate(self._names)}
        defined = {name: value for name, value in means.items() if value == value}  # not those of absent classes
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
    """Returns [1, classes, *space]."""
    return functional.one_hot(mask.long(), classes).movedim(-1, 0).unsqueeze(0)
