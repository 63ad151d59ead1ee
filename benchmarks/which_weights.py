"""Which weights are fundamental? Removal curves by criterion, overlap between tasks and seeds, stability of the set.

    python benchmarks/which_weights.py --folder runs/which_weights --pictures docs/images

MiniLM with a warmed-up head on both text tasks (ICD-10-CM chapters, 3,150 training texts; drug reviews, 480). Only training
and validation data are used. Removal: the selected weights are set to zero and the validation loss is measured, beside
random sets of the same size, the same tensors, the same tensors and magnitudes, and the lowest scores. What is done stays in
the folder. About 25 minutes on one core.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from side_by_side import parser, show

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.config import load_config
from dcft_dist.controls import KINDS, control_set
from dcft_dist.data import order
from dcft_dist.files import write_atomic
from dcft_dist.head import warm_up_or_load
from dcft_dist.importance import Scores
from dcft_dist.job import Job, make_job
from dcft_dist.pictures import SETS, png
from dcft_dist.removal import removed
from dcft_dist.run_dir import RunDirectory
from dcft_dist.world import World, joined_world

CRITERIA = ("taylor_squared", "taylor", "removal", "fisher", "magnitude")
FRACTIONS = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SCORED, BATCH = 448, 32
TASKS = {
    "icd": ["--task.validation_per_class", "25"],
    "reviews": ["--task.name", "drug_review", "--task.train_per_class", "999", "--task.validation_per_class", "999",
                "--task.max_tokens", "128", "--importance.num_samples", "448"],
}  # fmt: skip


@dataclass
class Setting:
    """A task with its model, the head warmed up."""

    job: Job

    @property
    def model(self) -> Any:
        return self.job.model

    def scores(self, criterion: str, num: int = SCORED, seed: int | None = None) -> Scores:
        drawn = order(self.job.config.seed if seed is None else seed, 0, len(self.job.train))[:num]
        items = [b for i in range(0, num, BATCH) for b in self.job.micro_batches(drawn[i : i + BATCH], self.job.train)]
        return score_importance(self.model, items, self.job.loss, head=self.job.pretrained.head, criterion=criterion)  # type: ignore[arg-type]

    def validate(self) -> dict[str, float]:
        found = self.job.evaluate(self.job.validation).metrics
        return {key: found[key] for key in ("loss", "accuracy")}


def make(task: str, seed: int, world: World) -> Setting:
    config = load_config(
        "icd.toml", [*TASKS[task], "--seed", str(seed), "--engine", "single", "--train.micro_batch", str(BATCH)]
    )
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(config, world, RunDirectory(Path(folder)))
        warm_up_or_load(job)
    return Setting(job)


# -- removal -----------------------------------------------------------------------------------------------------------


def removal_curve(setting: Setting) -> list[dict[str, Any]]:
    rows = [{"set": "nothing", "fraction": 0.0, **setting.validate()}]
    for criterion in CRITERIA:
        scores = setting.scores(criterion)
        kinds = KINDS if criterion == CRITERIA[0] else ("top",)
        for fraction, kind in itertools.product(FRACTIONS, kinds):
            top = select_fundamental(scores, fraction)
            with removed(setting.model, control_set(setting.model, scores, top, kind, 0)):
                rows.append({"set": criterion if kind == "top" else kind, "fraction": fraction, **setting.validate()})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def curve_picture(rows: dict[str, list[dict[str, Any]]], classes: dict[str, int]) -> Figure:
    figure = Figure(figsize=(10, 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    colors = dict(zip(CRITERIA[1:], ("#7f1d1d", "#e2725b", "#b08968", "#111111"), strict=True))
    for line, (task, found) in zip(axes, rows.items(), strict=True):
        for place, key, chance in zip(line, ("loss", "accuracy"), (np.log(classes[task]), 1 / classes[task]), strict=True):
            for name in dict.fromkeys(row["set"] for row in found if row["fraction"]):
                points = [(100 * row["fraction"], row[key]) for row in found if row["set"] == name]
                label, color = SETS.get("top" if name == CRITERIA[0] else name, (name, colors.get(name, "#777777")))
                style = "o-" if name == CRITERIA[0] else "--" if name in CRITERIA else "o:"
                place.plot(
                    *zip(*points, strict=True), style, color=color, label=name if name in CRITERIA else label, markersize=4
                )
            place.axhline(found[0][key], color="#999999", linewidth=1)
            place.axhline(chance, color="#999999", linewidth=1, linestyle="--")
            place.set_xscale("log")
            place.set(title=task, xlabel="eligible weights removed, %", ylabel=f"validation {key}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


# -- overlap and stability ---------------------------------------------------------------------------------------------


def overlap(sets: dict[str, dict[str, FundamentalSet]], first: str, second: str) -> dict[str, Any]:
    """Jaccard index of two sets, and of the random sets matched to them, which overlap by tensors and magnitudes alone."""
    a, b = sets[first], sets[second]
    share = a["top"].num_selected / a["top"].num_eligible
    return {
        "sets": f"{first}, {second}",
        "share": f"{100 * share:.3g} %",
        "Jaccard": f"{a['top'].jaccard(b['top']):.3f}",
        "matched random": f"{a['random_magnitude'].jaccard(b['random_magnitude']):.3f}",
        "chance": f"{share / (2 - share):.3f}",
    }


def stability(setting: Setting) -> list[dict[str, Any]]:
    """Of the top 10 % after n score batches with the set after all of them, and with one of as many other texts."""
    last = select_fundamental(setting.scores("taylor_squared"), 0.1)
    rows = []
    for batches in (1, 2, 4, 8, 14):
        mine, other = (select_fundamental(setting.scores("taylor_squared", batches * BATCH, seed), 0.1) for seed in (0, 1))
        rows.append(
            {
                "score batches": batches,
                "with all 14": f"{mine.jaccard(last):.3f}",
                "with other texts": f"{mine.jaccard(other):.3f}",
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("runs/which_weights"))
    options.add_argument("--pictures", type=Path)
    given = options.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    curves: dict[str, list[dict[str, Any]]] = {}
    classes, sets = {}, {share: {} for share in (0.01, 0.1)}
    stable: dict[str, list[dict[str, Any]]] = {}
    with joined_world(3600.0) as world:
        for task, seed in itertools.product(TASKS, (0, 1)):
            setting = make(task, seed, world)
            classes[task] = setting.job.objective.num_outputs
            scores = setting.scores("taylor_squared")
            draw = 2 * list(TASKS).index(task) + seed  # no two matched sets are made of the same random numbers
            for share, kept in sets.items():
                top = select_fundamental(scores, share)
                kept[f"{task} seed {seed}"] = {
                    k: control_set(setting.model, scores, top, k, draw) for k in ("top", "random_magnitude")
                }
            if seed == 0:
                file = given.folder / f"removal_{task}.json"
                if not file.exists():
                    write_atomic(file, json.dumps(removal_curve(setting)))
                curves[task] = json.loads(file.read_text())
                stable[task] = stability(setting)
    for task, rows in curves.items():
        print(f"\n## Removal: {task}\n")
        names = list(dict.fromkeys(row["set"] for row in rows if row["fraction"]))
        cells = {(row["set"], row["fraction"]): f"{row['loss']:.3f}, {row['accuracy']:.3f}" for row in rows}
        chance = f"{np.log(classes[task]):.3f}, {1 / classes[task]:.3f}"
        print(f"Validation loss and accuracy; nothing removed: {cells['nothing', 0.0]}; chance {chance}.\n")
        show([{"set": n, **{f"{100 * f:g} %": cells[n, f] for f in FRACTIONS}} for n in names], given.json, 1)
    print("\n## Overlap\n")
    pairs = list(itertools.combinations(sets[0.1], 2))
    show([overlap(kept, a, b) for kept in sets.values() for a, b in pairs], given.json, 1)
    for task, rows in stable.items():
        print(f"\n## Stability: {task}\n")
        show(rows, given.json, 1)
    if given.pictures:
        write_atomic(given.pictures / "removal_curves.png", png(curve_picture(curves, classes)))


if __name__ == "__main__":
    main()
