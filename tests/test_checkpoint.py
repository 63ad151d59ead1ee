"""A checkpoint is independent of engine and number of ranks: training goes on elsewhere as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.checkpoint import load_checkpoint, model_state, read_state, save_checkpoint
from dcft_dist.engines import torch_optimizer

from .nets import HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from .prepared import prepare
from .ranks import run_ranks

BATCH, STEPS = 12, 3
JOURNEYS = [
    [("fsdp2", 4), ("ddp", 2), ("fsdp1-full-flat", 1), ("zero2", 3)],
    [("zero3", 4), ("fsdp2-hybrid", 2), ("single", 1), ("fsdp1-gradop-orig", 3)],
    [("fsdp2-shard1", 2), ("zero1", 4), ("zero3-offload", 3), ("fsdp2", 1)],
    [("zero0", 2), ("zero2-offload", 4), ("fsdp1-none-flat", 2), ("zero3", 1)],
]


def leg(engine: str, number: int, folder: str) -> dict[str, Tensor]:
    """Three steps from the checkpoint of the leg before, and a checkpoint for the next one."""
    prepared = prepare(
        make_net, engine, lambda p: make_optimizer("adamw_smooth", p), micro_batch=BATCH // dist.get_world_size()
    )
    optimizer: Any = torch_optimizer(prepared.optimizer)
    if number:
        before = Path(folder) / f"leg_{number - 1}"
        assert read_state(before) == {"leg": number - 1}
        load_checkpoint(before, prepared.model, optimizer)
    chosen = FundamentalSet.from_masks({"blocks.0.up.weight": torch.ones(11, 13, dtype=torch.bool)}, head=HEAD)
    attach_penalty(prepared.model, chosen, 0.1, optimizer=prepared.optimizer)
    for batch in make_batches(STEPS * 4, BATCH, torch.float32)[STEPS * number : STEPS * (number + 1)]:
        prepared.zero_grad(to_none=True)
        prepared.backward(loss_fn(prepared.model, my_part(batch)), True)
        prepared.step()
    save_checkpoint(Path(folder) / f"leg_{number}", model_state(prepared.model, optimizer), {"leg": number})
    return prepared.state()


@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda j: "-".join(f"{e}@{n}" for e, n in j))
def test_training_goes_on_under_other_engines_and_ranks(journey: list[tuple[str, int]], tmp_path: Path) -> None:
    net = make_net()
    optimizer = make_optimizer("adamw_smooth", net.parameters())
    held = net.blocks[0].up.weight
    batches = make_batches(STEPS * 4, BATCH, torch.float32)
    for number, (engine, ranks) in enumerate(journey):
        for batch in batches[STEPS * number : STEPS * (number + 1)]:
            optimizer.zero_grad()
            loss_fn(net, batch).backward()
            old = held.detach().clone()
            optimizer.step()
            held.data.copy_(old + 0.1 * (held.data - old))
        for state in run_ranks(ranks, leg, engine, number, str(tmp_path)):
            for name, weight in net.named_parameters():
                if not name.startswith("unused"):  # an engine with flat buffers decays it
                    assert float((state[name].view_as(weight) - weight.detach()).abs().max()) <= 2e-6, (engine, name)
