"""What the library of a model says of its pixels, in a file beside the weights: mean, deviation, size, how it crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, line_of
from .files import read_json

TRANSFORMERS = "preprocessor_config.json"
_TIMM = ("config.json", "pretrained_cfg")
_OPEN_CLIP = ("open_clip_config.json", "preprocess_cfg")
Crop = Callable[[Any], Tensor]  # of a picture of PIL: [channels, height, width], not normalised


@dataclass(frozen=True)
class Preprocessing:
    """
    Attributes:
        file: where it is said.
        mean, std: of each channel; None: not said.
        scale: what white becomes before they are applied.
        sizes: heights and widths that are said.
        make_crop: gives what resizes and crops as the library does; asks for that library.
    """

    file: Path
    mean: list[float] | None
    std: list[float] | None
    scale: float
    sizes: set[int]
    make_crop: Callable[[], Crop]

    def crop(self) -> Crop:
        """
        Raises:
            ConfigError: the library is not there, or does not take what the file says.
        """
        try:
            return self.make_crop()
        except Exception as error:  # each library has its own
            raise ConfigError(f"data.processor: {self.file}: {type(error).__name__}: {line_of(error, -1)}") from error


def preprocessing_of(weights: str | None) -> Preprocessing | None:
    """Of the model whose weights are in that folder or file; None: nothing is said there."""
    if weights is None:
        return None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    if (file := folder / TRANSFORMERS).is_file():
        return _of_transformers(file, read_json(file))
    for (name, key), read in ((_TIMM, _of_timm), (_OPEN_CLIP, _of_open_clip)):
        if (file := folder / name).is_file() and isinstance(facts := read_json(file).get(key), dict):
            return read(file, facts)
    return None


def _of_transformers(file: Path, facts: dict[str, Any]) -> Preprocessing:
    mean, std = facts.get("image_mean"), facts.get("image_std")
    if facts.get("do_normalize") is False:
        mean, std = [0.0] * len(mean or [0.0] * 3), [1.0] * len(std or [1.0] * 3)
    factor = (facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0

    def make() -> Crop:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(file.parent, local_files_only=True)
        return lambda picture: processor(picture, do_normalize=False, return_tensors="pt")["pixel_values"][0].float()

    return Preprocessing(file, mean, std, 255 * factor, _sizes(facts.get("crop_size") or facts.get("size")), make)


def _of_timm(file: Path, facts: dict[str, Any]) -> Preprocessing:
    size = facts.get("input_size") or []  # channels, height, width

    def make() -> Crop:
        from timm.data import create_transform

        how = {key: facts[key] for key in ("interpolation", "crop_pct", "crop_mode") if facts.get(key)}
        made: Crop = create_transform(tuple(size), mean=(0.0,) * size[0], std=(1.0,) * size[0], **how)
        return made

    return Preprocessing(file, facts.get("mean"), facts.get("std"), 1.0, _sizes(size[1:]), make)


def _of_open_clip(file: Path, facts: dict[str, Any]) -> Preprocessing:
    size = facts.get("size") or read_json(file)["model_cfg"]["vision_cfg"]["image_size"]

    def make() -> Crop:
        from open_clip import image_transform

        how = {key: facts[key] for key in ("interpolation", "resize_mode") if facts.get(key)}
        plain: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        made: Crop = image_transform(size, is_train=False, **plain, **how)
        return made

    return Preprocessing(file, facts.get("mean"), facts.get("std"), 1.0, _sizes(size), make)


def _sizes(said: Any) -> set[int]:
    """A number in older files."""
    if isinstance(said, dict):
        return set(said.values())
    return set(said if isinstance(said, list | tuple) else [said] if said else [])


def as_picture(pixels: Tensor) -> Any:
    """[channels, height, width] from 0 to 1 as a picture of PIL with 8 bits.

    Raises:
        ValueError: there are other values, or neither one channel nor three.
    """
    from PIL import Image

    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise ValueError(f"values from {low:g} to {high:g}: data.processor takes those from 0 to 1 (or whole numbers)")
    if len(pixels) not in (1, 3):
        raise ValueError(f"{len(pixels)} channels: data.processor takes 1 or 3")
    found = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(found[:, :, 0] if len(pixels) == 1 else found)
