"""Markdown tables: a comparison of several finished runs, and the removal check of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.toml import resolved_keys
from ..errors import DataError
from ..objectives.base import oriented
from .about import config_of
from .pictures import SETS
from .render import shown_value, summary_of, what_it_is
from .words import shown_metrics


def removal_table(run: Path) -> str:
    """The removal check of a run as a Markdown table: one row for each kind of set, one column for each share removed.

    A cell has the rise of the validation loss, and the value of the first metric.

    Raises:
        DataError: the directory contains no finished run, or the run did no removal check.
    """
    check = summary_of(run)["removal"]
    if not check:
        raise DataError(f"{run} did no removal check: set removal.fractions and run again")
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
        by_fraction = {row["fraction"]: row for row in check["removed"] if row["set"] == kind}
        cells = [f"{by_fraction[f]['loss'] - base['loss']:+.3f}, {by_fraction[f][metric]:.3f}" for f in fractions]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(runs: Sequence[Path]) -> str:
    """A Markdown table of finished runs, with the caveats of their tasks and a list of the runs that are not finished.

    The table also says where a linear probe beats a fine-tuned run.

    Args:
        runs: the run directories.

    Raises:
        DataError: none of the directories contains a finished run.
    """
    finished = [run for run in runs if (run / "summary.json").exists()]
    summaries = [summary_of(run) for run in finished or runs]
    first, second = shown_metrics(summaries[0]["validation"])
    lines = [
        f"| run | method | test {first} | test {second} | validation {first} | validation loss | best epoch | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary in summaries:
        minutes = sum(summary["seconds"].values()) / 60
        method = summary["method"] + (
            f" (factor {summary['factor']:g}, {summary['level']}, {summary['optimizer']})"
            if summary["factor"] is not None
            else f" ({summary['optimizer']})"
        )
        if summary["method"] == "linear_probe":
            method = "linear probe"
        if what_it_is(summary):
            method += ": epoch 0 was best, this is the linear probe"
        test = summary["test"]
        lines.append(
            f"| {summary['name']} | {method} | {shown_value(test, first)} | {shown_value(test, second)} "
            f"| {shown_value(summary['validation'], first)} | {shown_value(summary['validation'], 'loss')} "
            f"| {summary['best_epoch']} | {minutes:.1f} |"
        )
    tested = [s for s in summaries if s["test"] and first in s["test"]]
    probes = [s["test"][first] for s in tested if s["method"] == "linear_probe"]
    others = [s for s in tested if s["method"] != "linear_probe"]
    beaten = [
        s["name"] for s in others if any(oriented(first, probe) > oriented(first, s["test"][first]) for probe in probes)
    ]
    if beaten:
        lines.append(f"\nThe linear probe beats {', '.join(beaten)} here.")
    models: dict[str, list[str]] = {}
    for summary in summaries:
        models.setdefault(summary.get("weights_checksum", summary["name"]), []).append(summary["name"])
    lines += [f"\nThe same model, to the last bit: {', '.join(names)}." for names in models.values() if len(names) > 1]
    unfinished = [run.name for run in runs if run not in finished]
    lines += ["", f"Not finished: {', '.join(unfinished)}."] if unfinished else []
    lines += [
        "",
        *dict.fromkeys(summary["caveat"] for summary in summaries),
        *_settings_that_differ(finished or runs),
        "Choose by a validation column; the test data are for the run that is chosen. One seed a row: differences of a few "
        "points are noise.",
    ]
    return "\n".join(lines)


def _settings_that_differ(runs: Sequence[Path]) -> list[str]:
    """A line for each run with the keys that are not the same in all of them."""
    configs = {run.name: resolved_keys(config) for run in runs if (config := config_of(run))}
    keys = sorted({key for config in configs.values() for key in config} - {"name"})
    differ = [key for key in keys if len({config.get(key) for config in configs.values()}) > 1]
    if not differ:
        return []
    lines = [f"- {name}: {', '.join(f'{key} = {config.get(key)}' for key in differ)}" for name, config in configs.items()]
    return ["", "Settings that differ:", "", *lines, ""]
