"""What `dcft interpolate` has found: a table, and a picture of the plane of places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABELS = {
    "selected": "selected set",
    "random": "random set, matched in tensors and magnitudes",
    "diagonal": "one share for all (WiSE-FT)",
}


def interpolation_table(found: Mapping[str, Any]) -> str:
    """What was chosen, as a Markdown table: shares of the way, and metrics there.

    Args:
        found: `"interpolation"` of the summary.
    """
    metric = found["metric"]
    external = list(found["end"].get("external") or {})
    columns = ["by", "share of the set", "share of the rest", f"validation {metric}", f"test {metric}", "test loss"]
    columns += [f"{name} {metric}" for name in external]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = [(LABELS[name], row) for name, row in found["families"].items()]
    for label, row in [*rows, ("as fine-tuned", {"on_set": 1.0, "on_rest": 1.0, **found["end"]})]:
        test = row.get("test") or {}
        shown = [f"{test[key]:.4g}" if key in test else "" for key in (metric, "loss")]
        others = [row["external"][name]["test"] for name in external]
        shown += [f"{metrics[metric]:.4g}" if metric in metrics else "" for metrics in others]
        cells = [label, f"{row['on_set']:.3g}", f"{row['on_rest']:.3g}", f"{row['validation'][metric]:.4g}", *shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plane_picture(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Figure:
    """Draws the validation metric of every place: a plane for each set, and a line for the diagonal.

    Args:
        rows: the lines of `plane.jsonl`; the picture has a gap where one is missing.
        found: `"interpolation"` of the summary.
    """
    metric, families = found["metric"], found["families"]
    good = [r for r in rows if isinstance(r["family"], str) and isinstance(r["metrics"], dict) and metric in r["metrics"]]
    values = {(row["family"], row["on_set"], row["on_rest"]): row["metrics"][metric] for row in good}
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    low, high = min(values.values(), default=0.0), max(values.values(), default=1.0)
    figure = Figure(figsize=(12, 4), layout="constrained")
    *planes, line = figure.subplots(1, 3)
    for axes, family in zip(planes, ("selected", "random"), strict=True):
        grid = [[values.get((family if a != b else "diagonal", a, b), math.nan) for a in shares] for b in shares]
        image = axes.imshow(grid, origin="lower", cmap="viridis", vmin=low, vmax=high)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if math.isnan(value):
                    continue
                dark = (value - low) < 0.6 * (high - low)
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        ticks = [f"{share:g}" for share in shares]
        axes.set_xticks(range(len(shares)), ticks)
        axes.set_yticks(range(len(shares)), ticks)
        axes.set(title=LABELS[family].partition(",")[0], xlabel="share of the set", ylabel="share of the rest")
        _mark(axes, shares.index(families[family]["on_set"]), shares.index(families[family]["on_rest"]))
    figure.colorbar(image, ax=planes, label=f"validation {metric}", shrink=0.8)
    points = sorted((on_set, value) for (family, on_set, _), value in values.items() if family == "diagonal")
    line.plot([x for x, _ in points], [y for _, y in points], "o-", color="#2c6fbb", markersize=4)
    chosen = families["diagonal"]
    _mark(line, chosen["on_set"], chosen["validation"][metric])
    line.set(title=LABELS["diagonal"], xlabel="share of all", ylabel=f"validation {metric}")
    line.grid(alpha=0.3)
    return figure


def _mark(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], "o", markersize=24, markerfacecolor="none", markeredgecolor="#c0392b", markeredgewidth=2)
