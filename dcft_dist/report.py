"""`report.html` of a run, self-contained, and tables over several runs; made from the files in the run directories."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from .errors import DataError
from .files import read_json, read_lines, write_atomic
from .fundamental import FundamentalSet
from .objective import oriented
from .pictures import SETS, loss_curves, metric_curves, movement_curves, png, removal_bars, share_picture, shown_metrics


def write_report(run: Path, pictures: Path | None = None) -> Path:
    """Makes `report.html` of a finished run and returns its path; with `pictures`, also a PNG of each picture there.

    Raises:
        DataError: the directory holds no finished run.
    """
    summary, drawn = _summary(run), []
    for slug, title, caption, figure in _pictures(run, summary):
        data = png(figure)
        drawn.append((title, caption, base64.b64encode(data).decode()))
        if pictures:
            write_atomic(pictures / f"{slug}.png", data)
    path = run / "report.html"
    write_atomic(
        path,
        template("report.html").render(summary=summary, results=results_of(summary), facts=_facts(summary), pictures=drawn),
    )
    return path


def _pictures(run: Path, summary: dict[str, Any]) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of each picture that the run has the data for."""
    rows = read_lines(run / "metrics.jsonl")
    yield "loss", "Loss", "Training loss of each logged step, validation loss of each epoch.", loss_curves(rows)
    caption = "Epoch 0 is the warmed-up head on the frozen body. The marked epoch was tested."
    yield "metrics", "Validation metrics", caption, metric_curves(rows, summary)
    if (run / "fundamental.safetensors").exists():
        chosen = FundamentalSet.load(run / "fundamental.safetensors")
        caption = "Share of each weight matrix that is fundamental, by layer and kind."
        yield "share", "Where the fundamental weights are", caption, share_picture(chosen)
        caption = "Root mean square change of an eligible weight."
        yield "movement", "Movement from the pre-trained weights", caption, movement_curves(rows)
    if summary["removal"]:
        caption = "Validation with sets of weights set to zero; dashed: chance, solid grey: nothing removed."
        yield "removal", "Removal check", caption, removal_bars(summary["removal"])


def removal_table(run: Path) -> str:
    """The removal check of a run as Markdown: rise of the validation loss, and accuracy, by set and share removed."""
    check = _summary(run)["removal"]
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
    summaries = [_summary(run) for run in finished or runs]
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
            f"| {s['name']} | {what} | {_shown(s['test'], first)} | {_shown(s['test'], second)} "
            f"| {_shown(s['validation'], first)} | {s['best_epoch']} | {minutes:.1f} |"
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


def _shown(metrics: dict[str, float] | None, key: str) -> str:
    if metrics is None:
        return "not tested"
    return f"{metrics[key]:.3f}" if key in metrics else "-"


def _summary(run: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = read_json(run / "summary.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{run} holds no finished run") from error
    return summary


def results_of(s: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, validation, test, 95 % interval of the test) of all metrics, the one that chose the epoch first."""
    first, spread = shown_metrics(s["validation"])[0], s.get("test_intervals") or {}
    names = sorted(s["validation"], key=lambda name: name != first)
    ends = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in spread.items()}
    return [(name, _shown(s["validation"], name), _shown(s["test"], name), ends.get(name, "")) for name in names]


def _facts(s: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("method", s["method"]),
        ("engine", f"{s['engine']}, {s['ranks']} ranks ({s['device']})"),
        ("weights", f"{s['num_weights']:,}"),
    ]
    if s["num_selected"] is not None:
        facts += [
            (
                "fundamental",
                f"{s['num_selected']:,} of {s['num_eligible']:,} eligible weights: "
                f"{s['num_selected'] / s['num_eligible']:.1%} "
                f"of these, {s['num_selected'] / s['num_weights']:.1%} of all (criterion {s['criterion']})",
            ),
        ]
    if s["factor"] is not None:
        facts.append(("penalty", f"factor {s['factor']:g}, {s['level']} level, {s['optimizer']}"))
    facts += [
        ("seed", str(s["seed"])),
        ("time", ", ".join(f"{k} {v:.0f} s" for k, v in s["seconds"].items())),
        ("peak memory of a rank", f"{s['peak_memory_gib']:.2f} GiB"),
        ("versions", ", ".join(f"{k} {v}" for k, v in s["versions"].items())),
        ("git commit", str(s["git_commit"])),
        ("data SHA-256", s["data_checksum"]),
        ("weights SHA-256", s["weights_checksum"]),
    ]
    return facts


def template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader, autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True
    ).get_template(name)
