"""Helpers for all reports: templates, pictures as PNG, and a run's summary as text."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ..errors import DamagedError, DataError
from ..files import read_json
from .words import chosen_by, name_of, shown_metrics

# Keys of a summary that a report shows.
_KEYS = ("name", "method", "engine", "ranks", "validation", "test", "seconds", "removal", "caveat", "splits", "optimizer")


def shown_value(metrics: dict[str, float] | None, key: str) -> str:
    """A metric as reports print it: `"not tested"` without metrics, `"-"` if this metric is missing."""
    if metrics is None:
        return "not tested"
    return f"{metrics[key]:.3f}" if key in metrics else "-"


def summary_of(run: Path) -> dict[str, Any]:
    """Reads `summary.json` of a finished run.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        summary: dict[str, Any] = read_json(run / "summary.json", *_KEYS)
    except OSError as error:
        raise DataError(f"{run} contains no finished run: its summary.json is missing or unreadable") from error
    except DamagedError as error:
        raise DataError(f"{error}: delete it and start the run again, which makes it again") from error
    return summary


def results_of(s: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of results: (metric, validation, test, 95 % interval of the test) for each metric, all as text.

    The first row is the first of `shown_metrics`; rows of further test data follow.

    Args:
        s: the summary of a run.
    """
    first, intervals = shown_metrics(s["validation"])[0], s.get("test_intervals") or {}
    names = sorted(s["validation"], key=lambda name: name != first)
    ranges = {name: f"{low:.3f} to {high:.3f}" for name, (low, high) in intervals.items()}
    rows = [
        (name_of(name), shown_value(s["validation"], name), shown_value(s["test"], name), ranges.get(name, ""))
        for name in names
    ]
    for test, found in (s.get("external") or {}).items():
        low_high = (found["test_intervals"] or {}).get(first)
        shown = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else ""
        rows.append((f"{name_of(first)}, {test}", "", shown_value(found["test"], first), shown))
    return rows


def what_it_is(summary: dict[str, Any]) -> str:
    """A sentence for a run in which fine-tuning improved nothing: its model is the linear probe. Empty for others.

    Args:
        summary: of a run, the content of its `summary.json`.
    """
    if summary["best_epoch"] > 0 or summary["method"] == "linear_probe":
        return ""
    chooses = name_of(chosen_by(summary))
    return (
        f"By the {chooses} on the validation data no epoch of fine-tuning was better than epoch 0. So this model is the "
        "linear probe: the pre-trained weights with the warmed-up head."
    )


def test_line(summary: dict[str, Any]) -> str:
    """The first test metrics of a run, a line for each set of test data, with 95 % intervals if there are any.

    Args:
        summary: of a run, the content of its `summary.json`. Without a test the text is empty.
    """
    lines = []
    for test, found in {"": summary, **(summary.get("external") or {})}.items():
        intervals = found.get("test_intervals") or {}
        parts = []
        for name, value in list((found.get("test") or {}).items())[:3]:
            low_high = intervals.get(name)
            parts.append(f"{name} {value:.4g}" + (f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""))
        if parts:
            lines.append(f"test{f' {test}' if test else ''}, epoch {summary['best_epoch']}: {', '.join(parts)}")
    return "\n".join(lines)


def template(name: str) -> jinja2.Template:
    """Loads a file of `templates/`. Values are escaped in HTML templates only."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True)
    environment.filters["with_code"] = _with_code
    return environment.get_template(name)


def _with_code(text: str) -> Markup:
    """HTML of a text, with what stands between backquotes as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
