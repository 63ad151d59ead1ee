"""Every value of a study without test seeds: best validation accuracy after epoch 0 and lowest validation loss.

    python benchmarks/sweep.py docs/results/studies/sweep_630

Accuracies are in percent and losses in nats, averaged over the tuning seeds. The arms of sweep_630 also have differences,
paired by seed [standard error]. In parentheses: to `factor` 1 (no penalty) of the same optimizer. Columns `minus random`:
from a fraction to a matched random set of the same size. Jaccard: of a random set with the selected set of its size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.study import Cell, Values, load_study
from dcft_dist.studies.table import shown

# PLAIN: arm -> the arm of the same optimizer that has no penalty as its last value. RANDOM: arm -> its matched random sets.
PLAIN = {"factor": "factor", "fraction": "factor", "random_fraction": "factor"}
PLAIN |= {"sgd_factor": "sgd_factor", "sgd_fraction": "sgd_factor", "sgd_random_fraction": "sgd_factor"}
RANDOM = {"fraction": "random_fraction", "sgd_fraction": "sgd_random_fraction"}
Seeds = dict[int, tuple[float, float]]  # seed -> accuracy, loss


def results(folder: StudyFolder, setting: str, arm: str, values: Values) -> dict[int, dict[str, Any]]:
    """The results of the finished tuning cells by seed."""
    cells = [Cell(setting, arm, values, seed, True) for seed in folder.study.tune_seeds]
    return {cell.seed: folder.get(cell) for cell in cells if folder.has(cell)}


def found(folder: StudyFolder, setting: str, arm: str, values: Values) -> Seeds:
    """Best accuracy and lowest loss after epoch 0, by seed."""
    return {
        seed: (max(e["validation/accuracy"] for e in epochs), min(e["validation/loss"] for e in epochs))
        for seed, result in results(folder, setting, arm, values).items()
        if (epochs := result.get("epochs", [])[1:])  # a cell that has diverged has none
    }


def jaccard(folder: StudyFolder, setting: str, arm: str, values: Values) -> str:
    """Mean Jaccard index with the selected set; empty for an arm that is no control."""
    cells = results(folder, setting, arm, values).values()
    indices = [cell["summary"]["jaccard_with_top"] for cell in cells if "summary" in cell]
    return "" if None in indices or not indices else f"{np.mean(indices):.2f}"


def difference(values: Seeds, others: Seeds, which: int, scale: float, digits: int) -> str:
    """The mean difference, paired by seed [standard error]; empty where no seed has both.

    Args:
        values: of the arm.
        others: of the arm to compare with.
        which: 0 for accuracy, 1 for loss.
        scale: the printed number is the difference times this.
        digits: after the point.
    """
    over = np.array([scale * (values[s][which] - others[s][which]) for s in sorted(values.keys() & others.keys())])
    if not len(over):
        return ""
    error = over.std(ddof=1) / len(over) ** 0.5 if len(over) > 1 else float("nan")
    return f"{over.mean():+.{digits}f} [{error:.{digits}f}]"


def main() -> None:
    path = Path(sys.argv[1])
    study = load_study(path / "study.toml")
    folder = StudyFolder(study, path)
    (setting,) = study.settings
    plain = {arm: found(folder, setting, PLAIN[arm], study.grid(PLAIN[arm])[-1]) for arm in study.arms if arm in PLAIN}
    print("| arm | value | seeds | validation accuracy | minus random | validation loss | minus random | Jaccard |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, values in [(name, values) for name in study.arms for values in study.grid(name)]:
        if seeds := found(folder, setting, arm, values):
            name = ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in values)
            matched_random = found(folder, setting, RANDOM[arm], values) if RANDOM.get(arm) in study.arms else {}
            cells = [arm, name, str(len(seeds))]
            for which, scale, digits in ((0, 100, 1), (1, 1, 3)):
                mean = scale * np.mean([v[which] for v in seeds.values()])
                over = difference(seeds, plain.get(arm, {}), which, scale, digits)
                cells.append(f"{mean:.{digits}f}{f' ({over})' if over else ''}")
                cells.append(difference(seeds, matched_random, which, scale, digits))
            print(f"| {' | '.join([*cells, jaccard(folder, setting, arm, values)])} |")


if __name__ == "__main__":
    main()
