"""Writes `report.html` of a run, one self-contained file, from the files in its run directory."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..config.schema import Config
from ..errors import counted
from ..files import objects_in, write_atomic
from ..method.fundamental_set import FundamentalSet
from .about import FEW, classes_of, config_of, rates_in_vain, settings_of, task_of
from .interpolation import plane_picture
from .outcome import reached
from .pictures import loss_curves, metric_curves, movement_curves, removal_bars, share_picture
from .render import png, results_of, summary_of, template, what_it_is


def write_report(run: Path, pictures: Path | None = None, wrong: Sequence[tuple[str, str, Any]] = ()) -> Path:
    """Writes `report.html` into the directory of a finished run.

    Args:
        run: the run directory.
        pictures: a folder for the pictures as PNG files; None: the pictures are in the report only.
        wrong: examples that went wrong: (verdict, text or path, picture [height, width, 3] in uint8 or None) of each.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: the directory contains no finished run.
    """
    summary, images = summary_of(run), []
    for slug, title, caption, figure in _pictures(run, summary):
        data = png(figure)
        images.append((title, caption, base64.b64encode(data).decode()))
        if pictures:
            write_atomic(pictures / f"{slug}.png", data)
    path, config = run / "report.html", config_of(run)
    write_atomic(
        path,
        template("report.html").render(
            summary=summary,
            what=what_it_is(summary),
            reached=outcome_of(run, summary, config),
            about=task_of(summary, config),
            classes=(classes := classes_of(run, summary, config)),
            often_missed=any(right != "-" and float(right) < 0.5 for _, _, right, _ in classes),
            few=FEW,
            results=results_of(summary),
            facts=[*settings_of(config), *_facts(summary)],
            pictures=images,
            wrong=[(verdict, source, "" if drawn is None else _encoded(drawn)) for verdict, source, drawn in wrong],
        ),
    )
    return path


def _encoded(pixels: Any) -> str:
    """A picture as the text of a PNG file, in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def outcome_of(run: Path, summary: dict[str, Any], config: Config | None, tested: bool = True) -> list[str]:
    """The sentences of `reached`, from the files of a run; none for an interpolation, which has a table.

    Args:
        run: the run directory.
        summary: of the run.
        config: of the run; None: without learning rates and commands.
        tested: see `reached`.
    """
    if "interpolation" in summary:
        return []
    rows = objects_in(run / "metrics.jsonl", "step")
    if config is None:
        return reached(summary, rows, tested=tested)
    return reached(summary, rows, config.optimizer.lr, run, rates_in_vain(run, config), tested)


def _pictures(run: Path, summary: dict[str, Any]) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of each picture for which the run has data."""
    if "interpolation" in summary:
        caption = (
            "Each place between start and end of the training: the share of its way that the set goes, and that all other "
            "weights go. Circles: the chosen places, on validation data. Right: one share for all, with as many candidates."
        )
        rows = objects_in(run / "plane.jsonl", "family", "on_set", "on_rest", "metrics")
        figure = plane_picture(rows, summary["interpolation"])
        yield "plane", "Interpolation by set", caption, figure
        return
    rows = objects_in(run / "metrics.jsonl", "step")
    yield "loss", "Loss", "Training loss of each logged step, validation loss of each epoch.", loss_curves(rows)
    caption = "Epoch 0 is the warmed-up head on the frozen body. The marked epoch was tested."
    yield "metrics", "Validation metrics", caption, metric_curves(rows, summary)
    if (run / "fundamental.safetensors").exists():
        chosen = FundamentalSet.load(run / "fundamental.safetensors")
        caption = "Share of each weight matrix that is fundamental: its weights to which the task is most sensitive."
        yield "share", "Where the fundamental weights are", caption, share_picture(chosen)
        caption = "Root mean square change of an eligible weight."
        yield "movement", "Movement from the pre-trained weights", caption, movement_curves(rows)
    if summary["removal"]:
        caption = "Validation with sets of weights set to zero. Dashed: chance. Solid grey: nothing removed."
        yield "removal", "Removal check", caption, removal_bars(summary["removal"])


def _facts(s: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("method", s["method"]),
        ("engine", f"{s['engine']}, {counted(s['ranks'], 'rank')} ({s['device']})"),
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
    if s.get("changes"):
        facts.append(("changed between starts", "; ".join(s["changes"])))
    return facts
