"""Every value of a study of development seeds: best validation accuracy after epoch 0 and lowest validation loss.

    python benchmarks/sweep.py docs/results/studies/sweep_630

In percent and nats, means over seeds; for the arms of sweep_630, in brackets what lies between the value and `factor` 1
(no penalty) of the same optimizer, paired by seed [standard error].
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dcft_dist.study import Cell, Values, load_study
from dcft_dist.study_folder import StudyFolder
from dcft_dist.study_table import shown

PLAIN = {"factor": "factor", "fraction": "factor", "random_fraction": "factor"}
PLAIN |= {"sgd_factor": "sgd_factor", "sgd_fraction": "sgd_factor", "sgd_random_fraction": "sgd_factor"}
Seeds = dict[int, tuple[float, float]]  # seed -> accuracy, loss


def found(folder: StudyFolder, setting: str, arm: str, values: Values) -> Seeds:
    cells = [Cell(setting, arm, values, seed, True) for seed in folder.study.tune_seeds]
    results = {cell.seed: folder.get(cell)["epochs"][1:] for cell in cells if folder.has(cell)}
    return {
        seed: (max(e["validation/accuracy"] for e in epochs), min(e["validation/loss"] for e in epochs))
        for seed, epochs in results.items()
        if epochs
    }


def with_difference(values: Seeds, plain: Seeds | None, which: int, scale: float, digits: int) -> str:
    mean = scale * np.mean([v[which] for v in values.values()])
    if plain is None:
        return f"{mean:.{digits}f}"
    over = np.array([scale * (values[s][which] - plain[s][which]) for s in sorted(values.keys() & plain.keys())])
    error = over.std(ddof=1) / len(over) ** 0.5 if len(over) > 1 else float("nan")
    return f"{mean:.{digits}f} ({over.mean():+.{digits}f} [{error:.{digits}f}])"


def main() -> None:
    path = Path(sys.argv[1])
    study = load_study(path / "study.toml")
    folder = StudyFolder(study, path)
    (setting,) = study.settings
    plain = {arm: found(folder, setting, PLAIN[arm], study.grid(PLAIN[arm])[-1]) for arm in study.arms if arm in PLAIN}
    print("| arm | value | seeds | validation accuracy | validation loss |\n|---|---|---|---|---|")
    for arm, values in [(name, values) for name in study.arms for values in study.grid(name)]:
        if seeds := found(folder, setting, arm, values):
            name = ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in values)
            right, loss = (with_difference(seeds, plain.get(arm), *how) for how in ((0, 100, 1), (1, 1, 3)))
            print(f"| {arm} | {name} | {len(seeds)} | {right} | {loss} |")


if __name__ == "__main__":
    main()
