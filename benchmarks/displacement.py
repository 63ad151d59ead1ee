"""How far penalised weights move with each optimizer, relative to no penalty, at the gradient and at the update level.

    python benchmarks/displacement.py    (prints the table of docs/results/displacement.md)

A two-layer transformer encoder takes 20 steps on a fixed batch of random tokens, with factor 0.1 on a random tenth of the
linear weights and three seeds. 0.10 means that the penalty works, 1.00 that the optimizer has cancelled it.
"""

from __future__ import annotations

import datetime
import platform
import statistics
from typing import Any

import torch
from torch import nn

from dcft_dist import attach_penalty, score_importance, select_fundamental

Make = Any
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01),
    "Adam, L2 0.01": lambda p: torch.optim.Adam(p, lr=1e-4, weight_decay=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-4),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-4),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def displacement(make: Make, factor: float, level: str, seed: int) -> float:
    """Euclidean distance that the penalised weights move in 20 steps.

    Args:
        make: makes the optimizer from the parameters.
        factor: of the penalty; 1 is no penalty.
        level: `"gradient"` or `"update"`.
        seed: of the weights, the batch and the penalised set.
    """
    torch.manual_seed(seed)
    net, x, y = Net(), torch.randint(0, 50, (64, 12)), torch.randint(0, 5, (64,))
    chosen = select_fundamental(score_importance(net, None, None, head="head", criterion="random", seed=seed), 0.1)
    start = {n: net.get_parameter(n).detach().clone() for n in chosen.names}
    optimizer = make(net.parameters())
    attach_penalty(net, chosen, factor, optimizer=optimizer, level=level)  # type: ignore[arg-type]
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    moved = [(net.get_parameter(n).detach() - start[n])[chosen.mask(n)] for n in chosen.names]
    return float(torch.cat(moved).norm())


def main() -> None:
    torch.set_num_threads(1)
    today, where = datetime.date.today(), f"{platform.machine()} CPU, torch {torch.__version__}"
    print(f"Made by `python benchmarks/displacement.py` on {today}, {where}.\n")
    print("| optimizer | gradient level | update level |\n|---|---|---|")
    for name, make in OPTIMIZERS.items():
        row = []
        for level in ("gradient", "update"):
            ratios = [displacement(make, 0.1, level, s) / displacement(make, 1.0, level, s) for s in range(3)]
            row.append(statistics.mean(ratios))
        print(f"| {name} | {row[0]:.2f} | {row[1]:.2f} |")


if __name__ == "__main__":
    main()
