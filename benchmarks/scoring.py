"""How much scoring costs, compared with plain forward and backward passes of the same batches on the same engine and ranks.

    python benchmarks/scoring.py --ranks 2

`times plain`: seconds of a score batch, divided by the seconds of forward, backward and clearing of gradients. `extra
bytes`: the peak of scoring minus the peak of the plain passes, divided by (eligible weights / ranks). The scores themselves
take 4 bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from penalty import Net, eligible
from side_by_side import on_ranks, parser, peak_bytes, seconds, show
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dcft_dist import score_importance

Item = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, item: Item) -> Tensor:
    return functional.cross_entropy(model(item[0]), item[1])


def wrapped(engine: str, layers: int, width: int) -> nn.Module:
    """The model under an engine: `"ddp"`, `"fsdp2"`; any other name leaves it plain."""
    torch.manual_seed(0)
    model: nn.Module = Net(layers, width)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        for layer in model.body.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
    return model


def case(engine: str, batches: int, samples: int, length: int, layers: int, width: int) -> dict[str, float]:
    """The measured columns of one engine, on this rank."""
    model = wrapped(engine, layers, width).eval()
    torch.manual_seed(dist.get_rank())
    items = [(torch.randn(samples, length, width), torch.randint(0, 10, (samples,))) for _ in range(batches)]

    def plain() -> None:
        for item in items:
            loss_fn(model, item).backward()
            model.zero_grad()

    score = partial(score_importance, model, items, loss_fn, head="head.*")
    plain()
    _, peak_plain = peak_bytes(plain)
    scores, peak = peak_bytes(score)
    t_plain, t_score = seconds(plain), seconds(score)
    share = scores.num_eligible / dist.get_world_size()
    return {"s": t_score / batches, "times plain": t_score / t_plain, "extra bytes": (peak - peak_plain) / share}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--batches", type=int, default=4)
    arguments.add_argument("--samples", type=int, default=8, help="samples in a batch of each rank")
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--width", type=int, default=512)
    options = arguments.parse_args()
    sizes = (options.batches, options.samples, options.length, options.layers, options.width)
    number = sum(p.numel() for p in eligible(Net(options.layers, options.width)).values())
    rows: list[dict[str, Any]] = []
    for engine in ("ddp", "fsdp2"):
        by_rank = on_ranks(options.ranks, case, engine, *sizes)
        worst = {key: max(measured[key] for measured in by_rank) for key in by_rank[0]}
        rows.append({"scoring": f"{engine}, {options.ranks} ranks", "eligible weights": number, **worst})
    show(rows, options.json)


if __name__ == "__main__":
    main()
