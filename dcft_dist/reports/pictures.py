"""The pictures of a report, drawn from the rows of `metrics.jsonl` and the summary of a run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..method.fundamental_set import FundamentalSet
from .words import name_of, shown_metrics, unit_of

matplotlib.use("Agg")


Rows = list[dict[str, Any]]


_FUNDAMENTAL, _REST, _CHANCE = "#c0392b", "#2c6fbb", "#777777"


SETS = {
    "top": ("highest scores", _FUNDAMENTAL),
    "random_magnitude": ("random, same tensors and magnitudes", "#e08e2b"),
    "random_tensor": ("random, same tensors", "#8e6bb0"),
    "random": ("random", _REST),
    "lowest": ("lowest scores", "#3a9d5d"),
}


def share_picture(chosen: FundamentalSet) -> Figure:
    """Draws the fundamental share of each eligible weight: a row for each kind of weight, a column for each layer."""
    shares: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in chosen.info.shapes.items():
        number = re.search(r"\.(\d+)\.", name)
        layer = number.group(1) if number else "-"
        kind = name[number.end() :] if number else name
        cell = shares[kind.removesuffix(".weight"), layer]
        cell[0] += chosen.info.counts[name]
        cell[1] += prod(shape)
    kinds = list(dict.fromkeys(kind for kind, _ in shares))
    layers = sorted({layer for _, layer in shares}, key=lambda text: (text == "-", int(text) if text != "-" else 0))
    grid = [[100 * shares[k, n][0] / shares[k, n][1] if (k, n) in shares else float("nan") for n in layers] for k in kinds]
    names = 0.08 * max(map(len, kinds))  # inches that the longest name takes
    figure = Figure(figsize=(2.4 + names + 0.6 * len(layers), 1.2 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="YlOrRd", vmin=0, aspect="auto")
    top = max(max(v for v in row if v == v) for row in grid)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axes.text(
                    x,
                    y,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 0.7 * top else "black",
                )
    axes.set_xticks(range(len(layers)), ["other" if layer == "-" else layer for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set(xlabel="layer", ylabel="kind of weight")
    figure.colorbar(image, label="fundamental, %")
    return figure


def loss_curves(rows: Rows) -> Figure:
    """Draws training and validation loss over the epochs."""

    def draw(axes: Axes) -> None:
        _line(axes, rows, "train/loss", "training", _REST, marker=".")
        _line(axes, rows, "validation/loss", "validation", _FUNDAMENTAL)
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)

    return _curves(draw)


def metric_curves(rows: Rows, summary: dict[str, Any]) -> Figure:
    """Draws two validation metrics over the epochs, in panels of their own if their units differ; marks the tested epoch."""
    names = shown_metrics(summary["validation"])
    units = [unit_of(name) for name in names]
    panels = [names] if units[0] == units[1] else [(name,) for name in names]
    colors = dict(zip(names, (_REST, "#3a9d5d"), strict=True))

    def draw(panel: Sequence[str], axes: Axes) -> None:
        for name in panel:
            _line(axes, rows, f"validation/{name}", name_of(name), colors[name])
        axes.axvline(summary["best_epoch"], color=_CHANCE, linestyle=":", label="tested epoch")
        axes.set_ylabel(f"{', '.join(map(name_of, panel))}\n(validation data)")
        if unit_of(panel[0]) == "share":
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, 0.0), min(high, 1.0))

    return _curves(*(partial(draw, panel) for panel in panels))


def movement_curves(rows: Rows) -> Figure:
    """Draws how far fundamental and other weights moved, as root mean square, over the epochs."""

    def draw(axes: Axes) -> None:
        _line(axes, rows, "movement/fundamental", "fundamental", _FUNDAMENTAL)
        _line(axes, rows, "movement/rest", "rest", _REST)
        axes.set_ylabel("change of a weight\n(root mean square)")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))

    return _curves(draw)


def _line(axes: Axes, rows: Rows, key: str, label: str, color: str, marker: str = "o") -> None:
    points = [(row["train/epoch"], row[key]) for row in rows if key in row and "train/epoch" in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=4)


def _curves(*draws: Callable[[Axes], None]) -> Figure:
    """A panel for each function, one above the other."""
    figure = Figure(figsize=(6.2, 3.2 * len(draws)), layout="constrained")
    for number, draw in enumerate(draws, 1):
        axes = figure.add_subplot(len(draws), 1, number)
        draw(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def removal_bars(check: dict[str, Any]) -> Figure:
    """Draws the removal check: loss and first metric by share removed, a bar for each kind of set.

    Args:
        check: `"removal"` of the run's summary.
    """
    fractions = sorted({row["fraction"] for row in check["removed"]})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, key in enumerate(("loss", shown_metrics(check["base"])[0]), 1):
        axes = figure.add_subplot(1, 2, panel)
        for i, (kind, (label, color)) in enumerate(SETS.items()):
            values = {row["fraction"]: row[key] for row in check["removed"] if row["set"] == kind}
            positions = [n + (i - 2) * 0.16 for n, f in enumerate(fractions) if f in values]
            axes.bar(positions, [values[f] for f in fractions if f in values], 0.15, label=label, color=color)
        if key in check["chance"]:
            axes.axhline(check["chance"][key], color=_CHANCE, linestyle="--")
        axes.axhline(check["base"][key], color=_CHANCE)
        axes.set_xticks(range(len(fractions)), [f"{100 * f:g} %" for f in fractions])
        axes.set_xlabel("eligible weights removed")
        axes.set_ylabel(f"{name_of(key)}, validation data")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
