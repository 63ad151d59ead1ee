"""How much DCFT adds to the steps of a foundation model on one GPU, and whether `dcft plan` predicts its memory.

    python benchmarks/steps.py vit_large --micro-batch 64
    python benchmarks/steps.py decoder_1b --micro-batch 4 --length 1024

The models are those of `dcft plan` with random weights, under FSDP2 over NCCL in bfloat16 (weights and AdamW's state in
float32). One model takes its steps by turns without a penalty and with the penalty in each place. `score batch` is compared
with a plain forward and backward. `foretold GiB`: the forecast of `dcft plan` for the same sizes, in a separate process.
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

BATCHES = 4  # in one scoring
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "update": {"level": "update"},
    "gradient, before": {"level": "gradient", "where": "before"},
    "gradient, after": {"level": "gradient", "where": "after"},
}


def foretell(request: Request) -> dict[str, subprocess.Popen[str]]:
    """Starts `dcft plan` for the penalty at the update level and before the reduction, in the background."""
    command = [sys.executable, "-m", "dcft_dist.cli", "plan", "--json", "--ranks", "1", "--model", request.model]
    command += ["--micro-batch", str(request.micro_batch), "--length", str(request.length)]
    levels = {"update": ["--level", "update"], "gradient, before": ["--level", "gradient"]}
    commands = {name: [*command, *words] for name, words in levels.items()}
    return {name: subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for name, words in commands.items()}


def build(what: Planned) -> Prepared:
    """Gives the planned model random weights on the GPU, and prepares it under FSDP2."""
    gpu = torch.device("cuda")
    Materialiser(gpu)(what.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in what.model.parameters():
            p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(0.5)
    options = WrapOptions("fsdp2", gpu, what.blocks, bf16=True)
    return prepare(what.model, options, lambda weights: torch.optim.AdamW([p for _, p, _ in weights], lr=1e-6))


def scoring(
    model: Any, optimizer: torch.optim.Optimizer, plain_pass: Any, score: Any, rounds: int
) -> tuple[list[dict[str, Any]], FundamentalSet]:
    """Measures a plain pass, a score batch and the selection.

    Args:
        model: under the engine.
        optimizer: of the model.
        plain_pass: a forward and backward pass.
        score: scores all weights from `BATCHES` batches.
        rounds: numbers are medians of this many measurements.

    Returns:
        Three rows of the table, and the selected set.
    """
    model.eval()
    score()
    plain = statistics.median(once(plain_pass) for _ in range(rounds))
    model.zero_grad()
    scores, seconds = score(), statistics.median(once(score) for _ in range(rounds)) / BATCHES
    before = torch.cuda.memory_allocated()
    _, rise = gpu_peak_bytes(score)
    select = partial(select_fundamental, scores)
    chosen = select()
    model.train()
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.is_cuda)
    # In a run, neither the scores of the call before nor the optimizer's states exist when scoring starts.
    peak = before + rise - 4 * chosen.num_eligible - states
    scored = {"ms": 1e3 * seconds, "added %": 100 * (seconds / plain - 1), "peak GiB": peak / 2**30}
    rows = [{"step": "forward and backward", "ms": 1e3 * plain}, {"step": "score batch", **scored}]
    return [*rows, {"step": "selection", "ms": 1e3 * once(select)}], chosen


def measure_steps(
    prepared: Prepared, chosen: FundamentalSet, step: Callable[[], None], rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Takes training steps with every arm by turns.

    Args:
        prepared: the model under the engine, with its optimizer.
        chosen: the penalised set.
        step: one training step.
        rounds: how many turns each arm has.
        steps: timed in a turn, after one step to warm up.

    Returns:
        By arm: seconds of a step [rounds], peak bytes on the GPU, bytes of the masks.
    """
    model: Any = prepared.model
    optimizer = prepared.optimizer
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    peaks: dict[str, int] = {}
    masks: dict[str, int] = {}
    for _ in range(rounds):
        for name, arm in ARMS.items():
            handle = nullcontext() if arm is None else attach_penalty(model, chosen, 0.1, optimizer=optimizer, **arm)
            with handle as penalty:
                masks[name] = penalty.mask_bytes if penalty else 0
                step()
                torch.cuda.reset_peak_memory_stats()
                times[name].append(once(repeated(step, steps)) / steps)
                peaks[name] = torch.cuda.max_memory_allocated()
    return times, peaks, masks


def forecasts(processes: dict[str, subprocess.Popen[str]]) -> tuple[dict[str, int], int]:
    """Waits for the processes of `foretell`. Returns peak bytes of a step by arm, and peak bytes of a score batch."""
    numbers = {name: json.loads(process.communicate()[0]) for name, process in processes.items()}
    steps = {"plain": numbers["update"]["plain_peak"], **{name: n["dcft_peak"] for name, n in numbers.items()}}
    return steps, numbers["update"]["score_peak"]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("model", choices=MODELS)
    arguments.add_argument("--micro-batch", type=int, default=1)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=4, help="steps of each arm in a round")
    options = arguments.parse_args()
    request = Request(options.model, ranks=1, micro_batch=options.micro_batch, length=options.length)
    foretold = foretell(request)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    planned_model = planned(request)
    prepared = build(planned_model)
    model: Any = prepared.model
    batch = {name: value.cuda() for name, value in planned_model.make_batch().items()}
    if "pixel_values" in batch:
        batch["pixel_values"].normal_()
    samples = options.micro_batch * (options.length if "input_ids" in batch else 1)

    def plain_pass() -> None:
        prepared.zero_grad()
        prepared.backward(planned_model.loss(model, batch))

    def step() -> None:
        plain_pass()
        prepared.step()

    def score() -> Any:
        return score_importance(model, [batch] * BATCHES, planned_model.loss, head=planned_model.head)

    for _ in range(3):
        step()
    prepared.zero_grad()
    scoring_rows, chosen = scoring(model, prepared.optimizer, plain_pass, score, options.rounds)
    prepared.zero_grad()

    times, peaks, masks = measure_steps(prepared, chosen, step, options.rounds, options.steps)
    step_peaks, score_peak = forecasts(foretold)
    weights = sum(prod(p.shape) for p in model.parameters())
    rows = step_rows(times, peaks, masks, step_peaks, weights, chosen.num_eligible, samples)
    scoring_rows[1]["foretold GiB"] = score_peak / 2**30
    rows += scoring_rows
    tokens = f" of {options.length} tokens" if "input_ids" in batch else ""
    print(f"{options.model}, micro-batch {options.micro_batch}{tokens}")
    show(rows, options.json, options.rounds)
    dist.destroy_process_group()


def step_rows(
    times: dict[str, list[float]],
    peaks: dict[str, int],
    masks: dict[str, int],
    foretold: dict[str, int],
    weights: int,
    num_eligible: int,
    samples: int,
) -> list[dict[str, Any]]:
    """The rows of the arms.

    Args:
        times: seconds of a step by arm.
        peaks: peak bytes on the GPU by arm.
        masks: bytes of the masks by arm.
        foretold: peak bytes that `dcft plan` forecasts, for some of the arms.
        weights: of the model.
        num_eligible: of these, how many are eligible.
        samples: samples or tokens in a step.
    """
    rows: list[dict[str, Any]] = []
    for name, seconds in times.items():
        extra = statistics.median(a - b for a, b in zip(seconds, times["plain"], strict=True))
        s = statistics.median(seconds)
        rows.append(
            {
                "step": name,
                "weights": weights,
                "ms": 1e3 * s,
                "added %": 100 * extra / statistics.median(times["plain"]),
                "samples or tokens a s": round(samples / s),
                "peak GiB": peaks[name] / 2**30,
                "foretold GiB": foretold[name] / 2**30 if name in foretold else "",
                "mask bytes a weight": masks[name] / num_eligible,
            }
        )
    return rows


def repeated(call: Callable[[], Any], number: int) -> Callable[[], None]:
    """A function that makes the call this many times."""

    def run() -> None:
        for _ in range(number):
            call()

    return run


if __name__ == "__main__":
    main()
