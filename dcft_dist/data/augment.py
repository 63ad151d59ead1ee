"""Random variants of training examples, by name or by the user's function: each depends on (seed, epoch, example) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, line_of
from ..imports import find_object
from ..seeds import seed_of, seeded
from .presets import preset


class Augmentation:
    """The preset of `data.augment` and `data.flip`, or the user's `data.transform`: a function, or what
    `data.transform_args` build from it.

    It is false where the configuration names nothing.
    """

    def __init__(self, config: Config, mean: Sequence[float] | None = None) -> None:
        """Prepares it; the transform is built at its first use, so that predictions need no package for it.

        Args:
            config: its section `data` is used.
            mean: mean of each channel of images; None: `data.mean`.
        """
        data = config.data
        self._config, self._mean = config, list(mean or data.mean)
        self._named = data.augment != "none" or data.flip
        self._what = f"data.transform: {data.transform}" if data.transform else "data.augment or data.flip"

    def __bool__(self) -> bool:
        return self._named or self._config.data.transform is not None

    @cached_property
    def _transform(self) -> Callable[[Any], Any]:
        return _imported(self._config) if self._config.data.transform else preset(self._config, self._mean)

    def __call__(self, example: Any, draw: str) -> Any:
        """Returns one random variant of an example.

        Args:
            example: what the transform takes, such as an image [channels, side, side].
            draw: name of the variant; the same name gives the same variant.

        Raises:
            ConfigError: the transform fails, cannot be built, or its import path leads to no function.
        """
        seed = seed_of(self._config.seed, draw)
        self._transform  # noqa: B018 - built here, outside of the seed
        with seeded(seed):
            # MONAI's transforms have a generator of their own.
            if set_random_state := getattr(self._transform, "set_random_state", None):
                set_random_state(seed)
            try:
                return self._transform(example)
            except Exception as error:
                raise ConfigError(f"{self._what} fails: {type(error).__name__}: {line_of(error)}") from error


def as_tensor(found: Any, before: Tensor) -> Tensor:
    """Turns the output of a transform into a tensor.

    Args:
        found: output of the transform, an array or a tensor.
        before: input of the transform; the output must have its shape.

    Raises:
        ConfigError: the output is not an array, or has another shape.
    """
    try:
        variant = torch.from_numpy(np.ascontiguousarray(found))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.transform: returned a {type(found).__name__}, not an array") from error
    if variant.shape != before.shape:
        raise ConfigError(
            f"data.transform: returned shape {list(variant.shape)}, not the shape of its input {list(before.shape)}"
        )
    return variant


def _imported(config: Config) -> Callable[[Any], Any]:
    path, args = str(config.data.transform), config.data.transform_args
    imported = find_object(path, config.import_roots, "data.transform")
    try:
        built = imported(**args) if args or isinstance(imported, type) else imported
    except Exception as error:
        raise ConfigError(f"data.transform: {path} fails: {type(error).__name__}: {error}") from error
    if not callable(built):
        raise ConfigError(f"data.transform: {path} is not a function")
    transform: Callable[[Any], Any] = built
    return transform
