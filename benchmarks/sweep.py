"""Every value of a study of development seeds: best validation accuracy after epoch 0 and lowest validation loss.

    python benchmarks/sweep.py docs/results/studies/sweep_630

In percent and nats, means over seeds; for the arms of sweep_630, in brackets what lies between the value and `factor` 1
(no penalty) of the same optimizer, and in columns of their own between a fraction and a matched random set of its size,
paired by seed [standard error]. Jaccard: of a random set with the selected one of its size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.study import Cell, Values, load_study
from dcft_dist.studies.table import shown

PLAIN = {"factor": "factor", "fraction": "factor", "random_fraction": "factor"}
PLAIN |= {"sgd_factor": "sgd_factor", "sgd_fraction": "sgd_factor", "sgd_random_fraction": "sgd_factor"}
RANDOM = {"fraction": "random_fraction", "sgd_fraction": "sgd_random_fraction"}
Seeds = dict[int, tuple[float, float]]  # seed -> accuracy, loss


def results(folder: StudyFolder, setting: str, arm: str, values: Values) -> dict[int, dict[str, Any]]:
    cells = [Cell(setting, arm, values, seed, True) for seed in folder.study.tune_seeds]
    return {cell.seed: folder.get(cell) for cell in cells if folder.has(cell)}


def found(folder: StudyFolder, setting: str, arm: str, values: Values) -> Seeds:
    return {
        seed: (max(e["validation/accuracy"] for e in epochs), min(e["validation/loss"] for e in epochs))
        for seed, result in results(folder, setting, arm, values).items()
        if (epochs := result["epochs"][1:])
    }


def jaccard(folder: StudyFolder, setting: str, arm: str, values: Values) -> str:
    indices = [r["summary"]["jaccard_with_top"] for r in results(folder, setting, arm, values).values() if "summary" in r]
    return "" if None in indices or not indices else f"{np.mean(indices):.2f}"


def difference(values: Seeds, others: Seeds, which: int, scale: float, digits: int) -> str:
    """Paired by seed; empty where no seed has both."""
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
            like = found(folder, setting, RANDOM[arm], values) if RANDOM.get(arm) in study.arms else {}
            cells = [arm, name, str(len(seeds))]
            for which, scale, digits in ((0, 100, 1), (1, 1, 3)):
                mean = scale * np.mean([v[which] for v in seeds.values()])
                over = difference(seeds, plain.get(arm, {}), which, scale, digits)
                cells.append(f"{mean:.{digits}f}{f' ({over})' if over else ''}")
                cells.append(difference(seeds, like, which, scale, digits))
            print(f"| {' | '.join([*cells, jaccard(folder, setting, arm, values)])} |")


if __name__ == "__main__":
    main()
