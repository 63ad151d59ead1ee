"""What scoring costs over plain forwards and backwards of the same batches, on the same engine and ranks.

    python benchmarks/scoring.py --ranks 2

`times plain`: seconds of a score batch over seconds of a plain forward, backward and clearing of gradients. `extra bytes`:
what scoring keeps at its peak beyond what the plain passes do, over (eligible weights / ranks); the scores themselves are 4.
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
    options = parser(__doc__ or "")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--batches", type=int, default=4)
    options.add_argument("--samples", type=int, default=8, help="of each rank")
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--width", type=int, default=512)
    given = options.parse_args()
    sizes = (given.batches, given.samples, given.length, given.layers, given.width)
    number = sum(p.numel() for p in eligible(Net(given.layers, given.width)).values())
    rows: list[dict[str, Any]] = []
    for engine in ("ddp", "fsdp2"):
        found = on_ranks(given.ranks, case, engine, *sizes)
        worst = {key: max(f[key] for f in found) for key in found[0]}
        rows.append({"scoring": f"{engine}, {given.ranks} ranks", "eligible weights": number, **worst})
    show(rows, given.json)


if __name__ == "__main__":
    main()
