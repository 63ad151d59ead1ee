"""How many cells the kept studies ran, and how many process hours they took.

    python benchmarks/hours.py [docs/results/studies/X ...]

Each head with its scores counts once, and so does a training that several cells share. A process had one core, or a share
of one GPU. Its hours are wall time, so other processes on the same machine made them longer.
"""

from __future__ import annotations

import json
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
        counted = set[object]()
        for row in rows:
            preparation = tuple(row.get("prepared_seconds", {}).items())
            shared = json.dumps(row["config"], sort_keys=True)
            phases = {phase: value for phase, value in row["summary"]["seconds"].items() if (shared, phase) not in counted}
            hours = sum(phases.values()) / 3600
            counted |= {(shared, phase) for phase in phases}
            hours += sum(seconds for _, seconds in preparation) / 3600 if preparation not in counted else 0.0
            counted.add(preparation)
            on_gpu = row["summary"]["device"] != "cpu"
            numbers = [a + b for a, b in zip(numbers, (0, on_gpu, hours, hours * on_gpu), strict=True)]
        totals = [a + b for a, b in zip(totals, numbers, strict=True)]
        print(f"| {folder.name} | {numbers[0]} | {numbers[1]} | {numbers[2]:.1f} | {numbers[3]:.1f} |")
    print(f"| all | {totals[0]} | {totals[1]} | {totals[2]:.1f} | {totals[3]:.1f} |")


if __name__ == "__main__":
    main()
