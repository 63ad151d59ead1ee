"""How much memory foundation models need on up to 1,024 GPUs, forecast by `dcft plan`, which needs no GPU.

    python benchmarks/plan.py    (prints the table of docs/results/plan.md in half an hour; arguments: names of models)

Numbers are GiB on each rank, with FSDP2, bfloat16, AdamW, and one sample (224 x 224 pixels, or 512 tokens) on each rank.
`plain`: the peak of a step without a penalty. `update` and `before`: the peak of a step with the penalty at the update level
and before the reduction; `+%`: over the plain step. `scoring`: the peak of a score batch. `mask`: the bits of the set, in
MiB. `before` is left out for 70 billion weights, because the planning process would need real memory for their bits.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from typing import Any

import torch

MODELS = {"vit_large": 1, "vit_huge": 1, "vit_giant": 1, "decoder_7b": 1, "decoder_70b": 64}  # name -> fewest ranks to show
RANKS = (1, 8, 64, 512, 1024)


def planned(model: str, ranks: int, level: str) -> dict[str, Any]:
    """The numbers that `dcft plan --json` prints; sizes are bytes."""
    command = [sys.executable, "-m", "dcft_dist.cli", "plan", "--model", model, "--ranks", str(ranks), "--level", level]
    process = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)  # type: ignore[no-any-return]


def main() -> None:
    chosen = sys.argv[1:] or list(MODELS)
    print("| model | ranks | plain | update | +% | mask MiB | before | +% | mask MiB | scoring | fits 80 GiB |")
    print(f"|{' --- |' * 11}")
    for model, fewest in ((name, MODELS[name]) for name in chosen):
        for ranks in RANKS:
            if ranks < fewest:
                continue
            update = planned(model, ranks, "update")
            before = planned(model, ranks, "gradient") if fewest == 1 else None
            cells = [model, ranks, f"{update['plain_peak'] / 2**30:.2f}"]
            for forecast in (update, before):
                if forecast is None:
                    cells += ["", "", ""]
                    continue
                added = 100 * (forecast["dcft_peak"] / forecast["plain_peak"] - 1)
                cells += [f"{forecast['dcft_peak'] / 2**30:.2f}", f"{added:+.1f}", f"{forecast['bits'] / 2**20:,.1f}"]
            cells += [f"{update['score_peak'] / 2**30:.2f}", "yes" if update["fits"] else "no"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\n{datetime.date.today()}, torch {torch.__version__}, on a CPU.")


if __name__ == "__main__":
    main()
