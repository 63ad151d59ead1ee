"""How fast the arms of a study converge: training loss, validation loss and accuracy by epoch, averaged over seeds.

    python benchmarks/convergence.py docs/results/studies/icd_630

The runs are those of the test seeds, with the chosen values. In a study without test seeds they are those of the tuning
seeds, with the first values of the grid. `loss`: mean [standard error over seeds]. `minus LAST`: difference to the last arm
of `--arms`, paired by seed. The training loss is the mean over the logged steps of an epoch, while the weights change; older
cells have none. `dcft table` has the test loss.
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
    """The result of an arm's cell for each seed, with the key `epochs`."""
    study = load_study(folder / "study.toml")
    store, results = StudyFolder(study, folder), dict[int, dict[str, Any]]()
    for setting in study.settings:
        values = store.choose(setting, arm) if study.seeds else study.grid(arm)[0]
        for seed in (study.seeds or study.tune_seeds) if values is not None else ():
            cell = Cell(setting, arm, values, seed, not study.seeds)
            if store.has(cell) and "epochs" in (result := store.get(cell)):
                results[seed] = result
    return results


def loss_of(result: dict[str, Any], split: str, epoch: int) -> float:
    """The loss of a split after an epoch. NaN where it is not known: training at epoch 0, and in older cells.

    Args:
        result: of a cell.
        split: `"validation"` or `"train"`.
        epoch: from 0, which is before the first training step.
    """
    if split == "validation":
        return float(result["epochs"][epoch]["validation/loss"])
    return float(([math.nan] + result.get("train_loss", []) + [math.nan] * (epoch + 1))[epoch])


def with_error(values: list[float], sign: str = "") -> str:
    """Mean [standard error] as text; empty if a value is not known. `sign`: `"+"` to print the sign of positive means."""
    if any(map(math.isnan, values)):
        return ""
    return f"{np.mean(values):{sign}.4f} [{np.std(values, ddof=1) / len(values) ** 0.5:.4f}]"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--arms", nargs="+", default=["dcft", "random_matched", "equal_displacement", "inverse", "full"])
    options = arguments.parse_args()
    study_arms = load_study(options.folder / "study.toml").arms
    results = {arm: by_seed(options.folder, arm) for arm in options.arms if arm in study_arms}
    *_, last = results
    print(f"| arm | epoch | seeds | training loss | minus {last} | validation loss | minus {last} | accuracy |")
    print("|---|---|---|---|---|---|---|---|")
    baseline = results[last]
    for arm, runs in results.items():
        shared_seeds = sorted(runs.keys() & baseline.keys())
        for epoch in range(min(len(run["epochs"]) for run in (*runs.values(), *baseline.values()))):
            columns = [arm, str(epoch), str(len(runs))]
            for split in ("train", "validation"):
                over = [loss_of(runs[s], split, epoch) - loss_of(baseline[s], split, epoch) for s in shared_seeds]
                columns.append(with_error([loss_of(run, split, epoch) for run in runs.values()]))
                columns.append(with_error(over, "+") if arm != last else "")
            accuracy = np.mean([run["epochs"][epoch]["validation/accuracy"] for run in runs.values()])
            print(f"| {' | '.join(columns)} | {accuracy:.4f} |")


if __name__ == "__main__":
    main()
