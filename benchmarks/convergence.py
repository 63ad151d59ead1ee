"""How fast the arms of a study converge: training loss, validation loss and accuracy by epoch, means over seeds.

    python benchmarks/convergence.py docs/results/studies/icd_630

Over the fresh seeds with the chosen values; of a study of development seeds over those, with the first values. `loss`: mean
[standard error over seeds]; `minus LAST`: paired by seed, against the last arm that is named (`--arms`). The training loss
is the mean over the logged steps of an epoch, while the weights change; older cells have none. Test loss: `dcft table`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.study import Cell, load_study


def by_seed(folder: Path, arm: str) -> dict[int, dict[str, Any]]:
    """Seed -> result."""
    study = load_study(folder / "study.toml")
    results, found = StudyFolder(study, folder), dict[int, dict[str, Any]]()
    for setting in study.settings:
        values = results.choose(setting, arm) if study.seeds else study.grid(arm)[0]
        for seed in (study.seeds or study.tune_seeds) if values is not None else ():
            cell = Cell(setting, arm, values, seed, not study.seeds)
            if results.has(cell) and "epochs" in (result := results.get(cell)):
                found[seed] = result
    return found


def loss_of(result: dict[str, Any], split: str, epoch: int) -> float:
    """nan where it is not known: training before the first epoch, and in older cells."""
    if split == "validation":
        return float(result["epochs"][epoch]["validation/loss"])
    return float(([math.nan] + result.get("train_loss", []) + [math.nan] * (epoch + 1))[epoch])


def with_error(values: list[float], sign: str = "") -> str:
    if any(map(math.isnan, values)):
        return ""
    return f"{np.mean(values):{sign}.4f} [{np.std(values, ddof=1) / len(values) ** 0.5:.4f}]"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--arms", nargs="+", default=["dcft", "random_matched", "equal_displacement", "inverse", "full"])
    given = options.parse_args()
    there = load_study(given.folder / "study.toml").arms
    results = {arm: by_seed(given.folder, arm) for arm in given.arms if arm in there}
    *_, last = results
    print(f"| arm | epoch | seeds | training loss | minus {last} | validation loss | minus {last} | accuracy |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, found in results.items():
        both = sorted(found.keys() & results[last].keys())
        for epoch in range(min(len(r["epochs"]) for r in (*found.values(), *results[last].values()))):
            cells = [arm, str(epoch), str(len(found))]
            for split in ("train", "validation"):
                over = [loss_of(found[s], split, epoch) - loss_of(results[last][s], split, epoch) for s in both]
                cells.append(with_error([loss_of(r, split, epoch) for r in found.values()]))
                cells.append(with_error(over, "+") if arm != last else "")
            right = np.mean([r["epochs"][epoch]["validation/accuracy"] for r in found.values()])
            print(f"| {' | '.join(cells)} | {right:.4f} |")


if __name__ == "__main__":
    main()
