"""What needs more than the configuration: checks of the number of ranks, batches that fit the size of the training data."""

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


def fitted(config: Config, num_train: int, ranks: int) -> tuple[Config, list[str]]:
    """Lowers batches that have their default size to the size of the training data.

    Args:
        config: configuration of the run.
        num_train: number of training examples.
        ranks: number of ranks that share a batch; `check_ranks` has accepted it.

    Returns:
        The configuration, and a line for each size that is lower now.

    Raises:
        ConfigError: a size that is not the default is larger than `num_train`, or there are fewer examples than ranks.
    """
    if num_train < ranks:
        raise ConfigError(f"there are only {num_train} training examples for {ranks} ranks: use fewer ranks")
    parts = {"train": config.train, "importance": config.importance}
    smaller = 1 << (num_train.bit_length() - 1)  # a power of two, so that it does not depend on the number of ranks
    batch = min(config.importance.score_batch, smaller)
    lower = {"train.global_batch": smaller, "importance.score_batch": smaller}
    lower["importance.num_samples"] = num_train // batch * batch
    lines = []
    for key, size in lower.items():
        section, _, name = key.partition(".")
        given = getattr(parts[section], name)
        if given <= num_train:
            continue
        used = section == "train" or config.uses_set
        if used and given != type(parts[section]).model_fields[name].default:
            raise ConfigError(f"{key} is {given}, but there are only {num_train} training examples")
        parts[section] = parts[section].model_copy(update={name: size})
        if used:
            lines.append(f"{key} {size}, since there are only {num_train} training examples")
    return config.model_copy(update=parts), lines
