"""How well each criterion ranks weights, compared with the true rise of the loss when a single weight is removed.

    python benchmarks/criteria.py

The network is small, trained, and in float64: ten classes, inputs of 64 numbers around class means, 20 % of the labels
wrong. Every weight of the body is set to zero alone; the rise of the training loss is its true importance. The table has
Spearman's rank correlation with the true importance, over all weights and over the true top tenth. The last column is the
share of the true top tenth that the criterion selects. Numbers are means over seeds (standard deviation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from side_by_side import parser, show
from torch import Tensor, nn
from torch.nn import functional

from dcft_dist import score_importance

CRITERIA = ("taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random")


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [512, 64] and labels [512], a fifth of them replaced by random ones."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(10, 64, generator=g, dtype=torch.float64)
    y = torch.randint(0, 10, (512,), generator=g)
    x = means[y] + 1.5 * torch.randn(512, 64, generator=g, dtype=torch.float64)
    wrong = torch.rand(512, generator=g) < 0.2
    return x, torch.where(wrong, torch.randint(0, 10, (512,), generator=g), y)


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def rises(net: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> np.ndarray[Any, Any]:
    """By how much the loss rises when a weight is set to zero: one number for each element of the named tensors."""
    base, losses = float(functional.cross_entropy(net(x), y)), []
    for name in names:
        flat = net.get_parameter(name).view(-1)
        for i in range(len(flat)):
            weight = float(flat[i])
            flat[i] = 0.0
            losses.append(float(functional.cross_entropy(net(x), y)) - base)
            flat[i] = weight
    return np.array(losses)


def spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def measure(seed: int) -> dict[str, tuple[float, float, float]]:
    """For each criterion: correlation over all weights, correlation over the true top tenth, share of it selected."""
    x, y = data(seed)
    net = trained(x, y, seed)
    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(512)]
    agreement, truth, top = {}, np.zeros(0), np.zeros(0)
    for criterion in CRITERIA:
        batches = singles[:128] if criterion == "obs" else singles  # the number that the published code uses
        scores = score_importance(
            net, batches, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), head="4", criterion=criterion, seed=seed
        )  # type: ignore[arg-type]
        if not len(truth):
            truth = rises(net, x, y, list(scores.shapes))
            top = np.argsort(-truth)[: len(truth) // 10]
        values = torch.cat([scores.shards[n].values for n in scores.shapes]).double().numpy()
        hit = len(set(np.argsort(-values)[: len(top)]) & set(top)) / len(top)
        agreement[criterion] = spearman(values, truth), spearman(values[top], truth[top]), hit
    return agreement


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=5)
    options = arguments.parse_args()
    results = [measure(seed) for seed in range(options.seeds)]
    rows = []
    for criterion in CRITERIA:
        values = np.array([r[criterion] for r in results])
        names = ("Spearman", "Spearman in the top tenth", "share of the top tenth found")
        cells = (f"{v.mean():.3f} ({v.std(ddof=1):.3f})" for v in values.T)
        rows.append({"criterion": criterion} | dict(zip(names, cells, strict=True)))
    show(rows, options.json, 1)


if __name__ == "__main__":
    main()
