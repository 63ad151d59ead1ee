"""What came out of a study: tables (Markdown, CSV, LaTeX) from the files of its cells; cells that are missing are shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .bootstrap import Estimate, contrast_verdict, estimate
from .results import StudyFolder
from .study import Contrast, Study, Values, load_study

Format = Literal["md", "csv", "tex"]


@dataclass(frozen=True)
class ArmResult:
    """An arm in one setting. `correct`: [examples] of right or wrong by seed; `chosen`: None while tuning goes on."""

    arm: str
    chosen: Values | None
    at_edge: tuple[str, ...]
    correct: dict[int, NDArray[np.float64]]
    diverged: tuple[int, ...]
    summaries: dict[int, dict[str, Any]]
    accuracy: Estimate | None

    def loss(self, seed: int) -> float:
        """Mean loss over the test examples."""
        return float(self.summaries[seed]["test"]["loss"])


@dataclass(frozen=True)
class Difference:
    """`value`: of accuracies; `loss`: [seeds], of test losses. `verdict`: empty without an estimate; undecided where runs
    diverged, since those left out are not like the others."""

    contrast: Contrast
    value: Estimate | None
    loss: NDArray[np.float64]
    verdict: str


@dataclass(frozen=True)
class SettingResult:
    setting: str
    num_examples: int
    groups: list[str]
    arms: list[ArmResult]
    differences: list[Difference]

    @property
    def num_groups(self) -> int:
        return len(set(self.groups))


def results(folder: Path) -> tuple[Study, list[SettingResult]]:
    """
    Raises:
        DataError: the folder holds no study.
    """
    if not (folder / "study.toml").is_file():
        raise DataError(f"{folder} holds no study")
    study = load_study(folder / "study.toml")
    found = StudyFolder(study, folder)
    return study, [_setting(study, found, setting) for setting in study.settings]


def _setting(study: Study, folder: StudyFolder, setting: str) -> SettingResult:
    examples = folder.examples(setting)
    groups, labels = examples["group"], np.asarray(examples["label"])
    arms = [_arm(study, folder, setting, arm, groups, labels) for arm in study.arms]
    by_name = {a.arm: a for a in arms}
    differences = []
    for contrast in study.contrasts:
        a, b = by_name[contrast.arm], by_name[contrast.minus]
        seeds = sorted(a.correct.keys() & b.correct.keys())
        value = estimate(np.stack([a.correct[s] - b.correct[s] for s in seeds]), groups) if len(seeds) > 1 else None
        loss = np.array([a.loss(s) - b.loss(s) for s in seeds])
        word = "" if value is None else "undecided" if a.diverged or b.diverged else contrast_verdict(value)
        differences.append(Difference(contrast, value, loss, word))
    return SettingResult(setting, len(labels), groups, arms, differences)


def _arm(
    study: Study, folder: StudyFolder, setting: str, arm: str, groups: Sequence[str], labels: NDArray[np.int64]
) -> ArmResult:
    try:
        chosen = folder.choose(setting, arm)
    except DataError:  # tuning goes on
        return ArmResult(arm, None, (), {}, (), {}, None)
    cells = {seed: folder.final(setting, arm, chosen, seed) for seed in study.seeds}
    diverged = tuple(seed for seed, cell in cells.items() if cell and "diverged" in cell)
    done = {seed: cell for seed, cell in cells.items() if cell and "summary" in cell}
    if any(len(cell["predicted"]) != len(labels) for cell in done.values()):
        raise DataError(f"{folder.path / 'examples' / setting}.json is missing, or of other test data")
    correct = {seed: (np.asarray(cell["predicted"]) == labels).astype(np.float64) for seed, cell in done.items()}
    accuracy = estimate(np.stack(list(correct.values())), groups) if len(correct) > 1 else None
    summaries = {
        seed: cell["summary"]
        | {"body": cell["epochs"][-1]["movement/body"], "minutes": _minutes(cell["summary"]["seconds"])}
        | {"prepared_minutes": _minutes(cell.get("prepared_seconds", {}))}
        for seed, cell in done.items()
    }
    return ArmResult(arm, chosen, _edges(study, arm, chosen), correct, diverged, summaries, accuracy)


def _minutes(seconds: dict[str, float]) -> float:
    return sum(seconds.values()) / 60


def _edges(study: Study, arm: str, chosen: Values) -> tuple[str, ...]:
    """Keys whose chosen value is the first or last of at least three: the grid may be too narrow there."""
    found = []
    for key, value in chosen:
        values = list({dict(combination)[key]: None for combination in study.grid(arm)})
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            values.sort()
        else:
            continue
        if len(values) > 2 and value in (values[0], values[-1]):
            found.append(key)
    return tuple(found)


# -- tables ----------------------------------------------------------------------------------------------------------------


def arm_rows(result: SettingResult, num_seeds: int) -> list[dict[str, str]]:
    rows = []
    for a in result.arms:
        chosen = ", ".join(
            f"{key.rpartition('.')[2]} {shown(value)}{' (end of the grid)' if key in a.at_edge else ''}"
            for key, value in a.chosen or ()
        )
        s = list(a.summaries.values())
        rows.append(
            {
                "arm": a.arm,
                "chosen": chosen if a.chosen is not None else "tuning is not finished",
                "seeds": f"{len(a.correct)} of {num_seeds}" + (f", {len(a.diverged)} diverged" if a.diverged else ""),
                "test accuracy": _percent(a.accuracy),
                "test loss": f"{np.mean([x['test']['loss'] for x in s]):.3f}" if s else "",
                "macro-F1": f"{100 * np.mean([x['test']['macro_f1'] for x in s]):.1f}" if s else "",
                "validation accuracy": f"{100 * np.mean([x['validation']['accuracy'] for x in s]):.1f}" if s else "",
                "best epoch": f"{np.mean([x['best_epoch'] for x in s]):.1f}" if s else "",
                "way of the body": f"{np.mean([x['body'] for x in s]):.3g}" if s else "",
                "Jaccard": f"{np.mean(shared):.2f}" if (shared := _shared(s)) else "",
                "minutes": _time(s),
            }
        )
    return rows


def _shared(summaries: list[dict[str, Any]]) -> list[float]:
    """Jaccard index of a control's set with the one that its criterion selects: so much of a contrast to it is lost."""
    return [s["jaccard_with_top"] for s in summaries if s.get("jaccard_with_top") is not None]


def contrast_rows(result: SettingResult) -> list[dict[str, str]]:
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
    """Best validation accuracy after epoch 0, in percent, mean over the tuning seeds: a column for each learning rate."""
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
    """Each arm at its best values: validation accuracy, and what it has over the first arm, paired by seed.

    An arm's values are chosen, and its mean is made, over the seeds that all of them have.
    """
    rows: list[dict[str, str]] = []
    first: dict[int, float] = {}
    for arm in study.arms:
        scores = folder.tuning_scores(setting, arm)
        begun = [set(found) for found in scores.values() if found]
        seeds = sorted(set.intersection(*begun)) if begun else []
        sums = {values: sum(found[seed] for seed in seeds) for values, found in scores.items() if found}
        values = max(sums, key=sums.__getitem__) if seeds else ()
        found = {seed: scores[values][seed] for seed in seeds}
        over = np.array([found[seed] - first[seed] for seed in seeds if seed in first])
        first = found if not rows else first
        rows.append(
            {
                "arm": arm,
                "best values": ", ".join(f"{k.rpartition('.')[2]} {shown(v)}" for k, v in values),
                "seeds": str(len(seeds)),
                "validation accuracy": f"{100 * np.mean([*found.values()]):.1f}" if found else "",
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
    """Of a cell, and of its head and scores where that is known; the median, since some wait for other processes."""
    if not summaries:
        return ""
    prepared = [s["prepared_minutes"] for s in summaries if s["prepared_minutes"]]
    return f"{np.median([s['minutes'] for s in summaries]):.1f}" + (f" + {np.median(prepared):.1f}" if prepared else "")


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: Estimate | None, sign: bool = False) -> str:
    if value is None:
        return ""
    plus = "+" if sign else ""
    return f"{100 * value.mean:{plus}.2f} [{100 * value.low:{plus}.2f}, {100 * value.high:{plus}.2f}]"


def table(folder: Path, form: Format) -> str:
    """Every setting's arms, contrasts and tuning."""
    study, found = results(folder)
    store, parts = StudyFolder(study, folder), []
    write = {"md": _markdown, "csv": _csv, "tex": _latex}[form]
    if not study.seeds:
        for setting in study.settings:
            parts.append(write(development_rows(study, store, setting), f"{setting}: development, validation data only"))
    for result in found if study.seeds else ():
        title = f"{result.setting}: {result.num_examples} test examples in {result.num_groups} groups"
        for rows in (arm_rows(result, len(study.seeds)), contrast_rows(result)):
            if rows:
                parts.append(write(rows, title))
        if rows := tuning_rows(study, store, result.setting):
            parts.append(write(rows, f"{result.setting}: validation accuracy of the tuning cells"))
    note = (
        "Mean over seeds in percent [95 % interval over seeds and groups of examples]; way of the body: Euclidean; "
        "Jaccard: of a control's set with the selected one; minutes: median of a cell + its head and scores, which the arms "
        "of a seed share, as long as they took beside what else ran."
    )
    return "\n\n".join([*parts, note] if form == "md" else parts)


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
