"""Tables over several finished runs, and the table of a removal check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..objectives.base import oriented
from .pictures import SETS, shown_metrics
from .render import shown_value, summary_of


def removal_table(run: Path) -> str:
    """The removal check of a run as Markdown: rise of the validation loss, and accuracy, by set and share removed."""
    check = summary_of(run)["removal"]
    if not check:
        raise DataError(f"{run} made no removal check")
    fractions = sorted({row["fraction"] for row in check["removed"]})
    base, chance = check["base"], check["chance"]
    metric = shown_metrics(base)[0]
    at_chance = f"; at chance {chance['loss']:.3f} and {chance[metric]:.3f}" if metric in chance else ""
    lines = [
        f"Nothing removed: loss {base['loss']:.3f}, {metric} {base[metric]:.3f}{at_chance}. Rise of the loss, and {metric}:",
        "",
        "| removed | " + " | ".join(f"{100 * f:g} %" for f in fractions) + " |",
        "|---|" + "---|" * len(fractions),
    ]
    for kind, (label, _) in SETS.items():
        found = {row["fraction"]: row for row in check["removed"] if row["set"] == kind}
        cells = [f"{found[f]['loss'] - base['loss']:+.3f}, {found[f][metric]:.3f}" for f in fractions]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(runs: Sequence[Path]) -> str:
    """A table of finished runs (Markdown), and the caveats of their tasks."""
    finished = [run for run in runs if (run / "summary.json").exists()]
    summaries = [summary_of(run) for run in finished or runs]
    first, second = shown_metrics(summaries[0]["validation"])
    lines = [
        f"| run | method | test {first} | test {second} | validation {first} | best epoch | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in summaries:
        minutes = sum(s["seconds"].values()) / 60
        what = s["method"] + (
            f" (factor {s['factor']:g}, {s['level']}, {s['optimizer']})"
            if s["factor"] is not None
            else f" ({s['optimizer']})"
        )
        if s["method"] == "linear_probe":
            what = "linear probe"
        lines.append(
            f"| {s['name']} | {what} | {shown_value(s['test'], first)} | {shown_value(s['test'], second)} "
            f"| {shown_value(s['validation'], first)} | {s['best_epoch']} | {minutes:.1f} |"
        )
    tested = [s for s in summaries if s["test"] and first in s["test"]]
    probes = [s["test"][first] for s in tested if s["method"] == "linear_probe"]
    others = [s for s in tested if s["method"] != "linear_probe"]
    beaten = [
        s["name"] for s in others if any(oriented(first, probe) > oriented(first, s["test"][first]) for probe in probes)
    ]
    if beaten:
        lines.append(f"\nThe linear probe beats {', '.join(beaten)} here.")
    unfinished = [run.name for run in runs if run not in finished]
    lines += ["", f"Not finished: {', '.join(unfinished)}."] if unfinished else []
    lines += ["", *dict.fromkeys(s["caveat"] for s in summaries), "One seed a row: differences of a few points are noise."]
    return "\n".join(lines)
