"""What penalty and scoring cost the host, on the structure of a ViT-L, and what saving only fundamental cells brings.

    python benchmarks/host_cost.py

On a GPU a step is late because the host is. First table: Python calls that each way of the penalty adds to a step, as
`tests/method/test_counts.py` counts them; `scoring` is for each score batch. Second table: time that the update level adds
to a step of AdamW on the CPU, with an index of the fundamental cells and with copies of all cells, in turn.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import on_ranks, parser, show
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.method import shard_table
from tests.counts import WAYS, added, scored

ENGINES = (("single", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp1", 2), ("zero2", 2), ("zero3", 2))
TENSORS, SIDE, ROUNDS = 24, 1024, 9


def counts(engine: str) -> list[int]:
    """Python calls of each way, then of a score batch."""
    logging.getLogger("dcft_dist").setLevel(logging.ERROR)
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # DeepSpeed asks for it
    found = added(engine)
    return [found[way][0] for way in WAYS] + ([scored(engine, False)[0]] if engine in ("single", "fsdp2") else [])


def stepping(dense: float) -> tuple[Any, Any]:
    """A model under a penalty at the update level, and its optimizer; `dense` as in `shard_table`."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(TENSORS))
    masks = {n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    before, shard_table._DENSE = shard_table._DENSE, dense
    if dense >= 0 or dense == -1.0:
        attach_penalty(model, FundamentalSet.from_masks(masks), optimizer=optimizer, level="update")
    shard_table._DENSE = before
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(9):  # until no check of the optimizer is due
        optimizer.step()
    return model, optimizer


def update() -> dict[str, float]:
    """Milliseconds that the update level adds to a step: medians over rounds in which the arms take turns."""
    torch.set_num_threads(1)
    arms = {"plain": stepping(-2.0), "all": stepping(-1.0), "index": stepping(shard_table._DENSE)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, (_, optimizer) in arms.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - began))
    extra = {n: statistics.median(a - b for a, b in zip(times[n], times["plain"], strict=True)) for n in ("all", "index")}
    weights = TENSORS * SIDE * SIDE
    return {
        "weights": weights,
        "step of AdamW, ms": statistics.median(times["plain"]),
        "all cells, ms": extra["all"],
        "by index, ms": extra["index"],
        "ratio": extra["index"] / extra["all"],
    }


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    rows: list[dict[str, Any]] = []
    for engine, ranks in ENGINES:
        calls = [max(column) for column in zip(*on_ranks(ranks, counts, engine), strict=True)]
        rows.append({"engine": engine, "ranks": ranks, **dict(zip((*WAYS, "scoring"), calls, strict=False))})
    show(rows, options.json, repeats=1)
    show([update()], options.json, repeats=ROUNDS)


if __name__ == "__main__":
    main()
