"""Volumes as a model takes them.

`VolumeProcessor` makes patches with masks for segmentation. `LabelledVolumeProcessor` makes whole volumes of one size, each
with a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, DataError, listing
from ..seeds import seed_of
from .augment import Augmentation, as_tensor
from .batches import OneByOne, Processor
from .splits import Split, name_of
from .volume_reader import Pair, VolumeReader, check_all


@dataclass(frozen=True)
class Volumes:
    """A split of volumes with masks.

    Attributes:
        pairs: paths of image and mask of each example.
        processor: reads and crops the volumes.
        labels: placeholders; the masks are part of `inputs`.
    """

    pairs: list[Pair]
    processor: VolumeProcessor
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    def length(self, index: int) -> int:
        """Returns 0: volumes are evaluated in their own order."""
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns patches, or whole volumes; see `Examples.inputs`.

        Args:
            indices: which examples.
            draw: None: whole volumes, which must have one shape. A number: patches.

        Returns:
            `image` [size, channels, *patch] and, if there are masks, `labels` [size, 1, *patch].
        """
        if draw is None:
            examples = [self.processor.reader.whole(self.pairs[i]) for i in indices]
        else:
            examples = [self.processor.patch(self.pairs[i], f"{draw}:{i}", vary=draw > 0) for i in indices]
        images, masks = zip(*examples, strict=True)
        if masks[0] is None:
            return {"image": torch.stack(images)}
        return {"image": torch.stack(images), "labels": torch.stack(masks).long()}


_DRAWN_AS = "Middle slices: sagittal (its right is anterior), coronal and axial (their right is the patient's right)."


class VolumeProcessor(Processor):
    """Makes training patches of the size `data.patch` from pairs of image and mask."""

    drawn_as = _DRAWN_AS

    def __init__(self, config: Config) -> None:
        """Prepares the reader, and imports `data.transform`.

        Raises:
            ConfigError: the package monai is not installed, or `data.transform` cannot be imported or built.
        """
        self.reader = VolumeReader(config)
        self._seed, self._augment, patch = config.seed, Augmentation(config), list(config.data.patch)
        from monai import transforms as mt

        keys = ["image", "mask"]
        pad = mt.SpatialPadd(keys, patch)
        self._crop = mt.Compose([pad, mt.RandCropByPosNegLabeld(keys, "mask", patch, pos=1, neg=1, num_samples=1)])

    def __call__(self, split: Split) -> Volumes:
        return Volumes(_pairs_of(split), self, [0] * len(split))

    def patch(self, pair: Pair, draw: str, vary: bool = True) -> tuple[Tensor, Tensor]:
        """Cuts a patch at a random position; half of the draws are centred on a structure.

        Args:
            pair: paths of image and mask.
            draw: name of the random position and variant.
            vary: whether `data.transform` is applied.

        Returns:
            Image [channels, *patch] and mask [1, *patch].

        Raises:
            DataError: see `VolumeReader.whole`.
            ConfigError: `data.transform` fails, or does not return an image and a mask that fit.
        """
        image, mask = self.reader.whole(pair)
        self._crop.set_random_state(seed_of(self._seed, draw))
        cropped = self._crop({"image": image, "mask": mask})[0]
        image, mask = cropped["image"].as_tensor(), cropped["mask"].as_tensor()
        return self._augmented(image, mask, draw) if vary and self._augment else (image, mask)

    def _augmented(self, image: Tensor, mask: Tensor, draw: str) -> tuple[Tensor, Tensor]:
        # The transform has its own seed, so that its draws do not depend on the position of the crop. It gets copies,
        # because volumes stay in memory.
        variant = self._augment({"image": image.clone(), "mask": mask.clone()}, f"{draw}:transform")
        if not isinstance(variant, dict) or not {"image", "mask"} <= variant.keys():
            raise ConfigError("data.transform: it must return a dictionary with image and mask, like the one it takes")
        tensors = [as_tensor(variant[key], before) for key, before in (("image", image), ("mask", mask))]
        if strays := self.reader.stray_values(tensors[1]):
            raise ConfigError(
                f"data.transform: the mask has values {listing(strays)}, which are not classes: interpolate masks by "
                "nearest neighbour"
            )
        return tensors[0].to(image.dtype), tensors[1].to(mask.dtype)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every pair of image and mask once and compares the two. Each rank reads its part.

        Raises:
            DataError: a file cannot be read, grids differ, or values are NaN, infinite or not classes; the message names the
                first.
            ConfigError: `data.transform` fails on the first pair, or does not return what it must.
        """
        every = [pair for split in splits for pair in _pairs_of(split)]
        if every:
            self.reader.problem(every[0])  # on all ranks: its channels are compared with those of all others
        pairs = every[rank::ranks]
        check_all(pairs, self.reader.problem)
        training = len(splits) > 1  # the transform is tried before a run, not before a prediction
        if pairs and pairs[0][1] is not None and training and self._augment:
            self.patch(pairs[0], "check")

    def describe(self, value: Any, label: Any) -> str:
        return self.reader.described((value, label))

    def picture(self, value: Any, label: Any) -> NDArray[np.uint8]:
        return self.reader.drawn((value, label))

    def classes_seen(self, split: Split) -> set[int] | None:
        return self.reader.classes_in(_pairs_of(split))


class LabelledVolumeProcessor(Processor):
    """Cuts or pads volumes to the size `data.patch` around their centre; each volume has a label, such as a diagnosis."""

    drawn_as = _DRAWN_AS

    def __init__(self, config: Config) -> None:
        """Prepares the reader, and imports `data.transform`.

        Raises:
            ConfigError: the package monai is not installed, or `data.transform` cannot be imported or built.
        """
        self._reader, self._augment, self._patch = VolumeReader(config), Augmentation(config), list(config.data.patch)
        from monai.transforms import ResizeWithPadOrCrop

        self._fit: Any = ResizeWithPadOrCrop(config.data.patch)
        self._cache, self._cached = config.data.cache, dict[Any, Tensor]()

    def __call__(self, split: Split) -> OneByOne:
        return OneByOne(list(split.inputs), split.labels, "image", self.image)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """Reads one volume and fits it to the size of `data.patch`.

        Args:
            source: path of the volume, or a tuple of paths, its channels.
            draw: name of the random variant; None: no variation.

        Returns:
            [channels, *patch].

        Raises:
            DataError: see `VolumeReader.whole`; or the volume and `data.patch` have different numbers of axes.
            ConfigError: `data.transform` fails, or does not return an image of the same shape.
        """
        if (image := self._cached.get(source)) is None:
            image = self._read_fitting(source)
            if self._cache:
                self._cached[source] = image
        if draw is None or not self._augment:
            return image
        variant = self._augment({"image": image.clone()}, draw)
        if not isinstance(variant, dict) or "image" not in variant:
            raise ConfigError("data.transform: it must return a dictionary with image, like the one it takes")
        return as_tensor(variant["image"], image).to(image.dtype)

    def _read_fitting(self, source: Any) -> Tensor:
        whole, _ = self._reader.whole((source, None))
        shape = list(whole.shape[1:])
        if len(shape) != len(self._patch):
            raise DataError(
                f"{name_of(source, '')} has shape {shape} after reorientation, but data.patch is {self._patch}: give it one "
                "number per axis"
            )
        fitting: Tensor = self._fit(whole).as_tensor()
        return fitting

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every volume once. Each rank reads its part.

        Raises:
            DataError: some volumes cannot be read, or have another number of channels; the message names the first.
            ConfigError: `data.transform` fails on the first volume, or does not return what it must.
        """
        self._cache = self._cache and len(splits) > 1  # one split is for a prediction, which needs each volume only once
        every: list[Pair] = [(image, None) for split in splits for image in split.inputs]
        if every:
            self._reader.problem(every[0])
        check_all(every[rank::ranks], self._problem)
        if self._augment and len(splits) > 1 and len(splits[0]):
            self.image(splits[0].inputs[0], "check")

    def describe(self, value: Any, label: Any) -> str:
        return self._reader.described((value, None))

    def picture(self, value: Any, label: Any) -> NDArray[np.uint8]:
        return self._reader.drawn((value, None))

    def _problem(self, pair: Pair) -> str | None:
        if text := self._reader.problem(pair):
            return text
        try:
            self.image(pair[0])
        except DataError as error:
            return str(error)
        return None


def _pairs_of(split: Split) -> list[Pair]:
    return list(zip(split.inputs, split.labels, strict=True))
