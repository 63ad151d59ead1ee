"""The user's images as a model takes them: read when they are needed, resized, varied in training, normalised."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .dicom import is_dicom, picture_in
from .errors import ConfigError, DataError, listing
from .files import read_json, write_json
from .imports import find_object
from .rows import Cell
from .schema import Config
from .seeded import seed_of, seeded
from .splits import Split, places_of

log = logging.getLogger(__name__)
FLAT = {"resample": 2, "do_center_crop": False}  # bilinear, of the whole image
PREPROCESSOR = "preprocessor_config.json"  # of transformers' image processors
Transform = Callable[[Tensor], Any]


def read_image(source: Any, channels: int, scale: float = 1.0) -> Tensor:
    """[channels, height, width] in float32: integers are scaled to [0, `scale`], floats stay; grey goes into all channels.

    Args:
        source: path of an image, .npy or DICOM file, an array [height, width] or [height, width, channels], or a `Cell`.

    Raises:
        DataError: it cannot be read, has another number of channels, or has values that are no numbers; it is named.
    """
    name = str(source) if isinstance(source, str | Path) else repr(source) if isinstance(source, Cell) else "array"
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


def _array(source: Any) -> Any:
    from PIL import Image

    found = source.read() if isinstance(source, Cell) else source
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


@dataclass(frozen=True)
class ImageFiles:
    """A split of images."""

    sources: list[Any]
    labels: list[Any]
    processor: OwnImageProcessor

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        images = [self.processor.image(self.sources[i], f"{draw}:{i}" if draw else None) for i in indices]
        return {"pixel_values": torch.stack(images)}


class OwnImageProcessor:
    """Resizes to a square, varies, normalises; size, mean and deviation are those beside the model's weights, if there."""

    def __init__(self, config: Config) -> None:
        self._seed = config.seed
        self.mean, self.std = list(config.data.mean), [float(s) for s in config.data.std]
        self.side, self._scale = config.model.image_size, 1.0
        place = Path(config.model.weights or "")
        beside = (place if place.is_dir() else place.parent) / PREPROCESSOR
        if config.model.weights and beside.is_file():
            facts = read_json(beside)
            self.mean, self.std = facts.get("image_mean") or self.mean, facts.get("image_std") or self.std
            if facts.get("do_normalize") is False:
                self.mean, self.std = [0.0] * len(self.mean), [1.0] * len(self.std)
            factor = (facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0
            self._scale = 255 * factor
            size = facts.get("crop_size") or facts.get("size") or {}  # a number in older files
            sizes = set(size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size])
            if sizes and sizes != {self.side}:
                log.warning("model.image_size = %d, but %s says %s", self.side, beside, sorted(sizes))
        if len(self.mean) != len(self.std):
            raise ConfigError(f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}")
        self._transform = _transform(config)

    def __call__(self, split: Split) -> ImageFiles:
        return ImageFiles(list(split.inputs), split.labels, self)

    def image(self, source: Any, draw: str | None = None) -> Tensor:
        """[channels, side, side]. `draw`: which random variant; None: no variation."""
        pixels = read_image(source, len(self.mean), self._scale).unsqueeze(0)
        size = (self.side, self.side)
        if pixels.shape[2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        pixels = pixels[0]
        if draw is not None and self._transform is not None:
            pixels = self._varied(pixels, draw)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _varied(self, pixels: Tensor, draw: str) -> Tensor:
        """Whatever generator the transform uses, it starts from (seed, epoch, example)."""
        seed = seed_of(self._seed, draw)
        with seeded(seed):
            if reset := getattr(self._transform, "set_random_state", None):  # MONAI's
                reset(seed)
            found = torch.as_tensor(np.asarray(self._transform(pixels.clone()))).to(pixels.dtype)  # type: ignore[misc]
        if found.shape != pixels.shape:
            raise ConfigError(f"data.transform: it makes {list(found.shape)} of an image {list(pixels.shape)}")
        return found

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads every image once, each rank its part.

        Raises:
            DataError: some cannot be read; the first are named.
        """
        sources = places_of(splits)[rank::ranks]

        def problem(found: tuple[str, Any]) -> str | None:
            where, source = found
            try:
                read_image(source, len(self.mean))
            except DataError as error:
                return str(error) if isinstance(source, str | Path) else f"{where}: {error}"
            return None

        with ThreadPoolExecutor() as threads:
            wrong = [text for text in threads.map(problem, sources) if text]
        if wrong:
            raise DataError(f"{len(wrong)} of {len(sources)} images: {listing(wrong, 3)}")

    def save(self, folder: Path) -> None:
        """As transformers' image processors read it."""
        facts = {"size": {"height": self.side, "width": self.side}, "image_mean": self.mean, "image_std": self.std}
        write_json(folder / PREPROCESSOR, {**facts, **FLAT, "rescale_factor": self._scale / 255})


def _transform(config: Config) -> Transform | None:
    path, args = config.data.transform, config.data.transform_args
    if path is None:
        return None
    found = find_object(path, config.import_roots, "data.transform")
    try:
        made = found(**args) if args or isinstance(found, type) else found
    except Exception as error:
        raise ConfigError(f"data.transform: {path} fails: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ConfigError(f"data.transform: {path} is no function")
    transform: Transform = made
    return transform
