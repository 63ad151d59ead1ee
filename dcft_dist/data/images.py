"""The user's images as a model takes them: read when they are needed, resized, varied in training, normalised."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..config.schema import Config
from ..config.task import IMAGENET_MEAN, IMAGENET_STD
from ..errors import ConfigError, DataError, listing
from ..files import write_atomic, write_json
from .augment import Augmentation, as_tensor
from .batches import OneByOne, Processor
from .dicom import is_dicom, picture_in
from .library_processor import TRANSFORMERS, Library, as_picture, preprocessing_of
from .readers import LazyValue
from .splits import Split, name_of, places_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """Grey images [size, height, width] of uint8, given to the model as `side` x `side` in three equal channels."""

    pixels: Tensor
    labels: list[Any]
    side: int

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Normalised as ImageNet's are."""
        grey = self.pixels[list(indices)].unsqueeze(1).float() / 255
        sized = functional.interpolate(grey, (self.side, self.side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return {"pixel_values": (sized.expand(-1, 3, -1, -1) - mean) / std}


class ImageProcessor(Processor):
    """Scales images to a size."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, split: Split) -> Images:
        return Images(torch.from_numpy(split.inputs), split.labels, self.side)

    def save(self, folder: Path) -> None:
        """As transformers' image processors read it."""
        save_preprocessing(folder, self.side, list(IMAGENET_MEAN), list(IMAGENET_STD))


def read_image(source: Any, channels: int, scale: float = 1.0) -> Tensor:
    """[channels, height, width] in float32: integers are scaled to [0, `scale`], floats stay; grey goes into all channels.

    Args:
        source: path of an image, .npy or DICOM file, an array [height, width] or [height, width, channels], or a `Cell`.

    Raises:
        DataError: it cannot be read, has another number of channels, or has values that are no numbers; it is named.
    """
    name = _name(source)
    try:
        pixels = _scaled(_array(source), scale)
    except Exception as error:  # each kind of damage has its own
        raise DataError(f"{name}: no image that can be read: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] not in (1, channels, channels + 1):
        raise DataError(f"{name}: an image of shape {list(pixels.shape)} does not go into {channels} channels")
    if pixels.shape[2] == channels + 1:  # an opacity
        pixels = pixels[:, :, :channels]
    if not np.isfinite(pixels).all():
        raise DataError(f"{name}: {int((~np.isfinite(pixels)).sum())} of its pixels are no numbers (NaN or infinite)")
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).expand(channels, -1, -1)


def _name(source: Any) -> str:
    return name_of(source, repr(source) if isinstance(source, LazyValue) else "array")


def _array(source: Any) -> Any:
    from PIL import Image

    found = source.read() if isinstance(source, LazyValue) else source
    if isinstance(found, dict) and found.get("bytes"):  # as datasets keep them
        found = io.BytesIO(found["bytes"])
    if isinstance(found, str | Path | io.BytesIO):
        if not isinstance(found, io.BytesIO) and Path(found).suffix == ".npy":
            return np.load(found, allow_pickle=False)
        if not isinstance(found, io.BytesIO) and is_dicom(Path(found)):
            return np.rint(picture_in(Path(found)) * 65535).astype(np.uint16)
        with Image.open(found) as image:
            return _array_of(image)
    return _array_of(found) if isinstance(found, Image.Image) else np.asarray(found)


def _array_of(image: Any) -> Any:
    if image.mode.startswith("I"):  # 16 bits, which Pillow may give as 32
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"whole numbers from {pixels.min()} to {pixels.max()} do not go into 16 bits")
        return pixels.astype(np.uint16)
    return np.asarray(image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr") else image)


def _scaled(pixels: Any, scale: float) -> Any:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max * np.float32(scale)
    if np.issubdtype(pixels.dtype, np.integer):
        raise ValueError(f"whole numbers of {pixels.dtype}: what is white? Give uint8, uint16, or floats")
    return pixels.astype(np.float32)


class UserImageProcessor(Processor):
    """Resizes to a square or as the model's library does, varies, normalises as is said beside the weights, if there."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            ConfigError: its processor cannot be used (see `Preprocessing.processor`); mean and deviation do not fit.
        """
        self.side = config.model.image_size
        said = preprocessing_of(config.model.weights)
        self.mean = (said.mean if said else None) or list(config.data.mean)
        self.std = [float(s) for s in (said.std if said else None) or config.data.std]
        self._scale, self._said, self._crop = said.scale if said else 1.0, said, None
        if config.data.processor:
            library = self._library(config)
            self.mean, self.std, self._crop = library.mean, library.std, library.crop
        elif said and said.sizes and said.sizes != {self.side}:
            log.warning("model.image_size = %d, but %s says %s", self.side, said.file, sorted(said.sizes))
        if len(self.mean) != len(self.std):
            raise ConfigError(f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}")
        if said:
            log.info("mean %s and deviation %s of pixels: %s", self.mean, self.std, said.file)
        self._vary = Augmentation(config)

    def _library(self, config: Config) -> Library:
        if self._said is None:
            raise ConfigError(
                f"data.processor: nothing beside model.weights = {config.model.weights} says how: no "
                "preprocessor_config.json (transformers), config.json of timm, or open_clip_config.json"
            )
        return self._said.processor(self.side)

    def __call__(self, split: Split) -> OneByOne:
        return OneByOne(list(split.inputs), split.labels, "pixel_values", self.image)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """[channels, side, side]. `draw`: which random variant; None: no variation.

        Raises:
            DataError: see `read_image`.
        """
        pixels = self._sized(source)
        if draw is not None and self._vary:
            pixels = self._varied(pixels, draw)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _sized(self, source: Any) -> Tensor:
        if self._crop is not None:
            pixels = read_image(source, len(self.mean))
            try:
                return self._crop(as_picture(pixels))
            except ValueError as error:
                raise DataError(f"{_name(source)}: {error}") from error
        pixels, size = read_image(source, len(self.mean), self._scale).unsqueeze(0), (self.side, self.side)
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return pixels[0]

    def _varied(self, pixels: Tensor, draw: str) -> Tensor:
        return as_tensor(self._vary(pixels.clone(), draw), pixels).to(pixels.dtype)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every image once, each rank its part.

        Raises:
            DataError: some cannot be read; the first are named.
        """
        sources = places_of(splits)[rank::ranks]

        def problem(found: tuple[str, Any]) -> str | None:
            where, source = found
            try:
                read_image(source, len(self.mean)) if self._crop is None else self._sized(source)
            except DataError as error:
                return str(error) if isinstance(source, str | Path) else f"{where}: {error}"
            return None

        with ThreadPoolExecutor() as threads:
            wrong = [text for text in threads.map(problem, sources) if text]
        if wrong:
            raise DataError(f"{len(wrong)} of {len(sources)} images: {listing(wrong, 3)}")
        if sources and len(splits) > 1 and self._vary:  # before the run, not when others are predicted
            self.image(sources[0][1], "check")

    def save(self, folder: Path) -> None:
        """As transformers' image processors read it; with `data.processor`, what its library reads, as it was."""
        if self._crop is not None and self._said is not None:
            write_atomic(folder / self._said.file.name, self._said.file.read_bytes())
            return
        save_preprocessing(folder, self.side, self.mean, self.std, rescale_factor=self._scale / 255)


def save_preprocessing(folder: Path, side: int, mean: list[float], std: list[float], **more: Any) -> None:
    """Writes `preprocessor_config.json` as transformers' image processors read it: the whole image, resized bilinearly."""
    size = {"height": side, "width": side}
    facts = {"size": size, "image_mean": mean, "image_std": std, "resample": 2, "do_center_crop": False, **more}
    write_json(folder / TRANSFORMERS, facts)
