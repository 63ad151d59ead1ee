"""A prepared model and its scores under any engine, for the tests of engines."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dcft_dist.distributed import collectives
from dcft_dist.method.scores import Scores

from ..nets import loss_fn, make_net, make_optimizer
from ..prepared import Prepared, prepare

NUM, SIZE = 4, 8  # batches, samples of each


def whole_scores(scores: Scores) -> dict[str, Tensor]:
    """Scores of whole weights, put together from all ranks; every cell must be owned exactly once."""
    out = {}
    for name, shape in scores.shapes.items():
        shard, values = scores.shards[name], torch.zeros(shape).view(-1)
        owners = torch.zeros_like(values)
        index = shard.box.flat_index(0, shard.box.numel)
        values[index], owners[index] = shard.values.float(), 1.0
        owners = collectives.all_reduce(owners, what="owners")
        assert bool((owners == 1).all()), name
        out[name] = collectives.all_reduce(values, what="scores").view(shape)
    return out


def get(engine: str, optimizer: str = "momentum", accumulation: int = 1, clip_norm: float | None = None) -> Prepared:
    return prepare(
        make_net,
        engine,
        lambda p: make_optimizer(optimizer, p),
        accumulation=accumulation,
        micro_batch=SIZE // dist.get_world_size(),
        clip_norm=clip_norm,
    )


# -- what fails in silence elsewhere is an error here --------------------------------------------------------------------


def one_step(prepared: Prepared, batch: Any) -> None:
    prepared.zero_grad(to_none=True)
    prepared.backward(loss_fn(prepared.model, batch), True)
    prepared.step()
