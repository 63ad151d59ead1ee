"""The highest tenth of N float32 scores: `select_fundamental` over ranks, and what a single process has.

    python benchmarks/selection.py --elements 100_000_000 --ranks 2
    python benchmarks/selection.py --elements 1_000_000_000 --gpu

`kinds`: how the scores are distributed. `passes`: how often a rank reads its scores. `extra MiB`: what the resident memory
of a rank rises by, less the set itself (one bit a weight); with `--gpu`, what is allocated on the GPU. `times a pass`: as
often as a plain reading of all scores would fit into the time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from side_by_side import gpu_peak_bytes, on_ranks, parser, peak_bytes, seconds, show

from dcft_dist import Scores, select_fundamental
from dcft_dist.distributed import collectives
from dcft_dist.engines.box import Box
from dcft_dist.method import kth_highest, ranking
from dcft_dist.method.ranking import Ranking
from dcft_dist.method.scores import ScoreShard

FRACTION, TENSORS = 0.1, 64
KINDS = ("normal", "skewed", "tied", "zero-heavy", "denormal")


def values_of(kind: str, number: int, seed: int, device: str) -> torch.Tensor:
    """Magnitudes of a normal distribution; exponentials over ten decades; 9 values; a third zeros; denormal numbers."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(number, generator=random, device=device).abs_()
    if kind == "skewed":
        x.mul_(5).exp_()
    elif kind == "tied":
        x.mul_(2).round_()
    elif kind == "zero-heavy":
        x[torch.rand(number, generator=random, device=device) < 0.95] = 0
    elif kind == "denormal":
        x.mul_(1e-40)
    return x


def scores_of(kind: str, number: int, device: str) -> Scores:
    """This rank's part of `number` scores in 64 weights: a slice of each."""
    rank, ranks, each = collectives.rank(), collectives.world_size(), number // TENSORS
    begin, end = each * rank // ranks, each * (rank + 1) // ranks
    values = values_of(kind, (end - begin) * TENSORS, rank, device).split(end - begin)
    shards = {f"w{i:02}": ScoreShard(Box.flat(each, begin, end - begin), values[i]) for i in range(TENSORS)}
    return Scores("given", dict.fromkeys(shards, (each,)), shards, num_weights=number)


def ours(kind: str, number: int, device: str) -> dict[str, float]:
    scores = scores_of(kind, number, device)
    held = sum(s.values.numel() for s in scores.shards.values())
    select = partial(select_fundamental, scores, FRACTION)
    with collectives.counted() as traffic:
        found, peak = (gpu_peak_bytes if device == "cuda" else peak_bytes)(select)
    if found.num_selected != round(FRACTION * number // TENSORS * TENSORS):
        raise SystemExit(f"{found.num_selected} of {number} selected")
    return {
        "s": seconds(select),
        "passes": _read(select) / held,
        "extra MiB": (peak - (0 if device == "cuda" else held / 8)) / 2**20,  # the set is on the CPU
        "KiB sent": traffic.num_bytes / 1024,
        "collectives": float(traffic.calls),
    }


def _read(select: Any) -> int:
    """How many scores the call reads, repeated readings counted as often."""
    total, parts, chunks = 0, kth_highest.pieces, Ranking.chunks

    def counted_parts(values: torch.Tensor) -> Any:
        nonlocal total
        total += values.numel()
        return parts(values)

    def counted_chunks(ranking: Ranking) -> Any:
        nonlocal total
        for chunk in chunks(ranking):
            total += chunk.end - chunk.begin
            yield chunk

    kth_highest.pieces = ranking.pieces = counted_parts  # type: ignore[attr-defined]
    Ranking.chunks = counted_chunks  # type: ignore[method-assign]
    try:
        select()
    finally:
        kth_highest.pieces = ranking.pieces = parts  # type: ignore[attr-defined]
        Ranking.chunks = chunks  # type: ignore[method-assign]
    return total


def gather(number: int) -> dict[str, float]:
    """Every score is sent to rank 0, which has the machine to itself."""
    mine = torch.cat([s.values for s in scores_of("normal", number, "cpu").shards.values()])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None

    def call() -> None:
        dist.gather(mine, parts)
        if parts is not None:
            torch.set_num_threads(dist.get_world_size())
            torch.cat(parts).topk(round(FRACTION * number), sorted=False)

    return {"s": seconds(call)}


def one_process(number: int, device: str) -> dict[str, float]:
    """Seconds of each in one process with as many threads as there are ranks; `read`: one maximum over all."""
    x = values_of("normal", number, 0, device)
    k = round(FRACTION * number)
    found = {"read": seconds(x.max), "torch.topk": seconds(lambda: x.topk(k, sorted=False))}
    if device == "cuda":  # kthvalue takes minutes there
        return found | {"torch.sort": seconds(x.sort, 1)}
    found["torch.kthvalue"] = seconds(lambda: x.kthvalue(number - k))
    return found | {"np.partition": seconds(lambda: np.partition(x.numpy(), number - k))}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--elements", type=int, default=100_000_000)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    options.add_argument("--alone", action="store_true", help="without the others, which need four times the memory")
    options.add_argument("--gpu", action="store_true", help="one rank, with all scores on its GPU")
    given = options.parse_args()
    device = "cuda" if given.gpu else "cpu"
    given.ranks = 1 if given.gpu else given.ranks
    number = given.elements // TENSORS * TENSORS
    rows: list[dict[str, Any]] = []
    for kind in given.kinds:
        found = on_ranks(given.ranks, ours, kind, number, device)
        worst = {key: max(f[key] for f in found) for key in found[0]}
        rows.append(
            {"selection": f"select_fundamental, {given.ranks} ranks, {device}", "scores": kind, "elements": number, **worst}
        )
    if not given.alone:
        torch.set_num_threads(given.ranks)
        others = one_process(number, device)
        if not given.gpu:
            others[f"gather over {given.ranks} ranks + torch.topk"] = on_ranks(given.ranks, gather, number)[0]["s"]
        rows += [{"selection": name, "scores": "normal", "elements": number, "s": s} for name, s in others.items()]
    for row in rows:
        row["times ours"] = row["s"] / rows[0]["s"]
        if not given.alone:
            row["times a pass"] = row["s"] / others["read"]
    show(rows, given.json)


if __name__ == "__main__":
    main()
