"""Random variants by name (`data.augment`, `data.flip`): of images by MONAI or timm, of volumes with masks by MONAI."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError
from .library_processor import as_picture


@dataclass(frozen=True)
class _Strength:
    """How much a preset changes.

    Attributes:
        angle: largest rotation in degrees.
        zoom: largest change of size, as a share.
        contrast: exponents of brightness (gamma) lie between 1 - contrast and 1 + contrast.
        noise: standard deviation of noise, as a share of the range or of the standard deviation of intensities.
        blur: whether some variants are blurred.
    """

    angle: float
    zoom: float
    contrast: float
    noise: float
    blur: bool


_STRENGTHS = {"light": _Strength(10, 0.1, 0.2, 0.0, False), "strong": _Strength(25, 0.25, 0.4, 0.05, True)}


def preset(config: Config, mean: Sequence[float]) -> Callable[[Any], Any]:
    """The transform of `data.augment` and `data.flip`.

    Images are [channels, side, side] with values from 0 to 1. Volumes are dictionaries of `image` [channels, *patch] and, in
    segmentation, `mask`, which is interpolated by nearest neighbour.

    Args:
        config: its section `data` is used.
        mean: mean of each channel of images.

    Raises:
        ConfigError: the package monai or timm is not installed, or timm does not know the policy.
    """
    data = config.data
    if data.augment not in ("none", *_STRENGTHS):
        return _of_timm(config, mean)
    try:
        from monai import transforms as mt
    except ImportError as error:
        raise ConfigError("data.augment and data.flip need the package monai: pip install monai") from error
    if data.modality != "volume":
        steps: list[Any] = [mt.RandFlip(prob=0.5, spatial_axis=1)] if data.flip else []
        return mt.Compose(steps + (_of_images(mt, _STRENGTHS[data.augment]) if data.augment != "none" else []))
    keys = ["image", "mask"] if config.task.kind == "segmentation" else ["image"]
    axes = range(len(data.patch)) if data.flip else ()
    steps = [mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in axes]
    return mt.Compose(steps + (_of_volumes(mt, _STRENGTHS[data.augment], keys, config) if data.augment != "none" else []))


def _of_timm(config: Config, mean: Sequence[float]) -> Callable[[Tensor], NDArray[np.float32]]:
    """A policy of timm with its usual settings (`timm.data.create_transform`), for images with 8 bits."""
    try:
        from timm.data import auto_augment as timm_policies
    except ImportError as error:
        raise ConfigError(f"data.augment = '{config.data.augment}' needs the package timm: pip install timm") from error
    name, side, flip = config.data.augment, config.model.image_size, config.data.flip
    kinds = {"rand": timm_policies.rand_augment_transform, "augmix": timm_policies.augment_and_mix_transform}
    make = kinds.get(name.partition("-")[0], timm_policies.auto_augment_transform)
    grey = tuple(min(255, round(255 * value)) for value in mean)  # of what moves into the image
    settings: dict[str, Any] = {"translate_const": int(0.45 * side), "img_mean": grey if len(grey) == 3 else grey[0]}
    if name.startswith("augmix"):
        settings["translate_pct"] = 0.3
    try:
        policy = make(name, settings)
    except Exception as error:
        raise ConfigError(f"data.augment: timm does not know '{name}': {type(error).__name__}: {error}") from error

    def vary(image: Tensor) -> NDArray[np.float32]:
        turned = image.flip(-1) if flip and random.random() < 0.5 else image
        values = np.asarray(policy(as_picture(turned)), np.float32) / np.float32(255)
        return values.reshape(*values.shape[:2], -1).transpose(2, 0, 1)

    return vary


def _of_images(mt: Any, how: _Strength) -> list[Any]:
    steps = [
        mt.RandRotate(range_x=how.angle * pi / 180, prob=0.5, padding_mode="border"),
        mt.RandZoom(prob=0.5, min_zoom=1 - how.zoom, max_zoom=1 + how.zoom, padding_mode="edge"),
        mt.RandAdjustContrast(prob=0.5, gamma=(1 - how.contrast, 1 + how.contrast)),
    ]
    if how.noise:
        steps.append(mt.RandGaussianNoise(prob=0.3, std=how.noise))
    if how.blur:
        steps.append(mt.RandGaussianSmooth(prob=0.2, sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0)))
    return steps


def _of_volumes(mt: Any, how: _Strength, keys: list[str], config: Config) -> list[Any]:
    """Intensities are normalised, so they are scaled and shifted, as in nnU-Net, and take no exponent."""
    modes, angle = ["bilinear", "nearest"][: len(keys)], how.angle * pi / 180
    volume = len(config.data.patch) == 3
    angles = {"range_x": angle, "range_y": angle, "range_z": angle} if volume else {"range_x": angle}
    steps = [
        mt.RandRotated(keys, prob=0.3, mode=modes, padding_mode="border", **angles),
        mt.RandZoomd(
            keys, prob=0.3, min_zoom=1 - how.zoom, max_zoom=1 + how.zoom, mode=_zoom_modes(keys, volume), padding_mode="edge"
        ),
        mt.RandScaleIntensityd("image", prob=0.5, factors=how.contrast / 2),
        mt.RandShiftIntensityd("image", prob=0.5, offsets=how.contrast / 4),
    ]
    if how.noise:
        steps.append(mt.RandGaussianNoised("image", prob=0.3, std=how.noise))
    if how.blur:
        steps.append(mt.RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0), sigma_z=(0.3, 1.0)))
    return steps


def _zoom_modes(keys: list[str], volume: bool) -> list[str]:
    return ["trilinear" if volume else "bilinear", "nearest"][: len(keys)]
