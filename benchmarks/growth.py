"""How the cost of selecting, scoring and attaching grows with the number of weights and of ranks.

    python benchmarks/growth.py --picture docs/images/growth.png

Seconds; `exponent`: of the number of weights, fitted to the upper half by least squares in logarithms (1: linear). Ranks
share the machine's cores, so more of them than cores cannot be faster.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from penalty import Net, eligible, mask_of
from selection import FRACTION, scores_of
from side_by_side import on_ranks, parser, seconds, show
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental

SELECTED = (10**6, 10**7, 10**8, 10**9)
WIDTHS = (128, 256, 512, 1024, 2048)  # two layers each: 0.4 to 100 million weights


def selecting(number: int) -> float:
    return seconds(partial(select_fundamental, scores_of("normal", number), FRACTION))


def scoring_and_attaching(width: int) -> list[float]:
    """Seconds of a score batch of 64 tokens, and of attaching at the update level, under FSDP2."""
    torch.manual_seed(0)
    model = Net(2, width)
    chosen = FundamentalSet.from_masks({n: mask_of(p, i) for i, (n, p) in enumerate(eligible(model).items())})
    for layer in model.body.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    items = [(torch.randn(4, 16, width), torch.randint(0, 10, (4,)))]

    def score() -> Any:
        return score_importance(model, items, lambda m, item: functional.cross_entropy(m(item[0]), item[1]), head="head.*")

    def attach() -> None:
        attach_penalty(model, chosen, optimizer=optimizer, level="update").remove()

    return [seconds(score), seconds(attach)]


def exponent(numbers: list[int], times: list[float]) -> float:
    """Over the upper half of the sizes: below them constant costs count."""
    half = len(numbers) // 2
    return float(np.polyfit(np.log(numbers[half:]), np.log(times[half:]), 1)[0])


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--picture", type=Path)
    given = options.parse_args()
    sizes = [sum(p.numel() for p in eligible(Net(2, width)).values()) for width in WIDTHS]
    curves: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for ranks in given.ranks:
        curves["selecting", ranks] = list(SELECTED), [max(on_ranks(ranks, selecting, n)) for n in SELECTED]
        both = [on_ranks(ranks, scoring_and_attaching, width)[0] for width in WIDTHS]
        curves["scoring a batch", ranks] = sizes, [score for score, _ in both]
        curves["attaching", ranks] = sizes, [attach for _, attach in both]
    rows: list[dict[str, Any]] = []
    for (what, ranks), (numbers, times) in curves.items():
        steep = exponent(numbers, times)
        rows += [
            {"what": what, "ranks": ranks, "weights": n, "s": t, "exponent": steep}
            for n, t in zip(numbers, times, strict=True)
        ]
    show(rows, given.json)
    if given.picture:
        draw(curves, given.picture)


def draw(curves: dict[tuple[str, int], tuple[list[int], list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(what for what, _ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.2), layout="constrained")
    for name, axis in zip(names, axes, strict=True):
        for (what, ranks), (numbers, times) in curves.items():
            if what == name:
                axis.loglog(numbers, times, "o-", label=f"{ranks} rank{'s' if ranks > 1 else ''}")
        axis.set(title=name, xlabel="weights", ylabel="seconds")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
