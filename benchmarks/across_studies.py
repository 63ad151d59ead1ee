"""Contrasts between arms of several studies with 630 training texts, over all seeds of these studies.

    python benchmarks/across_studies.py

All studies have the same test texts. These contrasts were computed after the studies had been tested. Points and intervals
are computed as in the studies' tables (`dcft_dist.studies.bootstrap`). The loss is on the test texts [standard error over
seeds], paired by seed. `--without confirm_630` leaves a study out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from side_by_side import machine

from dcft_dist.studies.bootstrap import contrast_verdict, estimate
from dcft_dist.studies.results import StudyFolder
from dcft_dist.studies.study import load_study

KEPT_STUDIES = Path(__file__).parents[1] / "docs/results/studies"
STUDIES = ("icd_630", "baselines_630", "confirm_630", "seeds_630", "sets_630")
ARMS = {  # name -> the studies that have this arm, with the arm's name in each
    "fisher": {"confirm_630": "fisher", "baselines_630": "dcft", "seeds_630": "dcft"},
    "matched random set": {
        "confirm_630": "random_matched",
        "baselines_630": "random_matched",
        "seeds_630": "random_matched",
    },
    "full": {"confirm_630": "full", "baselines_630": "full", "seeds_630": "full"},
    "L2-SP": {"confirm_630": "l2_sp", "baselines_630": "l2_sp", "seeds_630": "l2_sp"},
    "taylor_squared": {"confirm_630": "dcft", "icd_630": "dcft"},
    "probe": {"icd_630": "probe"},
    "uniform random set": {"sets_630": "random"},
    "random set per tensor": {"sets_630": "random_tensor"},
    "fisher tensor by tensor": {"sets_630": "per_tensor"},
    "random set matched to that": {"sets_630": "per_tensor_random"},
    "gradual": {"sets_630": "gradual"},  # scored by taylor_squared during gradual pruning
    "random set matched to gradual": {"sets_630": "gradual_random"},
}
PAIRS = [("fisher", other) for other in ARMS if other != "fisher" and "matched to" not in other]
PAIRS += [("matched random set", other) for other in ("full", "uniform random set", "random set per tensor")]
PAIRS += [("uniform random set", "full"), ("fisher tensor by tensor", "random set matched to that")]
PAIRS += [("gradual", "random set matched to gradual"), ("gradual", "taylor_squared"), ("gradual", "full")]
PAIRS += [("L2-SP", "matched random set"), ("L2-SP", "full"), ("L2-SP", "probe")]
Seeds = dict[int, tuple[NDArray[np.float64], float]]  # seed -> [test texts] 1 if right, else 0; mean test loss


def found(arm: str, studies: list[str], labels: NDArray[np.int64]) -> Seeds:
    """The test results of an arm from all studies that have it, at the values that each study chose.

    Args:
        arm: a key of `ARMS`.
        studies: names of the studies to read.
        labels: [test texts].
    """
    results: Seeds = {}
    for name in ARMS[arm].keys() & set(studies):
        arm_in_study, study = ARMS[arm][name], load_study(KEPT_STUDIES / name / "study.toml")
        folder = StudyFolder(study, KEPT_STUDIES / name)
        for seed in study.seeds:
            if cell := folder.final(name, arm_in_study, folder.choose(name, arm_in_study), seed):
                right = (np.array(cell["predicted"]) == labels).astype(np.float64)
                results[seed] = right, cell["summary"]["test"]["loss"]
    return results


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--without", nargs="+", default=[], choices=STUDIES)
    left_out = arguments.parse_args().without
    studies = [name for name in STUDIES if name not in left_out]
    examples = [json.loads((KEPT_STUDIES / s / "examples" / f"{s}.json").read_text()) for s in studies]
    if any(study_examples != examples[0] for study_examples in examples):
        raise SystemExit("the studies have different test examples")
    labels, groups = np.array(examples[0]["label"]), examples[0]["group"]
    arms = {arm: found(arm, studies, labels) for arm in ARMS}
    print("| contrast | points | seeds | above 0 | test loss [standard error] |\n|---|---|---|---|---|")
    for first, second in PAIRS:
        results, baseline = arms[first], arms[second]
        seeds = sorted(results.keys() & baseline.keys())
        if len(seeds) < 2:
            continue
        difference = estimate(np.stack([results[s][0] - baseline[s][0] for s in seeds]), groups)
        mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
        loss = np.array([results[s][1] - baseline[s][1] for s in seeds])
        error = loss.std(ddof=1) / len(loss) ** 0.5
        verdict = contrast_verdict(difference)
        points = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        test_loss = f"{loss.mean():+.3f} [{error:.3f}]"
        print(f"| {first} minus {second} | {points} | {difference.num_seeds} | {verdict} | {test_loss} |")
    print(f"\nComputed {machine()}")


if __name__ == "__main__":
    main()
