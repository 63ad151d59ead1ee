"""Ten thousand steps with accumulation, checkpoints, evaluations and random kills: the same bits, flat memory, flat handles.

    python benchmarks/soak.py [--steps 10000] [--kills 25]

Two ranks under FSDP2 train a small BERT on ICD codes, once undisturbed and once with kills at random moments. It prints the
table of docs/results/faults.md: steps, kills, whether all results are equal, and slopes of memory and of open files over the
second half of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from dcft_dist.files import read_json, read_json_or
from tests.own import tiny_encoder

PER_EPOCH = 52
CONFIG = """
extends = "smoke.toml"
name = "soak"
log_every = 20
timeout_s = 60
test_resamples = 0
max_attempts = 1000
[task]
max_tokens = 16
train_per_class = 20
validation_per_class = 2
test_per_class = 2
[model]
build = "transformers.AutoModel"
args = {{add_pooling_layer = false}}
weights = "{weights}"
features = "mean"
[checkpoint]
every = 40
keep_last = 2
[importance]
num_samples = 32
score_batch = 16
[train]
epochs = {epochs}
global_batch = 8
micro_batch = 2
[removal]
fractions = []
"""


def start(config: Path, runs: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", "dcft_dist.cli", "train", str(config), "--runs_dir", str(runs)]
    with (runs / "log").open("ab") as log:
        return [
            subprocess.Popen(
                command, env={**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log
            )
            for r in range(2)
        ]


def used(process: int) -> tuple[float, int]:
    """(resident MiB, open files) of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024, len(os.listdir(f"/proc/{process}/fd"))


def undisturbed(config: Path, runs: Path) -> tuple[float, list[tuple[int, float, int]]]:
    """Seconds, and (step, MiB, open files) every two seconds of rank 0."""
    began, samples, processes = time.monotonic(), list[tuple[int, float, int]](), start(config, runs)
    while any(p.poll() is None for p in processes):
        time.sleep(2)
        progress = read_json_or(runs / "soak/progress.json", {})
        try:
            if progress.get("phase") == "train":
                samples.append((progress["step"], *used(processes[0].pid)))
        except (OSError, ValueError, IndexError):
            pass
    assert [p.wait() for p in processes] == [0, 0], (runs / "log").read_text()[-2000:]
    return time.monotonic() - began, samples


def disturbed(config: Path, runs: Path, kills: int, seconds: float) -> int:
    """Kills one rank at random moments, over about the time that the run takes. Returns the number of kills."""
    draw, done = random.Random(0), 0
    while True:
        processes = start(config, runs)
        wait = 15 + draw.expovariate(kills / seconds) if done < kills else 1e9
        end = time.monotonic() + wait
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            time.sleep(0.1)
        if all(p.poll() == 0 for p in processes):
            return done
        if all(p.poll() is None for p in processes):
            done += 1
            processes[draw.randrange(2)].send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        for process in processes:
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()


def slope(samples: list[tuple[int, float, int]], column: int) -> float:
    """Change per 1,000 steps over the second half."""
    half = [s for s in samples if s[0] > samples[-1][0] / 2]
    return float(1000 * np.polyfit([s[0] for s in half], [s[column] for s in half], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=25)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoder = tiny_encoder(root / "encoder")
        config = root / "soak.toml"
        config.write_text(CONFIG.format(weights=encoder, epochs=-(-options.steps // PER_EPOCH)))
        for name in ("calm", "killed"):
            (root / name).mkdir()
        seconds, samples = undisturbed(config, root / "calm")
        kills = disturbed(config, root / "killed", options.kills, seconds)
        calm, killed = (read_json(root / name / "soak/summary.json") for name in ("calm", "killed"))
        same: dict[str, Any] = {k: calm[k] == killed[k] for k in ("weights_checksum", "validation", "test", "best_epoch")}
        logs = [
            [
                (r["step"], r["train/loss"])
                for r in map(json.loads, (root / name / "soak/metrics.jsonl").open())
                if "train/loss" in r
            ]
            for name in ("calm", "killed")
        ]
        same["every logged loss"] = logs[0] == logs[1]
    print(f"{datetime.now(UTC):%Y-%m-%d}, 2 ranks (gloo), {os.cpu_count()} cores\n")
    different = [key for key, value in same.items() if not value]
    row = {
        "steps": f"{-(-options.steps // PER_EPOCH) * PER_EPOCH:,}",
        "kills": kills,
        "equal to the bit": "all but " + ", ".join(different) if different else ", ".join(same),
        "memory per 1,000 steps": f"{slope(samples, 1):+.2f} MiB",
        "open files per 1,000 steps": f"{slope(samples, 2):+.3f}",
        "minutes undisturbed": f"{seconds / 60:.0f}",
    }
    print("| " + " | ".join(row) + " |", "|" + "---|" * len(row), "| " + " | ".join(map(str, row.values())) + " |", sep="\n")


if __name__ == "__main__":
    main()
