"""The user's random variants of training examples: whatever generator makes them, functions of (seed, epoch, example)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import ConfigError, line_of
from ..imports import find_object
from ..seeds import seed_of, seeded


class Augmentation:
    """`data.transform`: a function, or one that `data.transform_args` make."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            ConfigError: there is no such function, or it cannot be made.
        """
        self._seed, self._path = config.seed, config.data.transform
        self._transform = _transform(config)

    def __bool__(self) -> bool:
        return self._transform is not None

    def __call__(self, example: Any, draw: str) -> Any:
        """The variant of that draw.

        Raises:
            ConfigError: the function fails.
        """
        seed = seed_of(self._seed, draw)
        with seeded(seed):
            if reset := getattr(self._transform, "set_random_state", None):  # MONAI's
                reset(seed)
            try:
                return self._transform(example)  # type: ignore[misc]
            except Exception as error:
                raise ConfigError(f"data.transform: {self._path} fails: {type(error).__name__}: {line_of(error)}") from error


def as_tensor(found: Any, before: Tensor) -> Tensor:
    """What a variant is.

    Raises:
        ConfigError: it is no array of that shape.
    """
    try:
        made = torch.from_numpy(np.ascontiguousarray(found))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.transform: it gives a {type(found).__name__}, not an array") from error
    if made.shape != before.shape:
        raise ConfigError(f"data.transform: it makes {list(made.shape)} of {list(before.shape)}")
    return made


def _transform(config: Config) -> Callable[[Any], Any] | None:
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
    transform: Callable[[Any], Any] = made
    return transform
