"""Checks dcft_dist on many GPUs, and measures what it costs there. Writes a JSON file and a page that you can send.

    sbatch --nodes 2 --gpus-per-node 8 slurm/check_gpus.sbatch
    torchrun --nproc-per-node 2 benchmarks/check_gpus.py --small          # the same on two gloo ranks

It needs the package with its test extra (`pip install '.[test]'`), and takes less than 15 minutes. The parts:

- parity: an odd net under every engine, against one process that multiplies gradients or steps itself;
- steps: a transformer encoder under FSDP2 in bfloat16, without a penalty and with one, in turn;
- scoring: score batches against plain forwards and backwards;
- selection: the highest tenth of scores over all ranks, against `torch.topk` of one rank's share.

A part that fails is noted, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

os.environ["DCFT_TEST_DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
os.environ["DS_ACCELERATOR"] = os.environ["DCFT_TEST_DEVICE"]
sys.path.insert(0, str(Path(__file__).parents[1]))

import penalty
import selection
from side_by_side import machine, once, seconds

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental
from dcft_dist.distributed.world import joined_world
from tests import test_parity
from tests.test_parity import Case

CUDA = torch.cuda.is_available()
CASES = [
    Case("gradient", "before", None, 2, "sgd"),
    Case("gradient", "after", None, 1, "sgd"),
    Case("update", "before", None, 1, "adamw"),
]
ENGINES = ("ddp", "fsdp2", "fsdp2-hybrid", "fsdp1-full-orig", "zero1", "zero2", "zero3")
ARMS = ("plain", "gradient, before", "gradient, after", "update")


def parity() -> list[dict[str, Any]]:
    """Largest difference of a weight to the reference, for each engine and place of the penalty."""
    test_parity.GLOBAL_BATCH = max(test_parity.GLOBAL_BATCH, dist.get_world_size())
    return [row for engine in ENGINES for row in _parity_of(engine)]


def _parity_of(engine: str) -> list[dict[str, Any]]:
    rows = []
    for case in test_parity.cases_for(engine, CASES):
        row: dict[str, Any] = {"engine": engine, "level": case.level, "where": case.where, "optimizer": case.optimizer}
        try:
            state, *_ = test_parity.train(engine, case, to_none=True)
            expected = test_parity.reference(case, test_parity.gives_zeros(engine))
            difference = max(float((state[n].view_as(e) - e).abs().max()) for n, e in expected.items())
            row |= {"difference": difference, "equal": difference <= test_parity.limit(engine, case)}
        except Exception as error:  # noted, and on with the next
            row |= {"difference": "", "equal": False, "error": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    return rows


def net(small: bool) -> tuple[Any, Any]:
    """A transformer encoder under FSDP2, and a batch."""
    layers, width, samples, length = (2, 64, 4, 16) if small else (24, 1024, 32, 196)
    device = torch.device("cuda" if CUDA else "cpu")
    torch.manual_seed(0)
    model = penalty.Net(layers, width).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if CUDA else MixedPrecisionPolicy()
    for layer in model.body.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model, torch.randn(samples, length, width, device=device)


def masks_of(model: Any) -> dict[str, Any]:
    """A random mask for each eligible weight, the same on every rank."""
    names = {n: p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("head")}
    return {n: penalty.mask_of(torch.empty(p.shape, device="cpu"), i) for i, (n, p) in enumerate(names.items())}


def steps(small: bool) -> list[dict[str, Any]]:
    """Milliseconds of a step of each arm, and what it adds in percent: medians over rounds in which the arms take turns."""
    arms = {name: _stepping(name, small) for name in ARMS}
    for step in arms.values():
        for _ in range(9):  # until the optimizer is no longer tried
            step()
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(5 if small else 20):
        for name, step in arms.items():
            times[name].append(1e3 * once(step))
    plain = times["plain"]
    return [
        {
            "penalty": name,
            "ms a step": statistics.median(found),
            "added %": statistics.median(100 * (a / b - 1) for a, b in zip(found, plain, strict=True)),
        }
        for name, found in times.items()
    ]


def _stepping(arm: str, small: bool) -> Callable[[], None]:
    model, x = net(small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if options := penalty.ARMS[arm]:
        attach_penalty(model, FundamentalSet.from_masks(masks_of(model), head="head"), optimizer=optimizer, **options)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    return step


def scoring(small: bool) -> list[dict[str, Any]]:
    """Seconds of four score batches, and of as many plain forwards and backwards."""
    model, x = net(small)

    def loss(model: Any, _: Any) -> Any:
        return model(x).float().square().mean()

    def plain() -> None:
        for _ in range(4):
            loss(model, None).backward()
            model.zero_grad()

    model.eval()
    one, other = seconds(partial(score_importance, model, [None] * 4, loss, head="head")), seconds(plain)
    return [{"s, scored": one, "s, plain": other, "times plain": one / other}]


def selecting(small: bool) -> list[dict[str, Any]]:
    """Seconds of a selection over all ranks, and of `torch.topk` over one rank's share."""
    device, ranks = "cuda" if CUDA else "cpu", dist.get_world_size()
    number = (1_000_000 if small else 250_000_000 * ranks) // 64 * 64
    scores = selection.scores_of("normal", number, device)
    values = torch.cat([shard.values for shard in scores.shards.values()])
    ours = seconds(partial(select_fundamental, scores, 0.1))
    top = seconds(lambda: values.topk(len(values) // 10, sorted=False))
    return [{"scores": number, "s": ours, "torch.topk of a share, s": top, "times topk": ours / top}]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--small", action="store_true", help="small sizes, for a try without GPUs")
    arguments.add_argument("--out", type=Path, default=Path("check_gpus"), help="without a suffix")
    options = arguments.parse_args()
    parts = {
        "parity": parity,
        "steps": partial(steps, options.small),
        "scoring": partial(scoring, options.small),
        "selection": partial(selecting, options.small),
    }
    with joined_world(120) as world:
        nodes = world.world_size // int(os.environ["LOCAL_WORLD_SIZE"])
        found: dict[str, Any] = {"machine": machine(), "ranks": world.world_size, "nodes": nodes, "small": options.small}
        for name, part in parts.items():
            try:
                found[name] = part()
            except Exception:  # noted, and on with the next
                found[name] = [{"error": traceback.format_exc()[-500:]}]
            if world.is_first:  # after each part, in case that a later one does not return
                options.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
                options.out.with_suffix(".md").write_text(page(found))
        dist.barrier()
    failed = [row for name in parts for row in found[name] if "error" in row or row.get("equal") is False]
    if world.is_first:
        print(page(found))
    sys.exit(1 if failed else 0)


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# dcft_dist on {found['ranks']} ranks, {found['nodes']} nodes", "", f"{found['machine']}."]
    for name, rows in found.items():
        if isinstance(rows, list):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines += [f"| {' | '.join(_cell(row.get(key, '')) for key in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()
