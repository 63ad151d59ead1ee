"""Statistics of batch normalisation, taken again for weights that no training step has made."""

from __future__ import annotations

import torch
from torch import nn

from ..data.batches import order
from ..engines.find import find_engine
from ..engines.whole_tensors import average_buffers
from .context import RunContext


@torch.no_grad()
def renew_statistics(run: RunContext) -> None:
    """Means and variances of batch normalisation over an epoch of training batches, as `swa_utils.update_bn` takes them.

    Nothing happens in a model without batch normalisation. Collective.

    Args:
        run: the context of the run; buffers of its model are changed.
    """
    norms = [
        m
        for m in find_engine(run.model).module.modules()
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm)
    ]
    norms = [m for m in norms if m.track_running_stats]
    if not norms:
        return
    training = run.model.training
    run.model.eval()
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean over all batches
        m.train()
    size, indices = run.config.train.global_batch, order(run.config.seed, 0, len(run.train))
    for step in range(run.steps_per_epoch):
        for batch in run.micro_batches(indices[step * size : (step + 1) * size], run.train, draw=0):
            with run.prepared.computing():
                run.outputs(run.model, batch)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    run.model.train(training)
    find_engine(run.model).settle()
    average_buffers(run.model)
