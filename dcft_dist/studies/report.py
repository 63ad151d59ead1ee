"""The report of a study, one self-contained HTML file: first whether to use the method, then all tables and pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import DataError
from ..files import write_atomic
from ..reports.render import png, template
from .answers import answers
from .results import StudyFolder
from .study import Study, load_study
from .table import SettingResult, arm_rows, contrast_rows, results, shown


def write_study_report(folder: Path, pictures: Path | None = None) -> Path:
    """Writes `report.html` into a study's folder. The study does not have to be finished.

    Args:
        folder: the study's folder.
        pictures: a folder for the pictures as PNG files; None: the pictures are in the report only.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: the folder is not that of a study, or a setting has no tested cell yet.
    """
    study, setting_results = results(folder)
    store = StudyFolder(load_study(folder / "study.toml"), folder)
    parts = []
    for result in setting_results:
        if not any(arm.correct for arm in result.arms):
            raise DataError(f"{folder}: no cell of {result.setting} has been tested yet")
        figures = {"contrasts": contrast_picture(result), "tuning": None}
        if result.setting in study.settings:
            figures["tuning"] = tuning_picture(study, store, result.setting)
        images = {name: png(figure) for name, figure in figures.items() if figure}
        for name, data in images.items():
            if pictures:
                write_atomic(pictures / f"{result.setting}_{name}.png", data)
        parts.append(
            {
                "title": result.setting,
                "answers": answers(result),
                "images": {name: base64.b64encode(data).decode() for name, data in images.items()},
                "arms": arm_rows(result, len(study.seeds)),
                "settings": [{"arm": arm, "settings": arm_settings(study, arm)} for arm in study.arms],
                "contrasts": contrast_rows(result),
                "examples": f"{result.num_examples} test examples in {result.num_groups} groups",
            }
        )
    path = folder / "report.html"
    write_atomic(path, template("study.html").render(study=study, parts=parts, facts=_facts(setting_results)))
    return path


def arm_settings(study: Study, arm: str) -> str:
    """The keys of an arm in one line; with all values to choose from, where it tunes one."""
    texts = []
    for key, value in {**study.arms[arm], **study.keys(arm)}.items():
        if not isinstance(value, dict):
            texts.append(f"{key} = {' or '.join(map(shown, value)) if isinstance(value, list) else shown(value)}")
    return ", ".join(texts) or f"as in {study.base}"


# -- pictures --------------------------------------------------------------------------------------------------------------


def contrast_picture(result: SettingResult) -> Figure:
    """Draws, on the left, the accuracy of each arm, with one dot for each seed. On the right: contrasts and intervals."""
    arms = [arm for arm in result.arms if arm.correct]
    differences = [d for d in result.differences if d.value]
    figure = Figure(figsize=(10, 1.4 + 0.34 * max(len(arms), len(differences))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for y, arm in enumerate(reversed(arms)):
        accuracies = [100 * float(row.mean()) for row in arm.correct.values()]
        left.plot(accuracies, [y] * len(accuracies), "o", color="#2c6fbb", alpha=0.35, markersize=5)
        if arm.accuracy:
            left.plot([100 * arm.accuracy.mean], [y], "|", color="black", markersize=14, markeredgewidth=2)
    _label(left, [arm.arm for arm in arms], "test accuracy, %: dots are seeds, the bar is their mean")
    for y, difference in enumerate(reversed(differences)):
        value, color = difference.value, "#c0392b" if difference.contrast.deciding else "#444444"
        if value:
            right.plot([100 * value.low, 100 * value.high], [y, y], color=color, linewidth=2)
            right.plot([100 * value.mean], [y], "o", color=color)
    right.axvspan(-1, 1, color="#eeeeee", zorder=0)
    right.axvline(0, color="black", linewidth=1)
    names = [f"{d.contrast.arm} - {d.contrast.minus}" for d in differences]
    _label(right, names, "points, 95 % interval (red: deciding)")
    return figure


def _label(axes: Axes, names: list[str], text: str) -> None:
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(text)
    axes.grid(axis="x", alpha=0.3)


def tuning_picture(study: Study, store: StudyFolder, setting: str) -> Figure | None:
    """Draws the validation accuracy of the tuning cells over the learning rate: one panel for each arm that tunes it.

    A panel has one line for each combination of the arm's other tuned values. None: no arm tunes its learning rate.
    """
    key = "optimizer.lr"
    arms = [arm for arm in study.arms if any(key in dict(v) for v in study.grid(arm)) and len(study.grid(arm)) > 1]
    if not arms:
        return None
    columns = min(len(arms), 3)
    figure = Figure(figsize=(3.4 * columns, 2.5 * -(-len(arms) // columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-len(arms) // columns), columns, sharey=True, squeeze=False)).ravel()
    for panel, arm in zip(axes, arms, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for values, scores in store.tuning_scores(setting, arm).items():
            others = ", ".join(f"{k.rpartition('.')[2]} {shown(v)}" for k, v in values if k != key) or "all seeds"
            if scores and key in dict(values):
                lines.setdefault(others, []).append((dict(values)[key], 100 * float(np.mean([*scores.values()]))))
        for label, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        panel.set_xscale("log")
        panel.set(title=arm, xlabel="learning rate")
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend(frameon=False, fontsize=8)
    for panel in axes[len(arms) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("validation accuracy, %")
    return figure


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)


def _facts(setting_results: list[SettingResult]) -> list[tuple[str, str]]:
    summaries: list[dict[str, Any]] = [
        summary for result in setting_results for arm in result.arms for summary in arm.summaries.values()
    ]

    def every(key: str) -> str:
        """The different values of a key in all summaries."""
        return "; ".join(sorted({_text(summary[key]) for summary in summaries}))

    hours = sum(sum(s["seconds"].values()) for s in summaries) / 3600
    return [
        ("caveat", every("caveat")),
        ("tested cells", f"{len(summaries)}, {hours:.1f} process hours"),
        ("dates", every("date")),
        ("code", every("git_commit")),
        ("versions", every("versions")),
        ("machine", every("machine")),
    ]
