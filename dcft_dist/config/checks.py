"""Checks that need more than the configuration: the number of ranks, the size of the training data."""

from __future__ import annotations

from ..errors import ConfigError
from .schema import Config


def check_ranks(config: Config, ranks: int) -> None:
    """Checks that the ranks can share every batch equally.

    Args:
        ranks: number of ranks that will run the configuration.

    Raises:
        ConfigError: there is no rank, or a batch size is not a multiple of the number of ranks.
    """
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks are too few: give the job at least one on each node")
    together = config.sharding.tensor_parallel
    if ranks % together:
        raise ConfigError(f"sharding.tensor_parallel = {together} does not divide {ranks} ranks")
    ranks //= together  # ranks that compute together take the same examples
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.score_batch", config.importance.score_batch),
    ):
        if size % ranks:
            raise ConfigError(f"{key} {size} is not a multiple of {ranks} ranks: use {ranks * max(round(size / ranks), 1)}")


def check_sizes(config: Config, num_train: int) -> None:
    """Checks that the training data are large enough for a batch and for scoring.

    Args:
        num_train: number of training examples.

    Raises:
        ConfigError: `train.global_batch` or `importance.num_samples` is larger than `num_train`.
    """
    for key, size in (
        ("train.global_batch", config.train.global_batch),
        ("importance.num_samples", config.importance.num_samples),
    ):
        if size > num_train:
            raise ConfigError(f"{key} is {size}, but there are only {num_train} training examples")
