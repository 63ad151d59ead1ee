"""Volumes as a model takes them: patches with masks for segmentation, or whole volumes of one size with a label each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
    """A split of volumes with masks. `labels` are placeholders: the masks are part of `inputs`."""

    pairs: list[Pair]
    processor: VolumeProcessor
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`image` [size, channels, *patch] and `labels` [size, 1, *patch]; without `draw`, whole volumes of one shape."""
        if draw is None:
            read = [self.processor.reader.whole(self.pairs[i]) for i in indices]
        else:
            read = [self.processor.patch(self.pairs[i], f"{draw}:{i}", vary=draw > 0) for i in indices]
        images, masks = zip(*read, strict=True)
        if masks[0] is None:
            return {"image": torch.stack(images)}
        return {"image": torch.stack(images), "labels": torch.stack(masks).long()}


class VolumeProcessor(Processor):
    """Makes training patches of one size from pairs of image and mask."""

    def __init__(self, config: Config) -> None:
        self.reader = VolumeReader(config)
        self._seed, self._vary, patch = config.seed, Augmentation(config), list(config.data.patch)
        from monai import transforms as mt

        keys = ["image", "mask"]
        pad = mt.SpatialPadd(keys, patch)
        self._crop = mt.Compose([pad, mt.RandCropByPosNegLabeld(keys, "mask", patch, pos=1, neg=1, num_samples=1)])

    def __call__(self, split: Split) -> Volumes:
        return Volumes(_pairs_of(split), self, [0] * len(split))

    def patch(self, pair: Pair, draw: str, vary: bool = True) -> tuple[Tensor, Tensor]:
        """Image [channels, *patch] and mask [1, *patch] at a random place; half of the draws are around a structure.

        Raises:
            ConfigError: `data.transform` returns something else than image and mask.
        """
        image, mask = self.reader.whole(pair)
        self._crop.set_random_state(seed_of(self._seed, draw))
        cropped = self._crop({"image": image, "mask": mask})[0]
        image, mask = cropped["image"].as_tensor(), cropped["mask"].as_tensor()
        return self._varied(image, mask, draw) if vary and self._vary else (image, mask)

    def _varied(self, image: Tensor, mask: Tensor, draw: str) -> tuple[Tensor, Tensor]:
        # The transform has a seed of its own, or its draws would depend on where the crop lies. It gets copies, since
        # volumes stay in memory.
        varied = self._vary({"image": image.clone(), "mask": mask.clone()}, f"{draw}:transform")
        if not isinstance(varied, dict) or not {"image", "mask"} <= varied.keys():
            raise ConfigError("data.transform: it is to give a dictionary with image and mask, as it gets one")
        tensors = [as_tensor(varied[key], before) for key, before in (("image", image), ("mask", mask))]
        if wrong := self.reader.stray_values(tensors[1]):
            raise ConfigError(f"data.transform: the mask has values {listing(wrong)}: it is to be interpolated by nearest")
        return tensors[0].to(image.dtype), tensors[1].to(mask.dtype)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads image and mask of every pair once and compares them, each rank its part.

        Raises:
            DataError: grids differ, values are not finite or no classes; the first are named.
        """
        pairs = [pair for split in splits for pair in _pairs_of(split)][rank::ranks]
        check_all(pairs, self.reader.problem)
        training = len(splits) > 1  # the transform is tried before a run, not before a prediction
        if pairs and pairs[0][1] is not None and training and self._vary:
            self.patch(pairs[0], "check")

    def classes_seen(self, split: Split) -> set[int] | None:
        return self.reader.classes_in(_pairs_of(split))


class LabelledVolumeProcessor(Processor):
    """Volumes with a label each, such as a diagnosis: cuts or pads them to the size of `data.patch` around their middle."""

    def __init__(self, config: Config) -> None:
        self._reader, self._vary, self._patch = VolumeReader(config), Augmentation(config), list(config.data.patch)
        from monai.transforms import ResizeWithPadOrCrop

        self._fit: Any = ResizeWithPadOrCrop(config.data.patch)
        self._cache, self._cached = config.data.cache, dict[Any, Tensor]()
        self._channels: int | None = None  # of the first volume that was read

    def __call__(self, split: Split) -> OneByOne:
        return OneByOne(list(split.inputs), split.labels, "image", self.image)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """[channels, *patch]. `draw`: which random variant; None: no variation.

        Raises:
            DataError: see `VolumeReader.whole`.
            ConfigError: `data.transform` returns something else than an image.
        """
        if (image := self._cached.get(source)) is None:
            image = self._read_fitting(source)
            if self._cache:
                self._cached[source] = image
        if draw is None or not self._vary:
            return image
        varied = self._vary({"image": image.clone()}, draw)
        if not isinstance(varied, dict) or "image" not in varied:
            raise ConfigError("data.transform: it is to give a dictionary with image, as it gets one")
        return as_tensor(varied["image"], image).to(image.dtype)

    def _read_fitting(self, source: Any) -> Tensor:
        whole, _ = self._reader.whole((source, None))
        axes = list(whole.shape[1:])
        if len(axes) != len(self._patch):
            raise DataError(f"{name_of(source, '')} is {axes} once it is turned, and data.patch {self._patch}")
        fitting: Tensor = self._fit(whole).as_tensor()
        return fitting

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every volume once, each rank its part.

        Raises:
            DataError: some cannot be read; the first are named.
        """
        self._cache = self._cache and len(splits) > 1  # what is predicted is read once
        check_all([(image, None) for split in splits for image in split.inputs][rank::ranks], self._problem)
        if self._vary and len(splits) > 1 and len(splits[0]):
            self.image(splits[0].inputs[0], "check")

    def _problem(self, pair: Pair) -> str | None:
        if text := self._reader.problem(pair):
            return text
        try:
            image = self.image(pair[0])
        except DataError as error:
            return str(error)
        self._channels = self._channels or len(image)
        if len(image) != self._channels:
            return f"{name_of(pair[0], '')} has {len(image)} channels, others {self._channels}"
        return None


def _pairs_of(split: Split) -> list[Pair]:
    return list(zip(split.inputs, split.labels, strict=True))
