"""Checks that need more than the configuration: the number of ranks, the size of the training data."""

from __future__ import annotations

from ..errors import ConfigError
from .schema import Config


def check_ranks(config: Config, ranks: int) -> None:
    """
    Raises:
        ConfigError: a batch cannot be shared out equally among that many ranks.
    """
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks are too few: give the job at least one on each node")
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.score_batch", config.importance.score_batch),
    ):
        if size % ranks:
            raise ConfigError(f"{key} {size} is no multiple of {ranks} ranks: use {ranks * max(round(size / ranks), 1)}")


def check_sizes(config: Config, num_train: int) -> None:
    """
    Raises:
        ConfigError: a batch is larger than the training data.
    """
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.num_samples", config.importance.num_samples),
    ):
        if size > num_train:
            raise ConfigError(f"{key} is {size}, but there are only {num_train} training examples")
