"""What DCFT adds to the steps of a foundation model on one GPU, and whether `dcft plan` foretold its memory.

    python benchmarks/steps.py vit_large --micro-batch 64
    python benchmarks/steps.py decoder_1b --micro-batch 4 --length 1024

The models of `dcft plan` with random weights, FSDP2 over NCCL, bfloat16 (weights and AdamW's state in float32). One model
takes its steps by turns without a penalty and with one in each place; `score batch` is beside a plain forward and backward.
`foretold GiB`: by `dcft plan` for the same sizes, in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from side_by_side import gpu_peak_bytes, once, parser, show

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental
from dcft_dist.engines.meta import Materialiser
from dcft_dist.engines.prepared import Prepared, WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.planning.planned_models import MODELS, Planned, Request, planned

BATCHES = 4  # of a scoring
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "update": {"level": "update"},
    "gradient, before": {"level": "gradient", "where": "before"},
    "gradient, after": {"level": "gradient", "where": "after"},
}


def foretell(request: Request) -> dict[str, subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dcft_dist.cli", "plan", "--json", "--ranks", "1", "--model", request.model]
    command += ["--micro-batch", str(request.micro_batch), "--length", str(request.length)]
    levels = {"update": ["--level", "update"], "gradient, before": ["--level", "gradient"]}
    start = {name: [*command, *words] for name, words in levels.items()}
    return {name: subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for name, words in start.items()}


def build(what: Planned) -> Prepared:
    gpu = torch.device("cuda")
    Materialiser(gpu)(what.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in what.model.parameters():
            p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(0.5)
    how = WrapOptions("fsdp2", gpu, what.blocks, bf16=True)
    return prepare(what.model, how, lambda weights: torch.optim.AdamW([p for _, p, _ in weights], lr=1e-6))


def scoring(
    model: Any, optimizer: torch.optim.Optimizer, plain_pass: Any, score: Any, rounds: int
) -> tuple[list[dict[str, Any]], FundamentalSet]:
    """What a score batch takes beside a plain one, and what the selection takes; the set."""
    model.eval()
    score()
    plain = statistics.median(once(plain_pass) for _ in range(rounds))
    model.zero_grad()
    scores, seconds = score(), statistics.median(once(score) for _ in range(rounds)) / BATCHES
    before = torch.cuda.memory_allocated()
    _, more = gpu_peak_bytes(score)
    select = partial(select_fundamental, scores)
    chosen = select()
    model.train()
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.is_cuda)
    peak = before + more - 4 * chosen.num_eligible - states  # scores of the time before, and what is not there yet in a run
    scored = {"ms": 1e3 * seconds, "added %": 100 * (seconds / plain - 1), "peak GiB": peak / 2**30}
    rows = [{"step": "forward and backward", "ms": 1e3 * plain}, {"step": "score batch", **scored}]
    return [*rows, {"step": "selection", "ms": 1e3 * once(select)}], chosen


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("model", choices=MODELS)
    options.add_argument("--micro-batch", type=int, default=1)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=4, help="of each arm in a round")
    given = options.parse_args()
    request = Request(given.model, ranks=1, micro_batch=given.micro_batch, length=given.length)
    foretold = foretell(request)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    what = planned(request)
    prepared = build(what)
    model: Any = prepared.model
    batch = {name: value.cuda() for name, value in what.make_batch().items()}
    if "pixel_values" in batch:
        batch["pixel_values"].normal_()
    samples = given.micro_batch * (given.length if "input_ids" in batch else 1)

    def plain_pass() -> None:
        prepared.zero_grad()
        prepared.backward(what.loss(model, batch))

    def step() -> None:
        plain_pass()
        prepared.step()

    def score() -> Any:
        return score_importance(model, [batch] * BATCHES, what.loss, head=what.head)

    for _ in range(3):
        step()
    prepared.zero_grad()
    about_scoring, chosen = scoring(model, prepared.optimizer, plain_pass, score, given.rounds)
    prepared.zero_grad()

    times: dict[str, list[float]] = {name: [] for name in ARMS}
    peaks: dict[str, int] = {}
    masks: dict[str, int] = {}
    for _ in range(given.rounds):
        for name in ARMS:
            how = ARMS[name]
            where = nullcontext() if how is None else attach_penalty(model, chosen, 0.1, optimizer=prepared.optimizer, **how)
            with where as penalty:
                masks[name] = penalty.mask_bytes if penalty else 0
                step()
                torch.cuda.reset_peak_memory_stats()
                times[name].append(once(repeated(step, given.steps)) / given.steps)
                peaks[name] = torch.cuda.max_memory_allocated()
    numbers = {name: json.loads(p.communicate()[0]) for name, p in foretold.items()}
    expected = {"plain": numbers["update"]["plain_peak"], **{n: f["dcft_peak"] for n, f in numbers.items()}}
    weights = sum(prod(p.shape) for p in model.parameters())
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        extra = statistics.median(a - b for a, b in zip(taken, times["plain"], strict=True))
        s = statistics.median(taken)
        rows.append(
            {
                "step": name,
                "weights": weights,
                "ms": 1e3 * s,
                "added %": 100 * extra / statistics.median(times["plain"]),
                "samples or tokens a s": round(samples / s),
                "peak GiB": peaks[name] / 2**30,
                "foretold GiB": expected[name] / 2**30 if name in expected else "",
                "mask bytes a weight": masks[name] / chosen.num_eligible,
            }
        )
    about_scoring[1]["foretold GiB"] = numbers["update"]["score_peak"] / 2**30
    rows += about_scoring
    print(f"{given.model}, micro-batch {given.micro_batch}" + (f" of {given.length} tokens" if "input_ids" in batch else ""))
    show(rows, given.json, given.rounds)
    dist.destroy_process_group()


def repeated(call: Callable[[], Any], number: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(number):
            call()

    return run


if __name__ == "__main__":
    main()
