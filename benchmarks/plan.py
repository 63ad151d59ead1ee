"""What foundation models need on up to 1,024 GPUs, foretold by `dcft plan` without any.

    python benchmarks/plan.py > docs/results/plan.md    (about half an hour; or the names of some models)

GiB on each rank, FSDP2, bfloat16, AdamW, one sample (224 x 224 pixels, or 512 tokens) a rank. `update` and `before`: the
peak of a step with the penalty there, `+%` over the plain step; `scoring`: the peak of a score batch; `mask`: the set's
bits, in MiB. `before` is left out for 70 billion weights, whose bits the planning process would really hold.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from typing import Any

import torch

MODELS = {"vit_large": 1, "vit_huge": 1, "vit_giant": 1, "decoder_7b": 1, "decoder_70b": 64}  # and the fewest ranks to show
RANKS = (1, 8, 64, 512, 1024)


def planned(model: str, ranks: int, level: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dcft_dist.cli", "plan", "--model", model, "--ranks", str(ranks), "--level", level]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    chosen = sys.argv[1:] or list(MODELS)
    print(f"# Foundation models on up to 1,024 GPUs\n\n{__doc__}")
    print("| model | ranks | plain | update | +% | mask MiB | before | +% | mask MiB | scoring | fits 80 GiB |")
    print(f"|{' --- |' * 11}")
    for model, fewest in ((name, MODELS[name]) for name in chosen):
        for ranks in RANKS:
            if ranks < fewest:
                continue
            update = planned(model, ranks, "update")
            before = planned(model, ranks, "gradient") if fewest == 1 else None
            cells = [model, ranks, f"{update['plain_peak'] / 2**30:.2f}"]
            for found in (update, before):
                if found is None:
                    cells += ["", "", ""]
                    continue
                share = 100 * (found["dcft_peak"] / found["plain_peak"] - 1)
                cells += [f"{found['dcft_peak'] / 2**30:.2f}", f"{share:+.1f}", f"{found['bits'] / 2**20:,.1f}"]
            cells += [f"{update['score_peak'] / 2**30:.2f}", "yes" if update["fits"] else "no"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\n{datetime.date.today()}, torch {torch.__version__}, on a CPU; beside what an H100 needed: [gpu.md](gpu.md).")


if __name__ == "__main__":
    main()
