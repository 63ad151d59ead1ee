"""What the kept studies took: cells, and hours of the processes that ran them, each head and its scores counted once.

    python benchmarks/hours.py [docs/results/studies/X ...]

A process had one core, or a share of one GPU; what else ran beside it is in its hours.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dcft_dist.files import read_lines

STUDIES = Path(__file__).parent.parent / "docs/results/studies"


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]] or sorted(path for path in STUDIES.iterdir())
    print("| study | cells | of these on a GPU | process hours | on a GPU |\n|---|---|---|---|---|")
    totals = [0, 0, 0.0, 0.0]
    for folder in folders:
        rows = [row for row in read_lines(folder / "cells.jsonl") if "summary" in row]
        numbers = [len(rows), 0, 0.0, 0.0]
        prepared = set()
        for row in rows:
            once = tuple(row.get("prepared_seconds", {}).items())
            hours = sum(row["summary"]["seconds"].values()) / 3600
            hours += sum(seconds for _, seconds in once) / 3600 if once not in prepared else 0.0
            prepared.add(once)
            on_gpu = row["summary"]["device"] != "cpu"
            numbers = [a + b for a, b in zip(numbers, (0, on_gpu, hours, hours * on_gpu), strict=True)]
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        print(f"| {folder.name} | {numbers[0]} | {numbers[1]} | {numbers[2]:.1f} | {numbers[3]:.1f} |")
    print(f"| all | {totals[0]} | {totals[1]} | {totals[2]:.1f} | {totals[3]:.1f} |")


if __name__ == "__main__":
    main()
