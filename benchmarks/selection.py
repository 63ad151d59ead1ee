"""Times the selection of the highest tenth of N float32 scores: `select_fundamental` over ranks, and other ways.

    python benchmarks/selection.py --elements 100_000_000 --ranks 2
    python benchmarks/selection.py --elements 1_000_000_000 --gpu

The other ways use all scores in one process. `--kinds`: how the scores are distributed. `passes`: how often a rank reads
its scores. `extra MiB`: by how much the resident memory of a rank rises, less the set itself (one bit a weight); with
`--gpu`, how much is allocated on the GPU. `times a pass`: how often all scores could be read in the same time.
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
from dcft_dist.method.first_pass import FirstPass
from dcft_dist.method.ranking import Ranking
from dcft_dist.method.scores import ScoreShard

FRACTION, TENSORS = 0.1, 64
KINDS = ("normal", "skewed", "tied", "zero-heavy", "denormal")


def values_of(kind: str, number: int, seed: int, device: str) -> torch.Tensor:
    """Random scores [number].

    Args:
        kind: `"normal"`: magnitudes of a normal distribution. `"skewed"`: exponentials over ten decades. `"tied"`: about
            9 different values. `"zero-heavy"`: 95 % zeros. `"denormal"`: denormal numbers.
        number: of scores.
        seed: of the random numbers.
        device: where the scores are.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(number, generator=generator, device=device).abs_()
    if kind == "skewed":
        x.mul_(5).exp_()
    elif kind == "tied":
        x.mul_(2).round_()
    elif kind == "zero-heavy":
        x[torch.rand(number, generator=generator, device=device) < 0.95] = 0
    elif kind == "denormal":
        x.mul_(1e-40)
    return x


def scores_of(kind: str, number: int, device: str) -> Scores:
    """This rank's shard of `number` scores in 64 tensors: a slice of each tensor."""
    rank, ranks, each = collectives.rank(), collectives.world_size(), number // TENSORS
    begin, end = each * rank // ranks, each * (rank + 1) // ranks
    values = values_of(kind, (end - begin) * TENSORS, rank, device).split(end - begin)
    shards = {f"w{i:02}": ScoreShard(Box.flat(each, begin, end - begin), values[i]) for i in range(TENSORS)}
    return Scores("given", dict.fromkeys(shards, (each,)), shards, num_weights=number)


def ours(kind: str, number: int, device: str) -> dict[str, float]:
    """The measured columns of `select_fundamental`, on this rank."""
    scores = scores_of(kind, number, device)
    local = sum(s.values.numel() for s in scores.shards.values())
    select = partial(select_fundamental, scores, FRACTION)
    with collectives.counted() as traffic:
        chosen, peak = (gpu_peak_bytes if device == "cuda" else peak_bytes)(select)
    if chosen.num_selected != round(FRACTION * number // TENSORS * TENSORS):
        raise SystemExit(f"{chosen.num_selected} of {number} selected")
    return {
        "s": seconds(select),
        "passes": _scores_read(select) / local,
        "extra MiB": (peak - (0 if device == "cuda" else local / 8)) / 2**20,  # the set is always on the CPU
        "KiB sent": traffic.num_bytes / 1024,
        "collectives": float(traffic.calls),
    }


def _scores_read(select: Any) -> int:
    """How many scores the call reads; a score that is read twice counts twice."""
    total, pieces, chunks, count = 0, kth_highest.pieces, Ranking.chunks, FirstPass.count

    def counted_pass(first: FirstPass, *args: Any) -> Any:
        nonlocal total
        total += sum(values.numel() for values in first._scores.values())
        return count(first, *args)

    def counted_pieces(values: torch.Tensor) -> Any:
        nonlocal total
        total += values.numel()
        return pieces(values)

    def counted_chunks(ranking: Ranking) -> Any:
        nonlocal total
        for chunk in chunks(ranking):
            total += chunk.end - chunk.begin
            yield chunk

    kth_highest.pieces = ranking.pieces = counted_pieces  # type: ignore[attr-defined]
    Ranking.chunks = counted_chunks  # type: ignore[method-assign]
    FirstPass.count = counted_pass  # type: ignore[method-assign,assignment]
    try:
        select()
    finally:
        kth_highest.pieces = ranking.pieces = pieces  # type: ignore[attr-defined]
        Ranking.chunks = chunks  # type: ignore[method-assign]
        FirstPass.count = count  # type: ignore[method-assign]
    return total


def gather(number: int) -> dict[str, float]:
    """Sends every score to rank 0, which then selects alone and uses the threads of all ranks."""
    mine = torch.cat([s.values for s in scores_of("normal", number, "cpu").shards.values()])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None

    def call() -> None:
        dist.gather(mine, gathered)
        if gathered is not None:
            torch.set_num_threads(dist.get_world_size())
            torch.cat(gathered).topk(round(FRACTION * number), sorted=False)

    return {"s": seconds(call)}


def one_process(number: int, device: str) -> dict[str, float]:
    """Seconds of each way in one process with as many threads as ranks; `read`: one maximum over all scores."""
    x = values_of("normal", number, 0, device)
    k = round(FRACTION * number)
    times = {"read": seconds(x.max), "torch.topk": seconds(lambda: x.topk(k, sorted=False))}
    if device == "cuda":  # kthvalue takes minutes on a GPU
        return times | {"torch.sort": seconds(x.sort, 1)}
    times["torch.kthvalue"] = seconds(lambda: x.kthvalue(number - k))
    return times | {"np.partition": seconds(lambda: np.partition(x.numpy(), number - k))}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--elements", type=int, default=100_000_000)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    arguments.add_argument("--alone", action="store_true", help="no other ways, which need four times the memory")
    arguments.add_argument("--gpu", action="store_true", help="one rank, with all scores on its GPU")
    options = arguments.parse_args()
    device = "cuda" if options.gpu else "cpu"
    options.ranks = 1 if options.gpu else options.ranks
    number = options.elements // TENSORS * TENSORS
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        by_rank = on_ranks(options.ranks, ours, kind, number, device)
        worst = {key: max(measured[key] for measured in by_rank) for key in by_rank[0]}
        title = f"select_fundamental, {options.ranks} ranks, {device}"
        rows.append({"selection": title, "scores": kind, "elements": number, **worst})
    if not options.alone:
        torch.set_num_threads(options.ranks)
        others = one_process(number, device)
        if not options.gpu:
            others[f"gather over {options.ranks} ranks + torch.topk"] = on_ranks(options.ranks, gather, number)[0]["s"]
        rows += [{"selection": name, "scores": "normal", "elements": number, "s": s} for name, s in others.items()]
    for row in rows:
        row["times ours"] = row["s"] / rows[0]["s"]
        if not options.alone:
            row["times a pass"] = row["s"] / others["read"]
    show(rows, options.json)


if __name__ == "__main__":
    main()
