"""Volumes with a label each, such as a diagnosis: read as those of a segmentation, and brought to one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .data import OneByOne
from .errors import ConfigError, DataError
from .schema import Config
from .splits import Split, name_of
from .variation import as_tensor
from .volumes import Pair, VolumeProcessor


class LabelledVolumeProcessor(VolumeProcessor):
    """Cuts volumes, or fills them up, to the size of `data.patch` around their middle."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from monai.transforms import ResizeWithPadOrCrop

        self._fit: Any = ResizeWithPadOrCrop(config.data.patch)
        self._fitted: dict[Any, Tensor] = {}
        self._channels: int | None = None  # of the first volume that was read

    def __call__(self, split: Split) -> OneByOne:  # type: ignore[override]
        return OneByOne(list(split.inputs), split.labels, "image", self.image)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """[channels, *patch]. `draw`: which random variant; None: no variation.

        Raises:
            DataError: see `VolumeProcessor.whole`.
            ConfigError: `data.transform` makes something else of it.
        """
        if (image := self._fitted.get(source)) is None:
            image = self._read_fitting(source)
            if self._cache:
                self._fitted[source] = image
        if draw is None or not self._vary:
            return image
        found = self._vary({"image": image.clone()}, draw)
        if not isinstance(found, dict) or "image" not in found:
            raise ConfigError("data.transform: it is to give a dictionary with image, as it gets one")
        return as_tensor(found["image"], image).to(image.dtype)

    def _read_fitting(self, source: Any) -> Tensor:
        whole, _ = self.whole((source, None))
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
        super().check([Split(split.inputs, [None] * len(split), split.groups) for split in splits], rank, ranks)
        if self._vary and len(splits) > 1 and len(splits[0]):
            self.image(splits[0].inputs[0], "check")

    def _problem(self, pair: Pair) -> str | None:
        if text := super()._problem(pair):
            return text
        try:
            image = self.image(pair[0])
        except DataError as error:
            return str(error)
        self._channels = self._channels or len(image)
        if len(image) != self._channels:
            return f"{name_of(pair[0], '')} has {len(image)} channels, others {self._channels}"
        return None

    def check_classes(self, train: Split, names: Sequence[str]) -> None:
        """There are no masks: a class without examples has been found with the labels."""
