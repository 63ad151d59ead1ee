"""Selecting, saving, loading and attaching the set of a model of a billion weights, sharded over ranks by FSDP2.

    python benchmarks/attach.py --weights 1_000_000_000 --ranks 2

`peak bytes a weight`: what the resident memory of a rank rises by during the call, over the eligible weights of the whole
model. A mask of booleans would be 1, all bits are 0.125.
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
    model, found, file = sharded(weights), dict[str, tuple[float, int]](), Path(folder) / "set.safetensors"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def timed(what: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result, peak = peak_bytes(call)
        found[what] = (time.perf_counter() - begin, peak)
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
    return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--weights", type=int, default=1_000_000_000)
    options.add_argument("--ranks", type=int, default=2)
    given = options.parse_args()
    number = max(1, given.weights // WIDTH**2) * WIDTH**2
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(given.ranks, case, given.weights, folder)
        size = (Path(folder) / "set.safetensors").stat().st_size
    rows: list[dict[str, Any]] = []
    for what in found[0]:
        s, peak = (max(f[what][i] for f in found) for i in (0, 1))
        row = {"step": what, "ranks": given.ranks, "weights": number, "s": s, "peak bytes a weight": peak / number}
        rows.append({**row, "file bytes": size} if what == "save" else row)
    show(rows, given.json, 1)


if __name__ == "__main__":
    main()
