"""Sets up how the speed of a run is measured, for its model, data and devices."""

from __future__ import annotations

import torch

from ..data.batches import Batch
from ..distributed import collectives
from ..engines.find import find_engine
from .context import RunContext
from .speed import Speed, flops_of, peak_of


def speed_of(run: RunContext) -> Speed:
    """The measurement of a run's training. Where the peak of all devices is known, it makes a forward. Collective.

    Args:
        run: the context of the run.
    """
    device, ranks = run.world.device, run.world.world_size
    peaks = [peak_of(device, run.config.train.precision == "bf16") or 0.0]
    slowest = collectives.reduce_numbers(peaks, "min", what="peak of the devices")[0]
    flops = flops_per_sample(run) if slowest else 0.0
    return Speed(device, run.config.train.global_batch, flops, ranks * slowest)


def flops_per_sample(run: RunContext) -> float:
    """Operations of a forward and backward of one training example: those of the first micro-batch, by its size. Collective.

    Args:
        run: the context of the run. Its model is as before afterwards.
    """
    first: Batch = run.micro_batches(range(run.config.train.global_batch), run.train, draw=0)[0]
    model, training = run.model, run.model.training
    model.eval()
    with torch.random.fork_rng():
        flops = flops_of(lambda: run.loss(model, first))
    model.train(training)
    find_engine(model).settle()
    return flops / len(first["index"])
