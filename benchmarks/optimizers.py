"""Which optimizers can the update level hold back? Compares the verdict of `attach_penalty` with what really happens.

For each optimizer a small net is trained twice with a set that must not move (factor 0): once by a plain loop that writes the old
values back after each step, without this package, and once by the package. The set's distance in the first says the truth.

    pip install pytorch_optimizer schedulefree prodigyopt lion_pytorch
    python benchmarks/optimizers.py > docs/results/optimizers.md
"""

from __future__ import annotations

import datetime
import importlib
import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.errors import PenaltyError

STEPS = 24
Make = Callable[[Any], torch.optim.Optimizer]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))


def train(make: Make, penalise: bool) -> tuple[float, str]:
    """(distance of the set from its start relative to its distance without any penalty, what the package says)."""
    model, plain = net(), net()
    names = ("0.weight", "2.weight", "0.bias")
    weights = dict(model.named_parameters())
    masks = {name: torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(1)) < 0.3 for name in names}
    start = {name: weights[name].detach().clone() for name in names}
    optimizer, free = make(model), make(plain)
    said = "accepted"
    try:
        if penalise:
            attach_penalty(model, FundamentalSet.from_masks(masks), 0.0, optimizer=optimizer, level="update")
        torch.manual_seed(2)
        for x, y in [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(STEPS)]:
            for one, stepped in ((model, optimizer), (plain, free)):
                before = {name: p.detach().clone() for name, p in one.named_parameters()}
                stepped.zero_grad()
                nn.functional.cross_entropy(one(x), y).backward()
                stepped.step()
                if one is model and not penalise:
                    write_back(model, masks, before)
    except PenaltyError as error:
        said = "refused: " + str(error).removeprefix("rank 0: ").split(";")[0].split(": of a change")[0]
    for stepped in (optimizer, free):
        if callable(end := getattr(stepped, "eval", None)):
            end()  # schedule-free: the weights that count
    moved = (float((dict(one.named_parameters())[n].detach() - start[n])[m].norm()) for one in (model, plain) for n, m in masks.items())
    with_penalty, without = (sum(part) for part in halves(list(moved)))
    return with_penalty / max(without, 1e-12), said


def halves(values: list[float]) -> tuple[list[float], list[float]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


@torch.no_grad()
def write_back(model: nn.Module, masks: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in masks:
            p.copy_(torch.where(masks[name], before[name], p))


def optimizers() -> Iterator[tuple[str, Make]]:
    """Every optimizer of torch, and of the packages above, that steps such a net with its defaults."""
    from torch.optim import Optimizer

    seen = set()
    for module in ("torch.optim", "transformers", "pytorch_optimizer", "schedulefree", "prodigyopt", "lion_pytorch"):
        try:
            library = importlib.import_module(module)
        except ImportError:
            continue
        for name in sorted(dir(library)) if module != "transformers" else ["Adafactor"]:
            kind = getattr(library, name, None)
            if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and kind not in seen:
                seen.add(kind)
                yield f"{module}.{name}", made(kind)
    yield "torch.optim.Adam(fused)", lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    try:
        from pytorch_optimizer import Lookahead
    except ImportError:
        return
    yield "Lookahead(AdamW)", lambda model: Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=3)


def made(kind: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        if kind.__name__ == "Muon":  # for matrices alone
            return kind([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
        if kind.__name__ == "Adafactor" and kind.__module__.startswith("transformers"):
            return kind(model.parameters())
        try:
            return kind(model.parameters(), lr=1e-2)
        except TypeError:
            return kind(model.parameters())

    return make


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    print("# Optimizers at the update level\n")
    print(f"{datetime.date.today()}, torch {torch.__version__}, {platform.processor() or platform.machine()}, ", end="")
    print("`python benchmarks/optimizers.py`.\n")
    print("A set with factor 0, 24 steps. *moved*: distance of the set from its start, relative to training without a penalty, when")
    print("a plain loop writes the old values back after each step. It should be 0; otherwise the optimizer undoes what is written.\n")
    print("| optimizer | moved | with the package | verdict |\n|---|---|---|---|")
    wrong, skipped = 0, []
    for name, make in optimizers():
        try:
            truth, _ = train(make, penalise=False)
        except Exception as error:
            skipped.append(f"{name} ({type(error).__name__})")
            continue
        try:
            moved, said = train(make, penalise=True)
        except Exception as error:
            moved, said = float("nan"), f"{type(error).__name__}: {error}"
        holds = truth < 1e-5
        wrong += holds != (said == "accepted") or (said == "accepted" and not moved < 1e-5)
        print(f"| {name} | {truth:.3f} | {'' if said != 'accepted' else f'{moved:.3f}'} | {said} |")
    print(f"\nVerdicts that differ from the truth: {wrong}. Not tried, since their plain loop fails: {', '.join(skipped) or 'none'}.")


if __name__ == "__main__":
    main()
