"""The two other uses of the scores: primary contrasts with Holm's correction, and all others of their studies.

    python benchmarks/two_uses.py [--folder runs] [--places]

The rule is in docs/results/protocol.md, 2026-11-29. Points and intervals are computed as in the tables of the studies
(`dcft_dist.studies.bootstrap`). Studies that are not there are left out, and so are contrasts with fewer than two seeds.
`--places` prints, for each study that interpolates, validation accuracy and loss of every place, averaged over its tested
seeds, and how often each place was chosen.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from dcft_dist.files import objects_in
from dcft_dist.studies.bootstrap import contrast_verdict, estimate
from dcft_dist.studies.table import Difference, SettingResult, results

KEPT_STUDIES = Path(__file__).parents[1] / "docs/results/studies"
PRIMARY = ("interpolate_630", "pull_630")
OTHERS = ("interpolate_pcs", "pull_pcs", "interpolate_mri", "interpolate_shoulder")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=KEPT_STUDIES, help="the folder with the folders of the studies")
    arguments.add_argument("--places", action="store_true")
    options = arguments.parse_args()
    folder = options.folder
    found = {name: results(folder / name)[1] for name in (*PRIMARY, *OTHERS) if (folder / name / "study.toml").is_file()}
    print("| study, test data | contrast | points [95 %] | 97.5 % | SE over seeds | test loss [SE] | seeds | by 95 % |")
    print("|---|---|---|---|---|---|---|---|")
    lows: dict[str, tuple[float, float]] = {}
    for name, settings in found.items():
        for setting in settings:
            for difference in setting.differences:
                if difference.value is not None:
                    wide = row(setting, difference)
                    if difference.contrast.deciding and name in PRIMARY:
                        lows[name] = difference.value.low, wide
    if set(lows) == set(PRIMARY):
        print(f"\nHolm over the two primary contrasts: {holm(lows)}")

    for name in found if options.places else ():
        print_places(folder / name)


def print_places(folder: Path) -> None:
    """Prints the places of each arm of a study that interpolates."""
    cells = [row for row in objects_in(folder / "cells.jsonl", "cell", "arm") if "places" in row and not row["tuning"]]
    for arm in dict.fromkeys(row["arm"] for row in cells):
        rows = [row for row in cells if row["arm"] == arm]
        shares = [row["summary"]["interpolation"] for row in rows]
        chosen = Counter((found["on_set"], found["on_rest"]) for found in shares)
        print(f"\n{folder.name}, {arm}\n")
        print("| set | rest | validation accuracy | validation loss | chosen |\n|---|---|---|---|---|")
        means = np.mean([row["places"] for row in rows], 0)
        for (on_set, on_rest, *_), (_, _, accuracy, loss) in zip(rows[0]["places"], means, strict=True):
            print(f"| {on_set:.3g} | {on_rest:.3g} | {100 * accuracy:.1f} | {loss:.3f} | {chosen[on_set, on_rest]} |")


def row(setting: SettingResult, difference: Difference) -> float:
    """Prints a row of the table. Returns the lower end of the 97.5 % interval."""
    value, contrast = difference.value, difference.contrast
    assert value is not None
    arms = {arm.arm: arm.correct for arm in setting.arms}
    seeds = sorted(arms[contrast.arm].keys() & arms[contrast.minus].keys())
    values = np.stack([arms[contrast.arm][seed] - arms[contrast.minus][seed] for seed in seeds])
    wide = estimate(values, setting.groups, level=0.975)
    points = 100 * values.mean(1)  # of each seed
    error, loss_error = (x.std(ddof=1) / len(seeds) ** 0.5 for x in (points, difference.loss))
    cells = [
        setting.setting,
        f"{contrast.arm} minus {contrast.minus}{' (primary)' if contrast.deciding else ''}",
        f"{100 * value.mean:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]",
        f"[{100 * wide.low:+.2f}, {100 * wide.high:+.2f}]",
        f"{error:.2f}",
        f"{difference.loss.mean():+.4f} [{loss_error:.4f}]",
        str(len(seeds)),
        contrast_verdict(value),
    ]
    print(f"| {' | '.join(cells)} |")
    return wide.low


def holm(lows: dict[str, tuple[float, float]]) -> str:
    """Which primary contrasts are supported: one whose 97.5 % interval is above 0, and then the other at 95 %."""
    first = [name for name, (_, wide) in lows.items() if wide > 0]
    if not first:
        return "none is supported"
    supported = [name for name, (low, wide) in lows.items() if wide > 0 or low > 0]
    return f"supported: {', '.join(supported)}"


if __name__ == "__main__":
    main()
