"""Which optimizers can the update level hold back? Compares the verdict of `attach_penalty` with what really happens.

For each optimizer a small net is trained twice with a penalised set (factor 0.1): once by a plain loop that shortens each
step after `optimizer.step`, without this package, and once by the package. How far the set has moved in the first says the
truth.

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

STEPS, FACTOR, HELD = 24, 0.1, 0.2  # HELD: the set has moved less than this part of its way: the penalty acts
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
            attach_penalty(model, FundamentalSet.from_masks(masks), FACTOR, optimizer=optimizer, level="update")
        torch.manual_seed(2)
        for x, y in [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(STEPS)]:
            for one, stepped in ((model, optimizer), (plain, free)):
                before = {name: p.detach().clone() for name, p in one.named_parameters()}
                stepped.zero_grad()
                nn.functional.cross_entropy(one(x), y).backward()
                stepped.step()
                if one is model and not penalise:
                    shorten(model, masks, before)
    except PenaltyError as error:
        said = "refused: " + str(error).removeprefix("rank 0: ").split(";")[0].split(": of a change")[0]
    for stepped in (optimizer, free):
        if callable(end := getattr(stepped, "eval", None)):
            end()  # schedule-free: the weights that count
    ways = [sum(float((one.get_parameter(n) - start[n])[m].norm()) for n, m in masks.items()) for one in (model, plain)]
    return ways[0] / max(ways[1], 1e-12), said


@torch.no_grad()
def shorten(model: nn.Module, masks: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in masks:
            p.copy_(torch.where(masks[name], before[name] + FACTOR * (p - before[name]), p))


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
    print(f"A set with factor {FACTOR}, {STEPS} steps. *moved*: distance of the set from its start, relative to training")
    print(f"without a penalty, when a plain loop shortens each step. Far above {FACTOR}: the optimizer undoes it.\n")
    print("| optimizer | moved | with the package | verdict |\n|---|---|---|---|")
    let_in, kept_out, skipped = 0, 0, []
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
        holds = truth < HELD
        let_in += said == "accepted" and not (holds and moved < HELD)
        kept_out += said != "accepted" and holds
        print(f"| {name} | {truth:.3f} | {'' if said != 'accepted' else f'{moved:.3f}'} | {said} |")
    print(f"\nAccepted, though the set has moved {HELD} of its way or more: {let_in}. Refused, though it has moved less:")
    print(f"{kept_out} (they keep iterates of the weights or change weights after their step: more steps would show it).")
    print(f"Not tried, since their plain loop fails: {', '.join(skipped) or 'none'}.")


if __name__ == "__main__":
    main()
