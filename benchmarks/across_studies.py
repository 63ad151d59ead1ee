"""DCFT with the criterion `fisher` against arms of other studies on the same seeds and test texts: all seeds that there are.

    python benchmarks/across_studies.py

Looked at after the studies were tested. Intervals as in the studies' tables (`dcft_dist.bootstrap`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcft_dist.bootstrap import estimate, verdict

STUDIES = Path(__file__).parents[1] / "docs/results/studies"
FISHER = [("confirm_630", "fisher"), ("baselines_630", "dcft")]
OTHERS = {
    "full": [("confirm_630", "full"), ("baselines_630", "full")],
    "dcft by taylor_squared": [("confirm_630", "dcft"), ("icd_630", "dcft")],
    "steps of the same length (as dcft by taylor_squared)": [("icd_630", "equal_displacement")],
    "probe": [("icd_630", "probe")],
}


def main() -> None:
    examples = {
        s: json.loads((STUDIES / s / "examples" / f"{s}.json").read_text())
        for s in ("icd_630", "baselines_630", "confirm_630")
    }
    first = examples["icd_630"]
    if any(found != first for found in examples.values()):
        raise SystemExit("the studies have different test examples")
    labels = np.array(first["label"])

    def right(places: list[tuple[str, str]]) -> dict[int, NDArray[np.float64]]:
        found = {}
        for study, arm in places:
            for line in (STUDIES / study / "cells.jsonl").read_text().splitlines():
                cell: dict[str, Any] = json.loads(line)
                if cell["arm"] == arm and not cell["tuning"]:
                    found[cell["seed"]] = (np.array(cell["predicted"]) == labels).astype(np.float64)
        return found

    fisher = right(FISHER)
    print("| contrast | points | seeds | above 0 |\n|---|---|---|---|")
    for name, places in OTHERS.items():
        other = right(places)
        seeds = sorted(fisher.keys() & other.keys())
        e = estimate(np.stack([fisher[s] - other[s] for s in seeds]), first["group"])
        mean, low, high = (100 * value for value in (e.mean, e.low, e.high))
        print(f"| fisher minus {name} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] | {e.num_seeds} | {verdict(e)} |")


if __name__ == "__main__":
    main()
