"""What all reports share: templates, pictures as PNG, and a run's summary in words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from ..errors import DataError
from ..files import read_json
from .pictures import shown_metrics


def shown_value(metrics: dict[str, float] | None, key: str) -> str:
    if metrics is None:
        return "not tested"
    return f"{metrics[key]:.3f}" if key in metrics else "-"


def summary_of(run: Path) -> dict[str, Any]:
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
    return [(name, shown_value(s["validation"], name), shown_value(s["test"], name), ends.get(name, "")) for name in names]


def template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader, autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
