"""Tables of a study of which only the log exists. The log has accuracies, but not the predictions behind them.

    python benchmarks/logged.py docs/results/mri_seeds.log configs/studies/mri_seeds.toml

Intervals are over seeds only (`dcft_dist.studies.bootstrap` with one group). They are therefore narrower than those of
`dcft table`. `--without 13` leaves a seed out. `--beside docs/results/studies/mri_rates` compares the arms of a kept study
with those of the log, on the seeds that both have.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from dcft_dist.studies.bootstrap import Estimate, contrast_verdict, estimate
from dcft_dist.studies.study import load_study
from dcft_dist.studies.table import results

LINE = re.compile(
    r"(?P<phase>tuning|testing) \d+/\d+: (?P<setting>\w+)\.(?P<arm>\w+)\.(?:(?P<values>\S+)\.)?seed-(?P<seed>\d+): "
    r"validation (?P<validation>[\d.]+) at epoch (?P<epoch>\d+)(?:, test (?P<test>[\d.]+))? \("
)


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value for each seed, with its interval."""
    return estimate(np.array(values)[:, None], ["all"])


def interval(e: Estimate, sign: str = "") -> str:
    """Mean [interval] in percent. `sign`: `"+"` to print the sign of positive numbers."""
    return f"{100 * e.mean:{sign}.2f} [{100 * e.low:{sign}.2f}, {100 * e.high:{sign}.2f}]"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("log", type=Path)
    arguments.add_argument("study", type=Path)
    arguments.add_argument("--without", type=int, nargs="+", default=[], metavar="SEED")
    arguments.add_argument("--beside", type=Path, metavar="STUDY")
    options = arguments.parse_args()
    study, matches = load_study(options.study), map(LINE.search, options.log.read_text().splitlines())
    rows = [match for match in matches if match and int(match["seed"]) not in options.without]

    print("Best validation accuracy, mean over development seeds; `<=`: of some seed that of the probe, before any epoch\n")
    print("| arm | values | seeds | validation accuracy |\n|---|---|---|---|")
    tuned = [row for row in rows if row["phase"] == "tuning"]
    for arm, values in sorted({(row["arm"], row["values"]) for row in tuned}):
        cells = [row for row in tuned if (row["arm"], row["values"]) == (arm, values)]
        mark = "<= " if any(cell["epoch"] == "0" for cell in cells) else ""
        mean = np.mean([float(cell["validation"]) for cell in cells])
        print(f"| {arm} | {values} | {len(cells)} | {mark}{100 * mean:.1f} |")

    print("\n| arm | chosen | seeds | test accuracy | on the seeds of all arms | validation accuracy |")
    print("|---|---|---|---|---|---|")
    final = [row for row in rows if row["phase"] == "testing"]
    tested = {arm: {int(row["seed"]): row for row in final if row["arm"] == arm} for arm in study.arms}
    shared_seeds = set.intersection(*(set(by_seed) for by_seed in tested.values()))
    for arm, by_seed in tested.items():
        chosen = " / ".join(sorted({cell["values"] or "" for cell in by_seed.values()}))
        test = interval(over_seeds([float(cell["test"]) for cell in by_seed.values()]))
        validation = np.mean([float(cell["validation"]) for cell in by_seed.values()])
        on_shared = 100 * np.mean([float(by_seed[seed]["test"]) for seed in shared_seeds])
        print(f"| {arm} | {chosen} | {len(by_seed)} | {test} | {on_shared:.1f} | {100 * validation:.1f} |")

    print("\n| contrast | points | seeds | above 0 |\n|---|---|---|---|")
    for contrast in study.contrasts:
        arm_cells, minus_cells = tested[contrast.arm], tested[contrast.minus]
        both = sorted(arm_cells.keys() & minus_cells.keys())
        difference = over_seeds([float(arm_cells[s]["test"]) - float(minus_cells[s]["test"]) for s in both])
        points, verdict = interval(difference, "+"), contrast_verdict(difference)
        print(f"| {contrast.arm} minus {contrast.minus} | {points} | {difference.num_seeds} | {verdict} |")
    if options.beside:
        logged = {arm: {s: float(cell["test"]) for s, cell in by_seed.items()} for arm, by_seed in tested.items()}
        beside(options.beside, logged)


def beside(folder: Path, logged: dict[str, dict[int, float]]) -> None:
    """Prints the differences between each arm of a kept study and each arm of the log.

    Args:
        folder: of the kept study.
        logged: arm -> seed -> test accuracy in the log.
    """
    print(f"\n| {folder.name} minus the log | points | seeds |\n|---|---|---|")
    for arm in results(folder)[1][0].arms:
        accuracies = {seed: float(correct.mean()) for seed, correct in arm.correct.items()}
        for logged_arm, logged_accuracies in logged.items():
            if both := sorted(accuracies.keys() & logged_accuracies.keys()):
                difference = over_seeds([accuracies[s] - logged_accuracies[s] for s in both])
                print(f"| {arm.arm} minus {logged_arm} | {interval(difference, '+')} | {difference.num_seeds} |")


if __name__ == "__main__":
    main()
