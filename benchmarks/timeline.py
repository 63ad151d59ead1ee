"""Draws one training step under FSDP2: what the host does, what the device does, and which part of it is the penalty.

    python benchmarks/timeline.py --layers 24 --width 1024 --samples 64 --length 196 --picture docs/images/timeline.png

One process, with one GPU if there is one; the model is that of `penalty.py`. `launches`: kernels that the host starts, or
operations on a CPU. `penalty ms`: time in the penalty's own kernels. `times a copy`: that time by the time that a copy of as
many bytes takes. Both are 0 on a CPU, where the penalty has no kernels of its own.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from matplotlib import pyplot
from penalty import ARMS, FACTOR, Net, eligible, mask_of
from side_by_side import parser, seconds, show
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from dcft_dist import FundamentalSet, attach_penalty

SHOWN = ("plain", "gradient, before", "gradient, after", "update")
WARM_UP = 6  # steps; at the later ones the penalty checks nothing
OURS = ("_scale", "_save_many", "_shorten")  # how names of the penalty's kernels begin
READ = {
    "gradient, before": 8,
    "gradient, after": 8,
    "update": 8.8,
}  # bytes a weight: step and weights, a tenth saved and read


def profiled(name: str, options: Any, device: torch.device) -> tuple[list[Any], int]:
    """The profiler's events of one step, and the number of eligible weights."""
    torch.manual_seed(0)
    model = Net(options.layers, options.width).to(device)
    masks = {n: mask_of(p, i) for i, (n, p) in enumerate(eligible(model).items())}
    mesh = dist.init_device_mesh(device.type, (1,))
    for layer in model.body.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if (arm := ARMS[name]) is not None:
        attach_penalty(model, FundamentalSet.from_masks(masks), FACTOR, optimizer=optimizer, **arm)  # type: ignore[arg-type]
    x = torch.randn(options.samples, options.length, options.width, device=device)
    y = torch.randint(0, 10, (options.samples,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return list(profiler.events() or []), sum(mask.numel() for mask in masks.values())


def spans(events: list[Any], on_device: bool) -> list[tuple[str, float, float]]:
    """Name, begin and end in milliseconds of the device's kernels, or of the operations that the host does."""
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    found = [e for e in events if e.device_type == kind and not e.is_user_annotation]  # a name that FSDP2 gives to a stretch
    begin = min(e.time_range.start for e in events)
    return [(e.name, (e.time_range.start - begin) / 1e3, (e.time_range.end - begin) / 1e3) for e in found]


def merged(lane: list[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """(begin, length) of the stretches in which the lane is busy."""
    busy: list[list[float]] = []
    for _, begin, end in sorted(lane, key=lambda span: span[1]):
        if busy and begin <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([begin, end])
    return [(begin, end - begin) for begin, end in busy]


def draw(lanes: dict[str, dict[str, list[tuple[str, float, float]]]], path: str) -> None:
    """One row of the picture for each lane of each arm."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(11, 1 + 1.1 * len(lanes)), layout="constrained")
    labels: list[str] = []
    for arm, by_lane in lanes.items():
        for lane, found in by_lane.items():
            ours = [span for span in found if span[0].startswith(OURS)]
            axes.broken_barh(merged(found), (-len(labels) - 0.4, 0.8), color="#4878a8" if lane == "GPU" else "#b0b0b0")
            axes.broken_barh(merged(ours), (-len(labels) - 0.4, 0.8), color="#d1495b")
            labels.append(f"{arm}: {lane}")
    axes.set_yticks([-n for n in range(len(labels))], labels)
    axes.set_xlabel("milliseconds since the step began (red: the penalty's kernels)")
    figure.savefig(path, dpi=130)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--samples", type=int, default=4)
    arguments.add_argument("--length", type=int, default=64)
    arguments.add_argument("--picture", help="PNG file to draw")
    options = arguments.parse_args()
    logging.disable(logging.WARNING)  # no warning that AdamW cancels the gradient penalty: only the cost counts here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    lanes: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    rows: list[dict[str, Any]] = []
    for name in SHOWN:
        events, numel = profiled(name, options, device)
        lanes[name] = {"host": spans(events, on_device=False)}
        if device.type == "cuda":
            lanes[name]["GPU"] = spans(events, on_device=True)
        shown = lanes[name].get("GPU") or lanes[name]["host"]
        ours = 0.0 if device.type == "cpu" else sum(end - begin for kernel, begin, end in shown if kernel.startswith(OURS))
        source = torch.empty(numel, device=device)
        copy = 1e3 * seconds(source.clone)
        gaps = sum(max(b[0] - sum(a), 0.0) for a, b in pairwise(merged(shown)))
        rows.append(
            {
                "penalty": name,
                "ms a step": max(end for _, _, end in shown) - min(begin for _, begin, _ in shown),
                "of it idle": gaps,
                "launches": len(shown),
                "penalty ms": ours,
                "times a copy": ours / (copy * READ[name] / 8) if name in READ else 0.0,
            }
        )
    if options.picture:
        draw(lanes, options.picture)
    show(rows, options.json, 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
