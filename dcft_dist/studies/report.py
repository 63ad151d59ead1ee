"""The report of a study: whether to use the method, on one screen; then everything else. One self-contained HTML file."""

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
from .bootstrap import Estimate, estimate
from .results import StudyFolder
from .study import Study, load_study
from .table import ArmResult, SettingResult, arm_rows, contrast_rows, results, shown

_MEANING = {
    "supported": "Supported here",
    "not supported": "Not supported here",
    "undecided": "Undecided here",
}


def write_study_report(folder: Path, pictures: Path | None = None) -> Path:
    """Makes `report.html` of a study, finished or not, and returns its path; with `pictures`, also PNGs there.

    Raises:
        DataError: the folder holds no study, or one of which no cell has been tested.
    """
    study, found = results(folder)
    store = StudyFolder(load_study(folder / "study.toml"), folder)
    parts = []
    for result in found:
        if not any(a.correct for a in result.arms):
            raise DataError(f"{folder}: no cell of {result.setting} has been tested yet")
        drawn = {"contrasts": contrast_picture(result), "tuning": tuning_picture(study, store, result.setting)}
        images = {name: png(figure) for name, figure in drawn.items() if figure}
        for name, data in images.items():
            if pictures:
                write_atomic(pictures / f"{result.setting}_{name}.png", data)
        parts.append(
            {
                "title": result.setting,
                "answers": answers(result),
                "images": {name: base64.b64encode(data).decode() for name, data in images.items()},
                "arms": arm_rows(result, len(study.seeds)),
                "contrasts": contrast_rows(result),
                "examples": f"{result.num_examples} test examples in {result.num_groups} groups",
            }
        )
    path = folder / "report.html"
    write_atomic(path, template("study.html").render(study=study, parts=parts, facts=_facts(found)))
    return path


def answers(result: SettingResult) -> list[str]:
    """What the deciding contrast says, and which arms come out on top, in words."""
    texts = []
    for d in result.differences:
        if d.contrast.deciding and d.value:
            texts.append(
                f"{_MEANING[d.verdict]}: {d.contrast.arm} minus {d.contrast.minus} is {_points(d.value)} points of "
                f"test accuracy (95 % interval, {d.value.num_seeds} seeds)."
            )
        elif d.contrast.deciding:
            texts.append(f"Undecided: {d.contrast.arm} and {d.contrast.minus} have fewer than two seeds in common.")
    known = [a for a in result.arms if a.accuracy]
    if known:
        best = max(known, key=lambda a: a.accuracy.mean if a.accuracy else 0.0)
        level = [a.arm for a in known if a is not best and _reaches_zero(best, a, result)]
        texts.append(
            f"The highest mean is that of {best.arm}, {100 * best.accuracy.mean:.1f} %"  # type: ignore[union-attr]
            + (f"; not to be told apart from it: {', '.join(level)}." if level else "; every other arm is below it.")
        )
    return texts


def _reaches_zero(best: ArmResult, other: ArmResult, result: SettingResult) -> bool:
    seeds = sorted(best.correct.keys() & other.correct.keys())
    if len(seeds) < 2:
        return True
    return estimate(np.stack([best.correct[s] - other.correct[s] for s in seeds]), result.groups).low <= 0


def _points(value: Estimate) -> str:
    return f"{100 * value.mean:+.2f} [{100 * value.low:+.2f}, {100 * value.high:+.2f}]"


# -- pictures --------------------------------------------------------------------------------------------------------------


def contrast_picture(result: SettingResult) -> Figure:
    """Left: accuracy of each arm, a dot a seed. Right: the contrasts with their intervals."""
    arms = [a for a in result.arms if a.correct]
    known = [d for d in result.differences if d.value]
    figure = Figure(figsize=(10, 1.4 + 0.34 * max(len(arms), len(known))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for y, arm in enumerate(reversed(arms)):
        seeds = [100 * float(row.mean()) for row in arm.correct.values()]
        left.plot(seeds, [y] * len(seeds), "o", color="#2c6fbb", alpha=0.35, markersize=5)
        if arm.accuracy:
            left.plot([100 * arm.accuracy.mean], [y], "|", color="black", markersize=14, markeredgewidth=2)
    _label(left, [a.arm for a in arms], "test accuracy, %: a dot a seed, a bar the mean")
    for y, d in enumerate(reversed(known)):
        value, color = d.value, "#c0392b" if d.contrast.deciding else "#444444"
        if value:
            right.plot([100 * value.low, 100 * value.high], [y, y], color=color, linewidth=2)
            right.plot([100 * value.mean], [y], "o", color=color)
    right.axvspan(-1, 1, color="#eeeeee", zorder=0)
    right.axvline(0, color="black", linewidth=1)
    names = [f"{d.contrast.arm} - {d.contrast.minus}" for d in known]
    _label(right, names, "points, 95 % interval (red: deciding)")
    return figure


def _label(axes: Axes, names: list[str], text: str) -> None:
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(text)
    axes.grid(axis="x", alpha=0.3)


def tuning_picture(study: Study, store: StudyFolder, setting: str) -> Figure | None:
    """Validation accuracy of the tuning cells against the learning rate, a line for each arm and further value."""
    key = "optimizer.lr"
    arms = [arm for arm in study.arms if any(key in dict(v) for v in study.grid(arm)) and len(study.grid(arm)) > 1]
    if not arms:
        return None
    columns = min(len(arms), 3)
    figure = Figure(figsize=(3.4 * columns, 2.5 * -(-len(arms) // columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-len(arms) // columns), columns, sharey=True, squeeze=False)).ravel()
    for place, arm in zip(axes, arms, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for values, scores in store.tuning_scores(setting, arm).items():
            others = ", ".join(f"{k.rpartition('.')[2]} {shown(v)}" for k, v in values if k != key) or "all seeds"
            if scores and key in dict(values):
                lines.setdefault(others, []).append((dict(values)[key], 100 * float(np.mean([*scores.values()]))))
        for label, points in lines.items():
            place.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        place.set_xscale("log")
        place.set(title=arm, xlabel="learning rate")
        place.grid(alpha=0.3)
        if len(lines) > 1:
            place.legend(frameon=False, fontsize=8)
    for place in axes[len(arms) :]:
        place.set_visible(False)
    axes[0].set_ylabel("validation accuracy, %")
    return figure


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else str(value)


def _facts(found: list[SettingResult]) -> list[tuple[str, str]]:
    summaries: list[dict[str, Any]] = [s for r in found for a in r.arms for s in a.summaries.values()]

    def every(key: str) -> str:
        return "; ".join(sorted({_text(s[key]) for s in summaries}))

    hours = sum(sum(s["seconds"].values()) for s in summaries) / 3600
    return [
        ("caveat", every("caveat")),
        ("tested cells", f"{len(summaries)}, {hours:.1f} process hours"),
        ("dates", every("date")),
        ("code", every("git_commit")),
        ("versions", every("versions")),
        ("machine", every("machine")),
    ]
