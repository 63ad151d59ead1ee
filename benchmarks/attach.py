"""Times selecting, saving, loading and attaching the set of a model with a billion weights, sharded over ranks by FSDP2.

    python benchmarks/attach.py --weights 1_000_000_000 --ranks 2

`peak bytes a weight`: by how much the resident memory of a rank rises during the call, divided by the eligible weights of
the whole model. A mask of booleans would take 1 byte a weight, the bits of the whole set take 0.125.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import on_ranks, parser, peak_bytes, show
from torch import nn
from torch.distributed.fsdp import fully_shard

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental

WIDTH = 4096


def sharded(weights: int) -> nn.Module:
    """A stack of linear layers with about this many weights in all, sharded over the ranks."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, weights // WIDTH**2))))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    return model


def case(weights: int, folder: str) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes of each call, on this rank."""
    model, measured, file = sharded(weights), dict[str, tuple[float, int]](), Path(folder) / "set.safetensors"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result, peak = peak_bytes(call)
        measured[name] = (time.perf_counter() - begin, peak)
        return result

    scores = timed("score (random)", lambda: score_importance(model, None, None, head=(), criterion="random"))
    chosen: FundamentalSet = timed("select", partial(select_fundamental, scores))
    del scores
    timed("save", partial(chosen.save, file))
    del chosen
    loaded: FundamentalSet = timed("load", lambda: FundamentalSet.load(file))
    for where in ("before", "after"):
        attach = partial(attach_penalty, model, loaded, optimizer=optimizer, level="gradient", where=where)
        timed(f"attach, {where}", attach).remove()
    return measured


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--weights", type=int, default=1_000_000_000)
    arguments.add_argument("--ranks", type=int, default=2)
    options = arguments.parse_args()
    number = max(1, options.weights // WIDTH**2) * WIDTH**2
    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(options.ranks, case, options.weights, folder)
        size = (Path(folder) / "set.safetensors").stat().st_size
    rows: list[dict[str, Any]] = []
    for name in by_rank[0]:
        s, peak = (max(measured[name][i] for measured in by_rank) for i in (0, 1))
        row = {"step": name, "ranks": options.ranks, "weights": number, "s": s, "peak bytes a weight": peak / number}
        rows.append({**row, "file bytes": size} if name == "save" else row)
    show(rows, options.json, 1)


if __name__ == "__main__":
    main()
