"""How the time of selecting, scoring and attaching grows with the number of weights and of ranks.

    python benchmarks/growth.py --picture docs/images/growth.png

`exponent`: how the seconds grow with the number of weights (1: linearly), fitted to the upper half of the sizes by least
squares in logarithms. The ranks share the machine's cores, so more ranks than cores cannot be faster.
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
WIDTHS = (128, 256, 512, 1024, 2048)  # of models with two layers: 0.4 to 100 million weights


def selecting(number: int) -> float:
    """Seconds of a selection from this many scores."""
    return seconds(partial(select_fundamental, scores_of("normal", number), FRACTION))


def scoring_and_attaching(width: int) -> list[float]:
    """Seconds of a score batch with 64 tokens, and of attaching at the update level, under FSDP2."""
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
    """The exponent over the upper half of the sizes; in the lower half, constant costs dominate."""
    half = len(numbers) // 2
    return float(np.polyfit(np.log(numbers[half:]), np.log(times[half:]), 1)[0])


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--picture", type=Path)
    options = arguments.parse_args()
    sizes = [sum(p.numel() for p in eligible(Net(2, width)).values()) for width in WIDTHS]
    curves: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for ranks in options.ranks:
        curves["selecting", ranks] = list(SELECTED), [max(on_ranks(ranks, selecting, n)) for n in SELECTED]
        both = [on_ranks(ranks, scoring_and_attaching, width)[0] for width in WIDTHS]
        curves["scoring a batch", ranks] = sizes, [score for score, _ in both]
        curves["attaching", ranks] = sizes, [attach for _, attach in both]
    rows: list[dict[str, Any]] = []
    for (name, ranks), (numbers, times) in curves.items():
        growth = exponent(numbers, times)
        rows += [
            {"what": name, "ranks": ranks, "weights": n, "s": t, "exponent": growth}
            for n, t in zip(numbers, times, strict=True)
        ]
    show(rows, options.json)
    if options.picture:
        draw(curves, options.picture)


def draw(curves: dict[tuple[str, int], tuple[list[int], list[float]]], path: Path) -> None:
    """Draws one panel for each name and one line for each number of ranks.

    Args:
        curves: (name, ranks) -> numbers of weights and seconds.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.2), layout="constrained")
    for name, axis in zip(names, axes, strict=True):
        for (curve_name, ranks), (numbers, times) in curves.items():
            if curve_name == name:
                axis.loglog(numbers, times, "o-", label=f"{ranks} rank{'s' if ranks > 1 else ''}")
        axis.set(title=name, xlabel="weights", ylabel="seconds")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
