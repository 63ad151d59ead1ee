"""How fast the arms of a tested study converge: validation loss and accuracy by epoch, means over the fresh seeds.

    python benchmarks/convergence.py docs/results/studies/icd_630

`loss`: mean [standard error over seeds]; `loss minus LAST`: paired by seed, against the last arm that is named (`--arms`).
The loss on test data is in `dcft table`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from dcft_dist.study import load_study
from dcft_dist.study_folder import StudyFolder


def tested(folder: Path, arm: str) -> dict[int, dict[str, Any]]:
    """Seed -> result."""
    study = load_study(folder / "study.toml")
    results, found = StudyFolder(study, folder), dict[int, dict[str, Any]]()
    for setting in study.settings:
        for seed in study.seeds:
            result = results.final(setting, arm, results.choose(setting, arm), seed)
            if result and "epochs" in result:
                found[seed] = result
    return found


def with_error(values: list[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.4f} [{np.std(values, ddof=1) / len(values) ** 0.5:.4f}]"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--arms", nargs="+", default=["dcft", "random_matched", "equal_displacement", "inverse", "full"])
    given = options.parse_args()
    results = {arm: tested(given.folder, arm) for arm in given.arms}
    last = given.arms[-1]
    print(f"| arm | epoch | seeds | validation loss | minus {last} | accuracy |\n|---|---|---|---|---|---|")
    for arm, found in results.items():
        both = sorted(found.keys() & results[last].keys())
        for epoch in range(min(len(r["epochs"]) for r in (*found.values(), *results[last].values()))):
            loss, right = ([r["epochs"][epoch][f"validation/{m}"] for r in found.values()] for m in ("loss", "accuracy"))
            over = [r[s]["epochs"][epoch]["validation/loss"] for r in (found, results[last]) for s in both]
            differences = [a - b for a, b in zip(over[: len(both)], over[len(both) :], strict=True)]
            difference = with_error(differences, "+") if arm != last else ""
            print(f"| {arm} | {epoch} | {len(loss)} | {with_error(loss)} | {difference} | {np.mean(right):.4f} |")


if __name__ == "__main__":
    main()
