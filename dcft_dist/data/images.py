"""Images as a model takes them: read when needed, resized, varied in training and normalised.

`ImageProcessor` is for the grey patches of the task `mri_region`, `UserImageProcessor` for the user's images.
"""

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
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..config.schema import Config
from ..config.task import IMAGENET_MEAN, IMAGENET_STD
from ..errors import ConfigError, DataError, counted, listing
from ..files import write_atomic, write_json
from ..packages import local_weights
from .augment import Augmentation, as_tensor
from .batches import OneByOne, Processor
from .dicom import is_dicom, picture_in
from .library_processor import TRANSFORMERS, Library, as_picture, preprocessing_of
from .pictures import open_picture, plain_picture
from .readers import LazyValue
from .splits import Split, name_of, places_of
from .understood import as_rgb

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """A split of grey images, which the model gets in three equal channels.

    Attributes:
        pixels: [size, height, width] of uint8.
        labels: label of each image.
        side: height and width of the model's input, in pixels.
    """

    pixels: Tensor
    labels: list[Any]
    side: int

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        """Returns 0: all images have one size."""
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns `pixel_values` [size, 3, side, side], normalised with ImageNet's mean and deviation."""
        grey = self.pixels[list(indices)].unsqueeze(1).float() / 255
        resized = functional.interpolate(grey, (self.side, self.side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return {"pixel_values": (resized.expand(-1, 3, -1, -1) - mean) / std}


class ImageProcessor(Processor):
    """Resizes grey images to a square and normalises them with ImageNet's mean and deviation."""

    def __init__(self, side: int) -> None:
        """Prepares the processor.

        Args:
            side: height and width of the model's input, in pixels.
        """
        self.side = side

    def __call__(self, split: Split) -> Images:
        return Images(torch.from_numpy(split.inputs), split.labels, self.side)

    def describe(self, value: Any, label: Any) -> str:
        return f"{value.shape[1]} x {value.shape[0]} pixels, grey, from {value.min()} to {value.max()}"

    def picture(self, value: Any, label: Any) -> NDArray[np.uint8]:
        return as_rgb(value / 255)

    def save(self, folder: Path) -> None:
        """Writes `preprocessor_config.json` for transformers."""
        save_preprocessing(folder, self.side, list(IMAGENET_MEAN), list(IMAGENET_STD))


def read_image(source: Any, channels: int, scale: float = 1.0) -> Tensor:
    """Reads one image.

    Args:
        source: path of an image, .npy or DICOM file; or an array [height, width] or [height, width, channels]; or a
            `LazyValue`.
        channels: channels of the result. A grey image is repeated in all of them; an opacity channel is dropped.
        scale: value of white. Integers are scaled to [0, `scale`]; floats stay as they are.

    Returns:
        [channels, height, width] of float32.

    Raises:
        DataError: the image cannot be read, has another number of channels, or has values that are NaN or infinite; the
            message names it.
    """
    name = _name(source)
    try:
        pixels = _scaled(_array(source), scale)
    except Exception as error:  # each kind of damage raises its own
        raise DataError(f"{name}: cannot be read as an image: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] not in (1, channels, channels + 1):
        raise DataError(f"{name}: an image of shape {list(pixels.shape)} does not fit {channels} channels")
    if pixels.shape[2] == channels + 1:  # the last channel is the opacity
        pixels = pixels[:, :, :channels]
    if not np.isfinite(pixels).all():
        raise DataError(f"{name}: {int((~np.isfinite(pixels)).sum())} of its pixel values are NaN or infinite")
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).expand(channels, -1, -1)


def _name(source: Any) -> str:
    return name_of(source, repr(source) if isinstance(source, LazyValue) else "array")


def _array(source: Any) -> Any:
    from PIL import Image

    value = source.read() if isinstance(source, LazyValue) else source
    if isinstance(value, dict) and value.get("bytes"):  # how `datasets` stores images
        value = io.BytesIO(value["bytes"])
    if isinstance(value, str | Path | io.BytesIO):
        if not isinstance(value, io.BytesIO) and Path(value).suffix == ".npy":
            return np.load(value, allow_pickle=False)
        if not isinstance(value, io.BytesIO) and is_dicom(Path(value)):
            return np.rint(picture_in(Path(value)) * 65535).astype(np.uint16)
        return np.asarray(open_picture(value if isinstance(value, io.BytesIO) else Path(value), plain_picture))
    return np.asarray(plain_picture(value) if isinstance(value, Image.Image) else value)


def _scaled(pixels: Any, scale: float) -> Any:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max * np.float32(scale)
    if np.iscomplexobj(pixels):
        raise ValueError("pixels are complex numbers: save their modulus, or what else is meant")
    if np.issubdtype(pixels.dtype, np.integer):
        raise ValueError(f"pixels of {pixels.dtype} do not say which value is white: use uint8, uint16 or floats")
    return pixels.astype(np.float32)


class UserImageProcessor(Processor):
    """Resizes, varies and normalises the user's images.

    Images become squares of `model.image_size`, or with `data.processor` what the model's library makes of them. Mean and
    deviation come from the file beside the weights if it has them, otherwise from `data.mean` and `data.std`.
    """

    def __init__(self, config: Config) -> None:
        """Reads the preprocessing file beside the weights, and imports `data.transform`.

        Raises:
            ConfigError: the library's processor cannot be used (see `Preprocessing.processor`). Or `mean` and `std` have
                different numbers of channels, or `data.transform` cannot be imported or built.
        """
        self.side = config.model.image_size
        preprocessing = preprocessing_of(local_weights(config.model.weights))
        self.mean = (preprocessing.mean if preprocessing else None) or list(config.data.mean)
        self.std = [float(s) for s in (preprocessing.std if preprocessing else None) or config.data.std]
        self._scale, self._preprocessing, self._crop = preprocessing.scale if preprocessing else 1.0, preprocessing, None
        if config.data.processor:
            library = self._library(config)
            self.mean, self.std, self._crop = library.mean, library.std, library.crop
        elif preprocessing and preprocessing.sizes and preprocessing.sizes != {self.side}:
            log.warning("model.image_size = %d, but %s says %s", self.side, preprocessing.file, sorted(preprocessing.sizes))
        if len(self.mean) != len(self.std):
            raise ConfigError(f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}")
        if preprocessing:
            log.info("pixels: mean %s and standard deviation %s, from %s", self.mean, self.std, preprocessing.file)
        self._augment = Augmentation(config, self.mean)

    def _library(self, config: Config) -> Library:
        if self._preprocessing is None:
            raise ConfigError(
                f"data.processor: no preprocessing file beside model.weights = {config.model.weights}: it needs a "
                "preprocessor_config.json (transformers), config.json of timm, or open_clip_config.json"
            )
        return self._preprocessing.processor(self.side)

    def __call__(self, split: Split) -> OneByOne:
        return OneByOne(list(split.inputs), split.labels, "pixel_values", self.image)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """Reads one image and turns it into the model's input.

        Args:
            source: see `read_image`.
            draw: name of the random variant; None: no variation.

        Returns:
            [channels, side, side], normalised.

        Raises:
            DataError: see `read_image`.
            ConfigError: `data.transform` fails, or returns another shape.
        """
        pixels = self._resized(source)
        if draw is not None and self._augment:
            pixels = self._augmented(pixels, draw)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def describe(self, value: Any, label: Any) -> str:
        """Size and range as stored, and the size for the model."""
        pixels = np.asarray(_array(value))
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        stored = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, {counted(channels, 'channel')} of {pixels.dtype}"
        return f"{stored} from {pixels.min():g} to {pixels.max():g}; for the model {self.side} x {self.side}"

    def picture(self, value: Any, label: Any) -> NDArray[np.uint8]:
        """The image for the model, before it is normalised."""
        pixels = self._resized(value) / (1.0 if self._crop is not None else self._scale)
        return as_rgb(pixels.permute(1, 2, 0).numpy())

    def _resized(self, source: Any) -> Tensor:
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

    def _augmented(self, pixels: Tensor, draw: str) -> Tensor:
        return as_tensor(self._augment(pixels.clone(), draw), pixels).to(pixels.dtype)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every image once. Each rank reads its part.

        Raises:
            DataError: some images cannot be read; the message names the first.
            ConfigError: `data.transform` fails on the first image, or changes its shape.
        """
        sources = places_of(splits)[rank::ranks]

        def problem(example: tuple[str, Any]) -> str | None:
            where, source = example
            try:
                read_image(source, len(self.mean)) if self._crop is None else self._resized(source)
            except DataError as error:
                return str(error) if isinstance(source, str | Path) else f"{where}: {error}"
            return None

        with ThreadPoolExecutor() as threads:
            problems = [text for text in threads.map(problem, sources) if text]
        if problems:
            raise DataError(
                f"{len(problems)} of {len(sources)} images cannot be used: {listing(problems, 3)}. Replace or remove them"
            )
        if sources and len(splits) > 1 and self._augment:  # the transform is tried before a run, not before a prediction
            self.image(sources[0][1], "check")

    def save(self, folder: Path) -> None:
        """Writes `preprocessor_config.json` for transformers; with `data.processor`, copies the library's own file."""
        if self._crop is not None and self._preprocessing is not None:
            write_atomic(folder / self._preprocessing.file.name, self._preprocessing.file.read_bytes())
            return
        save_preprocessing(folder, self.side, self.mean, self.std, rescale_factor=self._scale / 255)


def save_preprocessing(folder: Path, side: int, mean: list[float], std: list[float], **more: Any) -> None:
    """Writes `preprocessor_config.json` for transformers: resize the whole image bilinearly, then normalise it.

    Args:
        folder: where to write.
        side: height and width in pixels.
        mean: mean of each channel.
        std: standard deviation of each channel.
        **more: further entries of the file.
    """
    size = {"height": side, "width": side}
    content = {"size": size, "image_mean": mean, "image_std": std, "resample": 2, "do_center_crop": False, **more}
    write_json(folder / TRANSFORMERS, content, seal=False)
