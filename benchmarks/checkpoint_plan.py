"""How much planning a checkpoint costs as the number of ranks grows, without those ranks.

    python benchmarks/checkpoint_plan.py --model decoder_7b --ranks 8 64 256 1024

torch.distributed.checkpoint plans for all ranks together: every rank sends what it would write of each tensor to one rank,
which removes duplicates, checks, and sends plans back. The script makes the plans of all ranks in turn and processes them as
that rank does. Beside it, the same tensors by this package: each rank plans for itself. Then it writes the files of all
ranks, with one element in the place of each piece, since headers do not depend on their size, and reads the headers as a
rank does that goes on with its own part, and as one that needs others' parts.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
from side_by_side import parser, show
from torch.distributed.checkpoint import DefaultSavePlanner

from dcft_dist.planning.planned_models import Request, planned
from dcft_dist.weights.shard_files import FlatPiece, ShardReader, State, shard_file_name, write_shard_file


def pieces(shapes: dict[str, torch.Size], rank: int, ranks: int, device: str) -> State:
    """What a rank of FSDP2 stores for weights and AdamW: rows of each weight and of both moments, and the count of steps."""
    state: State = {}
    for name, shape in shapes.items():
        rows, each = -(-shape[0] // ranks), prod(shape[1:])
        begin, end = (min(number * rows, shape[0]) * each for number in (rank, rank + 1))
        size = end - begin if device == "meta" else min(end - begin, 1)
        for key in (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"):
            state[key] = FlatPiece(torch.zeros(size, device=device), prod(shape), begin)
        if size:
            state[f"optimizer.{name}.step"] = torch.zeros(())
    return state


def together(shapes: dict[str, torch.Size], ranks: int) -> dict[str, Any]:
    """Bytes that the planning rank receives and sends, and its seconds."""
    plans, received, planner = [], 0, DefaultSavePlanner()
    for rank in range(ranks):
        planner.set_up_planner(pieces(shapes, rank, ranks, "meta"), None, rank == 0)  # type: ignore[arg-type]
        plans.append(planner.create_local_plan())
        received += len(pickle.dumps(plans[-1]))
    began = time.perf_counter()
    agreed, _ = planner.create_global_plan(plans)
    seconds = time.perf_counter() - began
    sent = sum(len(pickle.dumps(plan)) for plan in agreed)
    return {"together: MB to one rank and back": (received + sent) / 1e6, "together: s of that rank": seconds}


def alone(shapes: dict[str, torch.Size], ranks: int) -> dict[str, Any]:
    """Bytes of the checksums of all ranks; seconds of a rank to plan and write, and to read headers."""
    with tempfile.TemporaryDirectory() as name:
        folder, states = Path(name), [pieces(shapes, rank, ranks, "cpu") for rank in range(ranks)]
        began = time.perf_counter()
        for rank, state in enumerate(states):
            write_shard_file(folder, state, rank)
        written = (time.perf_counter() - began) / ranks
        began = time.perf_counter()
        ShardReader(folder, [folder / shard_file_name(rank) for rank in (0, ranks - 1)])
        own = time.perf_counter() - began
        began = time.perf_counter()
        ShardReader(folder)
        every = time.perf_counter() - began
    return {
        "alone: MB to each rank": 5 * 8 * ranks / 1e6,
        "alone: s of a rank": written,
        "headers: s, own file": own,
        "headers: s, all files": every,
    }


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="decoder_7b")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    options = arguments.parse_args()
    model = planned(Request(options.model, 1)).model
    shapes = {name: p.shape for name, p in model.named_parameters()}
    rows = [
        {"tensors": len(shapes), "ranks": ranks, **together(shapes, ranks), **alone(shapes, ranks)}
        for ranks in options.ranks
    ]
    show(rows, options.json, 1)


if __name__ == "__main__":
    main()
