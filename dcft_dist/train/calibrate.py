"""Temperature scaling (Guo et al. 2017): the logits are divided by the number that fits the validation data best.

The number goes into the head: weight and bias are divided by it. So every program that loads the exported model has it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from ..engines.find import find_engine
from ..errors import ConfigError
from ..objectives.base import Metrics
from .context import RunContext

log = logging.getLogger(__name__)

_HALVINGS = 60


def calibrate(run: RunContext) -> tuple[float, Metrics]:
    """Divides the head by the temperature. Collective.

    Args:
        run: the context of the run; the head of its model is changed.

    Returns:
        The temperature, and the metrics on the validation data with it.

    Raises:
        ConfigError: the outputs are not those of the head, so that they were not divided with it.
    """
    found = run.evaluate(run.validation)
    labels = torch.tensor([run.validation.labels[i] for i in found.indices])
    number = temperature(found.records, labels)
    engine, head = find_engine(run.model), set(run.pretrained.head_names)
    with torch.no_grad():
        for shard in engine.shards():
            if shard.name in head:
                shard.local.detach().div_(number)
    engine.publish()
    log.info("temperature %.4g", number)
    after = run.evaluate(run.validation)
    apart = float((after.records * number - found.records).abs().max())
    if apart > 0.02 * float(found.records.abs().max()):  # more than bfloat16 rounds
        raise ConfigError("train.calibrate: the model changes what its head returns, so a divided head calibrates nothing")
    return number, after.metrics


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest cross-entropy, between 0.01 and 100.

    The loss is convex in the inverse of the temperature, so its derivative is bisected.

    Args:
        logits: [size, classes], or [size, findings].
        labels: class indices [size]; or 1, 0 and NaN for unknown [size, findings].
    """
    logits = logits.double()
    if labels.ndim == 1:
        wanted = functional.one_hot(labels, logits.shape[1]).double()
        known = torch.ones_like(logits)
    else:
        known, wanted = (~labels.isnan()).double(), labels.nan_to_num().double()

    def slope(inverse: float) -> float:
        scaled = logits * inverse
        shares = scaled.softmax(-1) if labels.ndim == 1 else scaled.sigmoid()
        return float(((shares - wanted) * logits * known).sum())

    low, high = 0.01, 100.0
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0.0 else (middle, high)
    return 1.0 / low
