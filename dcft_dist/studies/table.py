"""Tables of a study's results (Markdown, CSV, LaTeX), from the files of its cells.

Of a study that is not finished, the tables show how many cells are done.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .bootstrap import Estimate, contrast_verdict, estimate
from .results import Result, StudyFolder
from .study import Contrast, Study, Values, load_study

Format = Literal["md", "csv", "tex"]


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm in one setting.

    Attributes:
        arm: its name.
        chosen: the chosen values; None while tuning is not finished.
        at_edge: keys with a chosen value at either end of its grid.
        correct: for each tested seed [examples], 1 for a right and 0 for a wrong prediction.
        diverged: seeds of the runs that diverged.
        summaries: for each tested seed, the summary of its run, with `"body"` (Euclidean distance that the body moved),
            `"minutes"` of the run and `"prepared_minutes"` of its head and scores.
        accuracy: test accuracy over seeds and examples; None with fewer than two tested seeds.
    """

    arm: str
    chosen: Values | None
    at_edge: tuple[str, ...]
    correct: dict[int, NDArray[np.float64]]
    diverged: tuple[int, ...]
    summaries: dict[int, dict[str, Any]]
    accuracy: Estimate | None

    def loss(self, seed: int) -> float:
        """Mean loss over the test examples, in the run of a seed."""
        return float(self.summaries[seed]["test"]["loss"])


@dataclass(frozen=True)
class Difference:
    """The difference between the two arms of a contrast, over the seeds that both have.

    Attributes:
        contrast: the two arms.
        value: difference of the test accuracies; None with fewer than two common seeds.
        loss: [seeds]; differences of the test losses.
        verdict: see `contrast_verdict`; empty without a `value`. Where runs diverged it is `"undecided"`, because the seeds
            that are left out are not like the others.
    """

    contrast: Contrast
    value: Estimate | None
    loss: NDArray[np.float64]
    verdict: str


@dataclass(frozen=True)
class SettingResult:
    """The results of all arms and contrasts in one setting.

    Attributes:
        setting: its name; of further test data followed by a comma and their name.
        num_examples: of the test data.
        groups: [num_examples]; the name of each test example's group.
        arms: in the order of the study.
        differences: one for each contrast of the study.
    """

    setting: str
    num_examples: int
    groups: list[str]
    arms: list[ArmResult]
    differences: list[Difference]

    @property
    def num_groups(self) -> int:
        """Number of different groups of test examples."""
        return len(set(self.groups))


def results(folder: Path) -> tuple[Study, list[SettingResult]]:
    """Reads a study and its results from the study's folder, one `SettingResult` for each setting and its further test data.

    Raises:
        DataError: the folder is not that of a study, or its test examples are missing or belong to other test data.
    """
    if not (folder / "study.toml").is_file():
        raise DataError(f"{folder} is not the folder of a study: it has no study.toml")
    study = load_study(folder / "study.toml")
    store = StudyFolder(study, folder)
    store.check()
    found = [_setting(study, store, setting) for setting in study.settings]
    for file in sorted((folder / "examples").glob("*.*.json")):
        setting, _, test = file.stem.partition(".")
        found += [_setting(study, store, setting, test)] if setting in study.settings else []
    return study, found


def _setting(study: Study, folder: StudyFolder, setting: str, test: str = "") -> SettingResult:
    examples = folder.examples(setting, test)
    groups, labels = examples["group"], np.asarray(examples["label"])
    arms = [_arm(study, folder, (setting, test), name, groups, labels) for name in study.arms]
    by_name = {result.arm: result for result in arms}
    differences = []
    for contrast in study.contrasts:
        if test:  # only the test data of the task decide
            contrast = contrast.model_copy(update={"deciding": False})
        arm, minus = by_name[contrast.arm], by_name[contrast.minus]
        seeds = sorted(arm.correct.keys() & minus.correct.keys())
        value = estimate(np.stack([arm.correct[s] - minus.correct[s] for s in seeds]), groups) if len(seeds) > 1 else None
        loss = np.array([arm.loss(s) - minus.loss(s) for s in seeds])
        verdict = "" if value is None else "undecided" if arm.diverged or minus.diverged else contrast_verdict(value)
        differences.append(Difference(contrast, value, loss, verdict))
    return SettingResult(f"{setting}, {test}" if test else setting, len(labels), groups, arms, differences)


def _arm(
    study: Study, folder: StudyFolder, place: tuple[str, str], arm: str, groups: Sequence[str], labels: NDArray[np.int64]
) -> ArmResult:
    setting, test = place
    try:
        chosen = folder.choose(setting, arm)
    except DataError:  # tuning is not finished
        return ArmResult(arm, None, (), {}, (), {}, None)
    cells = {seed: folder.final(setting, arm, chosen, seed) for seed in study.seeds}
    diverged = tuple(seed for seed, cell in cells.items() if cell and "diverged" in cell)
    done = {seed: cell for seed, cell in cells.items() if cell and "summary" in cell}
    if test:
        done = {seed: _on(cell, test) for seed, cell in done.items() if test in cell.get("external", {})}
    if any(len(cell["predicted"]) != len(labels) for cell in done.values()):
        raise DataError(f"{folder.examples_file(setting, test)} is missing or belongs to other test data")
    correct = {seed: (np.asarray(cell["predicted"]) == labels).astype(np.float64) for seed, cell in done.items()}
    accuracy = estimate(np.stack(list(correct.values())), groups) if len(correct) > 1 else None
    summaries = {
        seed: cell["summary"]
        | {"body": _way(cell), "minutes": _minutes(cell["summary"]["seconds"])}
        | {"prepared_minutes": _minutes(cell.get("prepared_seconds", {}))}
        for seed, cell in done.items()
    }
    return ArmResult(arm, chosen, _edges(study, arm, chosen), correct, diverged, summaries, accuracy)


def _way(cell: Result) -> float:
    """Distance of the tested body from its start; NaN where it was not stored."""
    if "interpolate" in cell:
        return float(cell["summary"]["interpolation"].get("movement", math.nan))
    return float(cell["epochs"][-1]["movement/body"])


def _on(cell: Result, test: str) -> Result:
    """The result of a cell with further test data in the place of the test data."""
    summary = cell["summary"] | {"test": cell["summary"]["external"][test]["test"]}
    return cell | {"predicted": cell["external"][test], "summary": summary}


def _minutes(seconds: dict[str, float]) -> float:
    return sum(seconds.values()) / 60


def _edges(study: Study, arm: str, chosen: Values) -> tuple[str, ...]:
    """Keys with a chosen value that is the first or last of at least three numbers: the grid may be too narrow there."""
    keys = []
    for key, value in chosen:
        values = list({dict(combination)[key]: None for combination in study.grid(arm)})
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            values.sort()
        else:
            continue
        if len(values) > 2 and value in (values[0], values[-1]):
            keys.append(key)
    return tuple(keys)


# -- tables ----------------------------------------------------------------------------------------------------------------


def arm_rows(result: SettingResult, num_seeds: int) -> list[dict[str, str]]:
    """The table of arms: for each arm a row, from column name to text.

    Args:
        result: of one setting.
        num_seeds: how many seeds the study tests.
    """
    rows = []
    for arm in result.arms:
        chosen = ", ".join(
            f"{key.rpartition('.')[2]} {shown(value)}{' (end of the grid)' if key in arm.at_edge else ''}"
            for key, value in arm.chosen or ()
        )
        runs = list(arm.summaries.values())
        rows.append(
            {
                "arm": arm.arm,
                "chosen": (chosen or "nothing to choose") if arm.chosen is not None else "tuning is not finished",
                "seeds": f"{len(arm.correct)} of {num_seeds}" + (f", {len(arm.diverged)} diverged" if arm.diverged else ""),
                "test accuracy": _percent(arm.accuracy),
                "test loss": f"{np.mean([run['test']['loss'] for run in runs]):.3f}" if runs else "",
                "macro-F1": f"{100 * np.mean([run['test']['macro_f1'] for run in runs]):.1f}" if runs else "",
                "validation accuracy": f"{100 * np.mean([r['validation']['accuracy'] for r in runs]):.1f}" if runs else "",
                "best epoch": f"{np.mean([run['best_epoch'] for run in runs]):.1f}" if runs else "",
                "way of the body": _way_of_all(runs),
                "Jaccard": f"{np.mean(jaccards):.2f}" if (jaccards := _jaccards(runs)) else "",
                "minutes": _time(runs),
            }
        )
    return rows


def _way_of_all(summaries: list[dict[str, Any]]) -> str:
    """Mean distance of the body from its start; empty if a run did not store it."""
    way = float(np.mean([summary["body"] for summary in summaries])) if summaries else math.nan
    return "" if math.isnan(way) else f"{way:.3g}"


def _jaccards(summaries: list[dict[str, Any]]) -> list[float]:
    """Jaccard index of a control's set with the set that the criterion selects, for each run that has one.

    A contrast to a control cannot show the effect of the weights that both sets share.
    """
    return [s["jaccard_with_top"] for s in summaries if s.get("jaccard_with_top") is not None]


def contrast_rows(result: SettingResult) -> list[dict[str, str]]:
    """The table of contrasts: for each contrast a row, from column name to text."""
    return [
        {
            "contrast": f"{d.contrast.arm} minus {d.contrast.minus}" + (" (deciding)" if d.contrast.deciding else ""),
            "points": _percent(d.value, sign=True),
            "seeds": str(d.value.num_seeds) if d.value else "fewer than 2",
            "above 0": d.verdict,
            "test loss [standard error]": f"{d.loss.mean():+.3f} [{_error(d.loss):.3f}]" if len(d.loss) > 1 else "",
        }
        for d in result.differences
    ]


def tuning_rows(study: Study, folder: StudyFolder, setting: str) -> list[dict[str, str]]:
    """The table of tuning cells: a row for each arm and its other values, a column for each learning rate.

    The numbers are the best validation accuracies after epoch 0, in percent, averaged over the tuning seeds.
    """
    key = "optimizer.lr"
    rows: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for arm in study.arms:
        for values, scores in folder.tuning_scores(setting, arm).items() if len(study.grid(arm)) > 1 else ():
            others = ", ".join(f"{k.rpartition('.')[2]} {shown(v)}" for k, v in values if k != key)
            column = f"lr {dict(values)[key]:g}" if key in dict(values) else "one lr"
            partly = f" ({len(scores)} of {len(study.tune_seeds)})" if len(scores) < len(study.tune_seeds) else ""
            rows.setdefault((arm, others), {})[column] = (
                f"{100 * np.mean([*scores.values()]):.1f}{partly}" if scores else "-"
            )
            columns[column] = None
    return [{"arm": arm, "values": others, **{c: row.get(c, "") for c in columns}} for (arm, others), row in rows.items()]


def development_rows(study: Study, folder: StudyFolder, setting: str) -> list[dict[str, str]]:
    """The table of a study without tests: each arm at its best values.

    The table has the validation accuracy of the arm, and its difference to the first arm, paired by seed. Choice and mean
    are over the seeds that all values of the arm have.
    """
    rows: list[dict[str, str]] = []
    first: dict[int, float] = {}
    for arm in study.arms:
        scores = folder.tuning_scores(setting, arm)
        seed_sets = [set(by_seed) for by_seed in scores.values() if by_seed]
        seeds = sorted(set.intersection(*seed_sets)) if seed_sets else []
        sums = {values: sum(by_seed[seed] for seed in seeds) for values, by_seed in scores.items() if by_seed}
        values = max(sums, key=sums.__getitem__) if seeds else ()
        best = {seed: scores[values][seed] for seed in seeds}
        over = np.array([best[seed] - first[seed] for seed in seeds if seed in first])
        first = best if not rows else first
        rows.append(
            {
                "arm": arm,
                "best values": ", ".join(f"{k.rpartition('.')[2]} {shown(v)}" for k, v in values),
                "seeds": str(len(seeds)),
                "validation accuracy": f"{100 * np.mean([*best.values()]):.1f}" if best else "",
                f"over {next(iter(study.arms))} (standard error)": _with_error(over) if len(over) else "",
            }
        )
    return rows


def _with_error(differences: NDArray[np.float64]) -> str:
    return f"{100 * differences.mean():+.2f} ({100 * _error(differences):.2f})"


def _error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _time(summaries: list[dict[str, Any]]) -> str:
    """Minutes of a cell, and of its head and scores where known.

    The numbers are medians, because some cells wait for other processes.
    """
    if not summaries:
        return ""
    prepared = [s["prepared_minutes"] for s in summaries if s["prepared_minutes"]]
    return f"{np.median([s['minutes'] for s in summaries]):.1f}" + (f" + {np.median(prepared):.1f}" if prepared else "")


def shown(value: Any) -> str:
    """A value as the tables print it: floats without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: Estimate | None, sign: bool = False) -> str:
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * value.mean:{plus}.2f} [{100 * value.low:{plus}.2f}, {100 * value.high:{plus}.2f}]"


def table(folder: Path, form: Format) -> str:
    """All tables of a study as one text: arms, contrasts and tuning of every setting.

    Args:
        folder: the study's folder.
        form: `"md"` for Markdown, `"csv"` for comma-separated values, `"tex"` for LaTeX.

    Raises:
        DataError: the folder is not that of a study, or its test examples are missing or belong to other test data.
    """
    study, setting_results = results(folder)
    store, parts = StudyFolder(study, folder), []
    write = {"md": _markdown, "csv": _csv, "tex": _latex}[form]
    if not study.seeds:
        for setting in study.settings:
            parts.append(write(development_rows(study, store, setting), f"{setting}: development, validation data only"))
    for result in setting_results if study.seeds else ():
        title = f"{result.setting}: {result.num_examples} test examples in {result.num_groups} groups"
        for rows in (arm_rows(result, len(study.seeds)), contrast_rows(result)):
            if rows:
                parts.append(write(rows, title))
        if result.setting in study.settings and (rows := tuning_rows(study, store, result.setting)):
            parts.append(write(rows, f"{result.setting}: validation accuracy of the tuning cells"))
    note = (
        "Mean over seeds in percent [95 % interval over seeds and groups of examples]; way of the body: Euclidean; "
        "Jaccard: of a control's set with the selected one; minutes: median of a cell + its head and scores, which the arms "
        "of a seed share, as long as they took beside what else ran."
    )
    missing, number = store.missing()
    lacking = [f"{missing} of {number} cells have no result yet."] if missing else []
    return "\n\n".join([*parts, note, *lacking] if form == "md" else parts)


def _markdown(rows: list[dict[str, str]], title: str) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def _csv(rows: list[dict[str, str]], title: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["study", *rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows([{"study": title, **row} for row in rows])
    return out.getvalue().rstrip()


def _latex(rows: list[dict[str, str]], title: str) -> str:
    def clean(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%")

    lines = [rf"% {title}", r"\begin{tabular}{" + "l" * len(rows[0]) + "}", r"\hline"]
    lines += [" & ".join(map(clean, row)) + r" \\" for row in ([*rows[0]], *([*r.values()] for r in rows))]
    lines.insert(4, r"\hline")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"])
