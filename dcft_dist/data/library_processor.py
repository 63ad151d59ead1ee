"""Preprocessing from a file beside the weights, as the model's library wrote it: mean, deviation, size and crop of images.

`preprocessing_of` reads the file of transformers, timm or open_clip. `Preprocessing.processor` builds that library's own
processor and tries it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, line_of
from ..files import read_json

TRANSFORMERS = "preprocessor_config.json"

# File name, and the key of the section that describes the preprocessing.
_TIMM = ("config.json", "pretrained_cfg")
_OPEN_CLIP = ("open_clip_config.json", "preprocess_cfg")

Crop = Callable[[Any], Tensor]  # PIL image -> [channels, height, width]


@dataclass(frozen=True)
class Library:
    """The processor of a library.

    Attributes:
        whole: resizes, crops and normalises an image.
        crop: resizes and crops an image, without the normalisation; values from 0 to 1.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    whole: Crop
    crop: Crop
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing that a file beside the weights describes.

    Attributes:
        file: the file.
        mean: mean of each channel; None: the file has none.
        std: standard deviation of each channel; None: the file has none.
        scale: value of white before `mean` and `std` are applied.
        sizes: heights and widths in the file.
        make: builds the library's processor; needs that library.
    """

    file: Path
    mean: list[float] | None
    std: list[float] | None
    scale: float
    sizes: set[int]
    make: Callable[[], Library]

    def processor(self, side: int) -> Library:
        """Builds the library's processor and tries it on an image of noise.

        Args:
            side: height and width that the model needs, in pixels.

        Raises:
            ConfigError: the library is not installed or rejects the file. Or its processor does not make squares of `side`,
                or does more than resize, crop and normalise.
        """
        noise = torch.rand(3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0))
        try:
            library = self.make()
            picture = as_picture(noise[: len(library.mean)])
            crop, whole = library.crop(picture), library.whole(picture)
        except Exception as error:  # each library raises its own kinds
            raise ConfigError(f"data.processor: {self.file}: {type(error).__name__}: {line_of(error, -1)}") from error
        shape = list(whole.shape)
        if shape != [len(library.mean), side, side]:
            square = len(shape) == 3 and shape[0] == len(library.mean) and shape[1] == shape[2]
            hint = f": set model.image_size = {shape[-1]}" if square else ", which are not square: use data.collate instead"
            raise ConfigError(f"data.processor: {self.file} makes images of {shape}{hint}")
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (library.mean, library.std))
        if not torch.allclose((crop - mean) / std, whole, atol=1e-4):
            raise ConfigError(
                f"data.processor: {self.file} does more than resize, crop and normalise: use data.collate instead"
            )
        return library


def preprocessing_of(weights: str | None) -> Preprocessing | None:
    """Reads the preprocessing file beside a model's weights.

    Args:
        weights: folder or file of the weights.

    Returns:
        The preprocessing; None if there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    if weights is None:
        return None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    if facts := _facts(folder / TRANSFORMERS):
        return _of_transformers(folder / TRANSFORMERS, facts)
    for (name, key), read in ((_TIMM, _of_timm), (_OPEN_CLIP, _of_open_clip)):
        if isinstance((facts := _facts(folder / name)).get(key), dict):
            return read(folder / name, facts)
    return None


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _of_transformers(file: Path, facts: dict[str, Any]) -> Preprocessing:
    mean, std = facts.get("image_mean"), facts.get("image_std")
    if not facts.get("do_normalize", True):
        mean, std = [0.0] * len(mean or [0.0] * 3), [1.0] * len(std or [1.0] * 3)
    factor = (facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0

    def make() -> Library:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)

        def pixels(picture: Any, **options: bool) -> Tensor:
            values: Tensor = processor(picture, return_tensors="pt", **options)["pixel_values"][0]
            return values.float()

        unnormalised = not getattr(processor, "do_normalize", True)
        means, deviations = (
            ([0.0] * 3, [1.0] * 3) if unnormalised else (list(processor.image_mean), list(processor.image_std))
        )
        return Library(pixels, lambda picture: pixels(picture, do_normalize=False), means, deviations)

    return Preprocessing(file, mean, std, 255 * factor, _sizes(facts.get("crop_size") or facts.get("size")), make)


def _of_timm(file: Path, facts: dict[str, Any]) -> Preprocessing:
    section = facts[_TIMM[1]]

    def make() -> Library:
        from timm.data import create_transform, resolve_data_config

        options = resolve_data_config(pretrained_cfg=section)
        unnormalised = create_transform(**options, normalize=False)
        return Library(
            create_transform(**options),
            lambda picture: unnormalised(picture) / 255,
            list(options["mean"]),
            list(options["std"]),
        )

    sizes = _sizes((section.get("input_size") or [])[1:])
    return Preprocessing(file, section.get("mean"), section.get("std"), 1.0, sizes, make)


def _of_open_clip(file: Path, facts: dict[str, Any]) -> Preprocessing:
    section = facts[_OPEN_CLIP[1]]
    size = section.get("size") or facts.get("model_cfg", {}).get("vision_cfg", {}).get("image_size")

    def make() -> Library:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        options = PreprocessCfg(**{**section, "size": size})
        unnormalised = PreprocessCfg(**{**section, "size": size, "mean": (0.0,) * 3, "std": (1.0,) * 3})
        whole, crop = (image_transform_v2(settings, is_train=False) for settings in (options, unnormalised))
        return Library(whole, crop, list(options.mean), list(options.std))

    return Preprocessing(file, section.get("mean"), section.get("std"), 1.0, _sizes(size), make)


def _sizes(size: Any) -> set[int]:
    """Heights and widths; older files have one number."""
    if isinstance(size, dict):
        return set(size.values())
    return set(size if isinstance(size, list | tuple) else [size] if size else [])


def as_picture(pixels: Tensor) -> Any:
    """Turns pixels into a PIL image with 8 bits.

    Args:
        pixels: [channels, height, width], values from 0 to 1.

    Raises:
        ValueError: a value is outside 0 to 1, or the number of channels is neither 1 nor 3.
    """
    from PIL import Image

    low, high = float(pixels.min()), float(pixels.max())
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(f"values from {low:g} to {high:g}: a picture has values from 0 to 1, or whole numbers")
    if len(pixels) not in (1, 3):
        raise ValueError(f"{len(pixels)} channels: a picture has 1 or 3")
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values[:, :, 0] if len(pixels) == 1 else values)
