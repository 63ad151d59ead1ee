"""How long a training step of the quickstart waits for its data, and how long `dcft --help` takes.

    python benchmarks/input.py

The training process cuts its batches from token lists in memory. There are no data workers, so a step waits for this only.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from side_by_side import REPEATS, parser, show
from torch.nn import functional

from dcft_dist.config.toml import load_config
from dcft_dist.data.batches import micro_batches, order
from dcft_dist.data.tasks import load_task
from dcft_dist.models.build import build_model


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--config", default="icd.toml")
    options = arguments.parse_args()
    config, device = load_config(options.config), torch.device("cpu")
    task = load_task(config)
    pretrained = build_model(config, len(task.class_names))
    model, tokens = pretrained.module, pretrained.processor(task.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    waits, steps = [], []
    for step in range(1 + REPEATS):
        begin = time.perf_counter()
        indices = order(config.seed, 1, len(tokens))[step * config.train.global_batch :][: config.train.global_batch]
        batches = micro_batches(indices, 0, 1, config.train.micro_batch, tokens, device)
        ready = time.perf_counter()
        optimizer.zero_grad()
        for batch in batches:
            functional.cross_entropy(pretrained.outputs(model, batch), batch["labels"]).backward()
        optimizer.step()
        waits.append(ready - begin)
        steps.append(time.perf_counter() - ready)
    wait, work = statistics.median(waits[1:]), statistics.median(steps[1:])
    help_times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dcft_dist.cli", "--help"], capture_output=True, check=True)
        help_times.append(time.perf_counter() - begin)
    show(
        [
            {"input": f"{options.config}: batches of a step", "s": wait, "of a step": f"{100 * wait / work:.2f} %"},
            {"input": "forward, backward, optimizer", "s": work},
            {"input": "dcft --help", "s": statistics.median(help_times)},
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
