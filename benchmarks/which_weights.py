"""Which weights are fundamental? Removal curves by criterion, overlap between tasks and seeds, stability of the set.

    python benchmarks/which_weights.py --folder runs/which_weights --pictures docs/images

The model is MiniLM with a warmed-up head on both text tasks: ICD-10-CM chapters (3,150 training texts) and drug reviews
(480). Only training and validation data are used. For the removal curves, the selected weights are set to zero and the
validation loss is measured. Controls are random sets of the same size and, for each criterion, random sets of the same
tensors, random sets of the same tensors and magnitudes, and the lowest scores. Finished removal curves stay in the folder
and are not computed again. The script takes about 50 minutes on one core; the criterion `obs` needs 10 GiB.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from side_by_side import parser, show

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.config.toml import load_config
from dcft_dist.controls.control_sets import KINDS, control_set
from dcft_dist.controls.removal import removed
from dcft_dist.data.batches import order
from dcft_dist.distributed.world import World, joined_world
from dcft_dist.files import write_atomic
from dcft_dist.method.scores import Scores
from dcft_dist.reports.render import png
from dcft_dist.runs.writer import RunWriter
from dcft_dist.train.context import RunContext, make_context
from dcft_dist.train.warm_up import warm_up_or_load

COLORS = {
    "fisher": "#c0392b", "taylor_squared": "#e08e0b", "taylor": "#7d6608", "removal": "#6c3483", "obs": "#2471a3",
    "magnitude": "#111111", "random": "#7f8c8d",
}  # fmt: skip
CRITERIA = tuple(COLORS)[:6]
NAMES = {
    "top": "{}",
    "random": "random",
    "random_tensor": "tensors of {}",
    "random_magnitude": "like {}",
    "lowest": "lowest {}",
}
FRACTIONS = (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SHARES = (0.01, 0.1)
BATCHES = {"icd": (1, 4, 16, 49), "reviews": (1, 2, 4, 7)}  # numbers of score batches, up to half of the training texts
SCORED, BATCH = 448, 32
TASKS = {
    "icd": ["--task.validation_per_class", "25"],
    "reviews": ["--task.name", "drug_review", "--task.train_per_class", "999", "--task.validation_per_class", "999",
                "--task.max_tokens", "128", "--importance.num_samples", "448"],
}  # fmt: skip


@dataclass
class Setting:
    """A task with its model, after the warm-up of the head."""

    job: RunContext

    @property
    def model(self) -> Any:
        return self.job.model

    def scores(self, criterion: str, num: int = SCORED, last: bool = False) -> Scores:
        """Scores from training texts. `obs` needs more gradients, so its batches have four texts only.

        Args:
            criterion: one of `CRITERIA`.
            num: number of texts.
            last: take the last texts of the random order instead of the first.
        """
        indices = order(self.job.config.seed, 0, len(self.job.train))
        indices, size = indices[-num:] if last else indices[:num], 4 if criterion == "obs" else BATCH
        items = [b for i in range(0, num, size) for b in self.job.micro_batches(indices[i : i + size], self.job.train)]
        return score_importance(self.model, items, self.job.loss, head=self.job.pretrained.head, criterion=criterion)  # type: ignore[arg-type]

    def validate(self) -> dict[str, float]:
        """Loss and accuracy on the validation data."""
        metrics = self.job.evaluate(self.job.validation).metrics
        return {key: metrics[key] for key in ("loss", "accuracy")}


def make(task: str, seed: int, world: World) -> Setting:
    """Builds the model for a task (a key of `TASKS`) and warms up its head."""
    config = load_config(
        "icd.toml", [*TASKS[task], "--seed", str(seed), "--engine", "single", "--train.micro_batch", str(BATCH)]
    )
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(config, world, RunWriter(Path(folder)))
        warm_up_or_load(context)
    return Setting(context)


# -- removal -----------------------------------------------------------------------------------------------------------


def removal_curve(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """Removes every kind of set of every criterion at every fraction, and returns one row for each.

    Each criterion and kind has its own file in the folder, so an interrupted script continues with the others.
    """
    rows: list[dict[str, Any]] = [{"set": "nothing", "fraction": 0.0, **setting.validate()}]
    for criterion in CRITERIA:
        files = {kind: folder / f"{NAMES[kind].format(criterion)}.json" for kind in KINDS}
        scores = None if all(file.exists() for file in files.values()) else setting.scores(criterion)
        for kind, file in files.items():
            if scores and not file.exists():
                write_atomic(file, json.dumps([removal(setting, scores, criterion, kind, f) for f in FRACTIONS]))
            if kind != "random" or criterion == CRITERIA[0]:
                rows += json.loads(file.read_text())
    return rows


def removal(setting: Setting, scores: Scores, criterion: str, kind: str, fraction: float) -> dict[str, Any]:
    """Validates without a set: the selected one, or the control of this kind (one of `NAMES`)."""
    top = select_fundamental(scores, fraction)
    with removed(setting.model, control_set(setting.model, scores, top, kind, 0)):
        row = {"set": NAMES[kind].format(criterion), "fraction": fraction, **setting.validate()}
    print(json.dumps(row), flush=True)
    return row


def removal_table(rows: list[dict[str, Any]], chance_loss: float) -> list[dict[str, Any]]:
    """Loss and accuracy by share removed, one row for each set.

    The last column is the first share at which the loss reaches that of chance, and whether it stays there.
    """
    table = []
    for name in dict.fromkeys(row["set"] for row in rows if row["fraction"]):
        by_fraction = {row["fraction"]: row for row in rows if row["set"] == name}
        at_chance = [f for f, row in by_fraction.items() if row["loss"] >= chance_loss]
        recovers = at_chance and any(row["loss"] < chance_loss for f, row in by_fraction.items() if f > at_chance[0])
        cells = {f"{100 * f:g} %": f"{row['loss']:.3f}, {row['accuracy']:.3f}" for f, row in by_fraction.items()}
        first = f"{100 * at_chance[0]:g} %{', not for good' if recovers else ''}" if at_chance else "never"
        table.append({"set": name, **cells, "chance": first})
    return table


def curve_picture(rows: dict[str, list[dict[str, Any]]], classes: dict[str, int]) -> Figure:
    """Draws validation loss and accuracy over the share removed, a row of panels for each task.

    Args:
        rows: of `removal_curve`, by task.
        classes: their number, by task.
    """
    figure = Figure(figsize=(10, 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for panels, (task, task_rows) in zip(axes, rows.items(), strict=True):
        chances = (np.log(classes[task]), 1 / classes[task])
        for panel, key, chance in zip(panels, ("loss", "accuracy"), chances, strict=True):
            for name in (c for c in dict.fromkeys(row["set"] for row in task_rows) if c.removeprefix("like ") in COLORS):
                points = [(100 * row["fraction"], row[key]) for row in task_rows if row["set"] == name]
                style = "o-" if name in CRITERIA else ":"
                color = COLORS[name.removeprefix("like ")]
                panel.plot(*zip(*points, strict=True), style, color=color, label=name, markersize=3, linewidth=1.2)
            panel.axhline(task_rows[0][key], color="#999999", linewidth=1)
            panel.axhline(chance, color="#999999", linewidth=1, linestyle="--")
            panel.set_xscale("log")
            panel.set(title=task, xlabel="eligible weights removed, %", ylabel=f"validation {key}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


# -- overlap and stability ---------------------------------------------------------------------------------------------


# "top", and its control "random_magnitude", which overlaps with other sets only because of tensors and magnitudes.
Pair = dict[str, FundamentalSet]


def jaccards(a: Pair, b: Pair, names: list[str]) -> dict[str, str]:
    """Jaccard indices of two pairs within the named weights.

    `share`: mean share of the weights that is selected. `Jaccard`: of the selected sets. `matched random`: of the matched
    random sets. `chance`: the index expected of independent random sets of the same sizes.
    """
    total = sum(size(a["top"], name) for name in names)
    shares = [sum(pair["top"].info.counts[name] for name in names) / total for pair in (a, b)]
    both = shares[0] * shares[1]
    return {
        "share": f"{50 * sum(shares):.3g} %",
        "Jaccard": f"{a['top'].jaccard(b['top'], names):.3f}",
        "matched random": f"{a['random_magnitude'].jaccard(b['random_magnitude'], names):.3f}",
        "chance": f"{both / (sum(shares) - both) if both else 0.0:.3f}",
    }


def size(one: FundamentalSet, name: str) -> int:
    """Number of elements of a weight."""
    return int(np.prod(one.info.shapes[name]))


def overlap(sets: dict[str, Pair]) -> list[dict[str, Any]]:
    """Compares every two sets over the whole model."""
    return [
        {"sets": f"{first}, {second}", **jaccards(sets[first], sets[second], list(sets[first]["top"].names))}
        for first, second in itertools.combinations(sets, 2)
    ]


def overlap_by_layer(sets: dict[str, Pair]) -> list[dict[str, Any]]:
    """Compares two sets of one task, and two sets of different tasks, layer by layer."""
    rows = []
    for first, second in (("icd seed 0", "icd seed 1"), ("icd seed 0", "reviews seed 0")):
        layers: dict[str, list[str]] = {}
        for name in sets[first]["top"].names:
            number = re.search(r"layers?\.(\d+)\.", name)
            layers.setdefault(number[1] if number else "other", []).append(name)
        for layer, names in layers.items():
            rows.append({"sets": f"{first}, {second}", "layer": layer, **jaccards(sets[first], sets[second], names)})
    return rows


def stability(setting: Setting, task: str) -> list[dict[str, Any]]:
    """Jaccard index of the top 10 % after n score batches with that of as many other texts."""
    rows = []
    for batches in BATCHES[task]:
        row: dict[str, Any] = {"score batches": batches, "texts": batches * BATCH}
        for criterion in CRITERIA[:2]:
            first, second = (
                select_fundamental(setting.scores(criterion, batches * BATCH, last), 0.1) for last in (False, True)
            )
            row[criterion] = f"{first.jaccard(second):.3f}"
        rows.append(row)
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--folder", type=Path, default=Path("runs/which_weights"))
    arguments.add_argument("--pictures", type=Path)
    options = arguments.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    curves: dict[str, list[dict[str, Any]]] = {}
    classes: dict[str, int] = {}
    sets: dict[tuple[str, float], dict[str, Pair]] = {key: {} for key in itertools.product(CRITERIA[:2], SHARES)}
    stable: dict[str, list[dict[str, Any]]] = {}
    with joined_world(3600.0) as world:
        for task, seed in itertools.product(TASKS, (0, 1)):
            setting = make(task, seed, world)
            classes[task] = setting.job.objective.num_outputs
            matched_seed = 2 * list(TASKS).index(task) + seed  # no two matched sets use the same random numbers
            for criterion in CRITERIA[:2]:
                scores = setting.scores(criterion)
                for share in SHARES:
                    top = select_fundamental(scores, share)
                    matched = control_set(setting.model, scores, top, "random_magnitude", matched_seed)
                    sets[criterion, share][f"{task} seed {seed}"] = {"top": top, "random_magnitude": matched}
            if seed == 0:
                curves[task] = removal_curve(setting, options.folder / task)
                stable[task] = stability(setting, task)
    for task, rows in curves.items():
        print(f"\n## Removal: {task}\n")
        chance = float(np.log(classes[task]))
        nothing = f"{rows[0]['loss']:.3f}, {rows[0]['accuracy']:.3f}"
        print(f"Validation loss, accuracy; nothing removed: {nothing}; chance {chance:.3f}, {1 / classes[task]:.3f}.\n")
        show(removal_table(rows, chance), options.json, 1)
    for (criterion, share), pairs in sets.items():
        print(f"\n## Overlap: {criterion}, {100 * share:g} %\n")
        show(overlap(pairs), options.json, 1)
    for criterion in CRITERIA[:2]:
        print(f"\n## Overlap by layer: {criterion}, 10 %\n")
        show(overlap_by_layer(sets[criterion, 0.1]), options.json, 1)
    for task, rows in stable.items():
        print(f"\n## Stability of the top 10 %: {task}\n")
        show(rows, options.json, 1)
    if options.pictures:
        write_atomic(options.pictures / "removal_curves.png", png(curve_picture(curves, classes)))


if __name__ == "__main__":
    main()
