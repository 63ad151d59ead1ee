"""Tables of a study of which only the log is left: accuracies without the predictions behind them.

    python benchmarks/logged.py docs/results/mri_seeds.log configs/studies/mri_seeds.toml

Intervals are over seeds alone (`dcft_dist.bootstrap` with one group), so narrower than those of a study's own tables.
`--without 13` leaves a seed out; `--beside docs/results/studies/mri_rates` compares the arms of a kept study with those of
the log, on the seeds of both.
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
    return estimate(np.array(values)[:, None], ["all"])


def interval(e: Estimate, sign: str = "") -> str:
    return f"{100 * e.mean:{sign}.2f} [{100 * e.low:{sign}.2f}, {100 * e.high:{sign}.2f}]"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("log", type=Path)
    options.add_argument("study", type=Path)
    options.add_argument("--without", type=int, nargs="+", default=[], metavar="SEED")
    options.add_argument("--beside", type=Path, metavar="STUDY")
    given = options.parse_args()
    study, found = load_study(given.study), map(LINE.search, given.log.read_text().splitlines())
    rows = [m for m in found if m and int(m["seed"]) not in given.without]

    print("Best validation accuracy, mean over development seeds; `<=`: of some seed that of the probe, before any epoch\n")
    print("| arm | values | seeds | validation accuracy |\n|---|---|---|---|")
    tuned = [m for m in rows if m["phase"] == "tuning"]
    for arm, values in sorted({(m["arm"], m["values"]) for m in tuned}):
        cells = [m for m in tuned if (m["arm"], m["values"]) == (arm, values)]
        mark = "<= " if any(m["epoch"] == "0" for m in cells) else ""
        mean = np.mean([float(m["validation"]) for m in cells])
        print(f"| {arm} | {values} | {len(cells)} | {mark}{100 * mean:.1f} |")

    print("\n| arm | chosen | seeds | test accuracy | on the seeds of all arms | validation accuracy |")
    print("|---|---|---|---|---|---|")
    tested = {arm: {int(m["seed"]): m for m in rows if m["phase"] == "testing" and m["arm"] == arm} for arm in study.arms}
    shared = set.intersection(*(set(cells) for cells in tested.values()))
    for arm, cells in tested.items():
        chosen = " / ".join(sorted({m["values"] or "" for m in cells.values()}))
        test = interval(over_seeds([float(m["test"]) for m in cells.values()]))
        validation = np.mean([float(m["validation"]) for m in cells.values()])
        level = 100 * np.mean([float(cells[seed]["test"]) for seed in shared])
        print(f"| {arm} | {chosen} | {len(cells)} | {test} | {level:.1f} | {100 * validation:.1f} |")

    print("\n| contrast | points | seeds | above 0 |\n|---|---|---|---|")
    for contrast in study.contrasts:
        one, other = tested[contrast.arm], tested[contrast.minus]
        both = sorted(one.keys() & other.keys())
        e = over_seeds([float(one[s]["test"]) - float(other[s]["test"]) for s in both])
        print(f"| {contrast.arm} minus {contrast.minus} | {interval(e, '+')} | {e.num_seeds} | {contrast_verdict(e)} |")
    if given.beside:
        beside(given.beside, {arm: {s: float(m["test"]) for s, m in cells.items()} for arm, cells in tested.items()})


def beside(folder: Path, logged: dict[str, dict[int, float]]) -> None:
    print(f"\n| {folder.name} minus the log | points | seeds |\n|---|---|---|")
    for arm in results(folder)[1][0].arms:
        here = {seed: float(right.mean()) for seed, right in arm.correct.items()}
        for other, there in logged.items():
            if both := sorted(here.keys() & there.keys()):
                e = over_seeds([here[s] - there[s] for s in both])
                print(f"| {arm.arm} minus {other} | {interval(e, '+')} | {e.num_seeds} |")


if __name__ == "__main__":
    main()
