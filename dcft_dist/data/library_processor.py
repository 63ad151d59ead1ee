"""What the library of a model says of its pixels, in a file beside the weights: mean, deviation, size, how it crops."""

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


_TIMM = ("config.json", "pretrained_cfg")


_OPEN_CLIP = ("open_clip_config.json", "preprocess_cfg")


Crop = Callable[[Any], Tensor]  # of a picture of PIL: [channels, height, width]


@dataclass(frozen=True)
class Library:
    """The processor of a library: what it makes of a picture, and that without the normalisation by `mean` and `std`."""

    whole: Crop
    crop: Crop
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Preprocessing:
    """
    Attributes:
        file: where it is said.
        mean, std: of each channel; None: not said.
        scale: what white becomes before they are applied.
        sizes: heights and widths that are said.
        make: gives the library's processor; asks for that library.
    """

    file: Path
    mean: list[float] | None
    std: list[float] | None
    scale: float
    sizes: set[int]
    make: Callable[[], Library]

    def processor(self, side: int) -> Library:
        """The library's processor, tried on a picture.

        Raises:
            ConfigError: the library is not there, does not take what the file says, makes no squares of `side`, or does more
                than to resize, crop and normalise.
        """
        noise = torch.rand(3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0))
        try:
            made = self.make()
            picture = as_picture(noise[: len(made.mean)])
            crop, whole = made.crop(picture), made.whole(picture)
        except Exception as error:  # each library has its own
            raise ConfigError(f"data.processor: {self.file}: {type(error).__name__}: {line_of(error, -1)}") from error
        shape = list(whole.shape)
        if shape != [len(made.mean), side, side]:
            square = len(shape) == 3 and shape[0] == len(made.mean) and shape[1] == shape[2]
            hint = f": model.image_size = {shape[-1]}" if square else ", no squares: use data.collate"
            raise ConfigError(f"data.processor: {self.file} makes images of {shape}{hint}")
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (made.mean, made.std))
        if not torch.allclose((crop - mean) / std, whole, atol=1e-4):
            raise ConfigError(
                f"data.processor: what {self.file} says is more than to resize, crop and normalise: use data.collate"
            )
        return made


def preprocessing_of(weights: str | None) -> Preprocessing | None:
    """Of the model whose weights are in that folder or file; None: nothing is said there.

    Raises:
        ConfigError: a file that would say it is damaged.
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
        found = read_json(file)
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _of_transformers(file: Path, facts: dict[str, Any]) -> Preprocessing:
    mean, std = facts.get("image_mean"), facts.get("image_std")
    if not facts.get("do_normalize", True):
        mean, std = [0.0] * len(mean or [0.0] * 3), [1.0] * len(std or [1.0] * 3)
    factor = (facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0

    def make() -> Library:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(file.parent, local_files_only=True)

        def pixels(picture: Any, **how: bool) -> Tensor:
            found: Tensor = processor(picture, return_tensors="pt", **how)["pixel_values"][0]
            return found.float()

        plain = not getattr(processor, "do_normalize", True)
        of, deviation = ([0.0] * 3, [1.0] * 3) if plain else (list(processor.image_mean), list(processor.image_std))
        return Library(pixels, lambda picture: pixels(picture, do_normalize=False), of, deviation)

    return Preprocessing(file, mean, std, 255 * factor, _sizes(facts.get("crop_size") or facts.get("size")), make)


def _of_timm(file: Path, facts: dict[str, Any]) -> Preprocessing:
    said = facts[_TIMM[1]]

    def make() -> Library:
        from timm.data import create_transform, resolve_data_config

        how = resolve_data_config(pretrained_cfg=said)
        flat = create_transform(**how, normalize=False)
        return Library(create_transform(**how), lambda picture: flat(picture) / 255, list(how["mean"]), list(how["std"]))

    return Preprocessing(file, said.get("mean"), said.get("std"), 1.0, _sizes((said.get("input_size") or [])[1:]), make)


def _of_open_clip(file: Path, facts: dict[str, Any]) -> Preprocessing:
    said = facts[_OPEN_CLIP[1]]
    size = said.get("size") or facts.get("model_cfg", {}).get("vision_cfg", {}).get("image_size")

    def make() -> Library:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        how = PreprocessCfg(**{**said, "size": size})
        plain = PreprocessCfg(**{**said, "size": size, "mean": (0.0,) * 3, "std": (1.0,) * 3})
        whole, crop = (image_transform_v2(one, is_train=False) for one in (how, plain))
        return Library(whole, crop, list(how.mean), list(how.std))

    return Preprocessing(file, said.get("mean"), said.get("std"), 1.0, _sizes(size), make)


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
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(f"values from {low:g} to {high:g}: data.processor takes those from 0 to 1 (or whole numbers)")
    if len(pixels) not in (1, 3):
        raise ValueError(f"{len(pixels)} channels: data.processor takes 1 or 3")
    found = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(found[:, :, 0] if len(pixels) == 1 else found)
