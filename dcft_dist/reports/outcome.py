"""Sentences that say what a run has reached, how sure that is, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Collection
from math import isclose
from pathlib import Path
from typing import Any

from ..objectives.base import oriented
from .words import chosen_by, name_of, shown_metrics

# By the sign test: where nothing gets worse, five of five are better by chance with a probability of 0.06 (two-sided).
_BY_CHANCE = 6
_COARSE = 100  # validation examples, below which one counts more than a point of accuracy
_ENOUGH = 3  # learning rates, after which a report proposes no further one


def reached(
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    rate: float | None = None,
    place: Path | None = None,
    tried: Collection[float] = (),
    tested: bool = True,
) -> list[str]:
    """Sentences for the top of a run's report: what fine-tuning has changed, how sure that is, and what to do next.

    Commands stand between backquotes.

    Args:
        summary: of the run, the content of its `summary.json`.
        rows: of `metrics.jsonl`.
        rate: the learning rate; None: not known.
        place: the run's folder, for the commands that come next.
        tried: learning rates of other runs on the same data in which no epoch was better than the first either.
        tested: whether there is a sentence on the test.
    """
    test = [_tested(summary)] if tested else []
    return [*_changed(summary, rows), *test, f"Next: {_next_step(summary, rows, rate, place, tried)}"]


def _changed(summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """From which value of the metric that chooses the epoch to which, and how finely it is measured; none for a probe."""
    metric, best = chosen_by(summary), summary["best_epoch"]
    of_epochs = _over_epochs(rows, metric)
    start, end = of_epochs.get(0), summary["validation"].get(metric)
    if start is None or end is None or summary["method"] == "linear_probe":
        return []
    verb = "improved" if oriented(metric, end) > oriented(metric, start) else "did not improve"
    sentences = [f"Fine-tuning {verb} the {name_of(metric)} on the validation data: {_from_to(summary, start, end)}"]
    shown = shown_metrics(summary["validation"])[0]
    before, after = _over_epochs(rows, shown).get(0), summary["validation"][shown]
    if shown != metric and best > 0 and before is not None and before != after:
        sentences.append(f"The {name_of(shown)} {'rose' if after > before else 'fell'}, from {before:.3f} to {after:.3f}.")
    if equal := [epoch for epoch, value in of_epochs.items() if value == end and epoch > best]:
        many = len(equal) > 1
        numbers = f"{', '.join(map(str, equal[:-1]))} and {equal[-1]}" if many else str(equal[-1])
        sentences.append(f"Epoch{'s' * many} {numbers} equalled it; of equal ones the first is kept.")
    if metric == "accuracy" and (number := summary["splits"].get("validation", [0])[0]):
        more = round(number * (end - start))
        if 0 < more < _BY_CHANCE:
            sentences.append(f"That is {more} of {number} examples more, which may be chance.")
        elif number < _COARSE:
            sentences.append(f"With {number} validation examples, one of them counts {100 / number:.1f} points.")
    if (lower := _lower_loss(summary, rows)) is not None:
        losses = _over_epochs(rows, "loss")
        sentences.append(f"The validation loss did improve: {losses[0]:.3f}, and {losses[lower]:.3f} at epoch {lower}.")
    return [" ".join(sentences)]


def _over_epochs(rows: list[dict[str, Any]], metric: str) -> dict[int, float]:
    key = f"validation/{metric}"
    return {int(row["train/epoch"]): row[key] for row in rows if row.keys() >= {key, "train/epoch"}}


def _lower_loss(summary: dict[str, Any], rows: list[dict[str, Any]]) -> int | None:
    """The epoch with the lowest validation loss, if another metric has chosen epoch 0 in spite of it."""
    losses = _over_epochs(rows, "loss")
    if summary["best_epoch"] > 0 or chosen_by(summary) == "loss" or 0 not in losses:
        return None
    lowest = min(losses, key=lambda epoch: losses[epoch])
    return lowest if losses[lowest] < losses[0] else None


def _from_to(summary: dict[str, Any], start: float, end: float) -> str:
    answers = "perplexity" in summary["validation"]  # a model of answers has no new head
    if summary["best_epoch"] > 0:
        before = "before it" if answers else "with the new head alone"
        return f"{start:.3f} {before}, {end:.3f} at epoch {summary['best_epoch']}."
    if answers:
        return f"no epoch was better than the model before it, {start:.3f}. So this is that model."
    return (
        f"no epoch was better than the new head alone, {start:.3f}. So this model is the linear probe: the pre-trained "
        "weights with the warmed-up head."
    )


def _tested(summary: dict[str, Any]) -> str:
    metric = chosen_by(summary)
    value, where = (summary.get("test") or {}).get(metric), f"On the {summary['splits']['test'][0]:,} test examples it is"
    if value is None:
        return "It was not tested."
    if interval := (summary.get("test_intervals") or {}).get(metric):
        low, high = interval
        return f"{where} {value:.3f}; its 95 % interval is {low:.3f} to {high:.3f}."
    return f"{where} {value:.3f}, without an interval."


def _next_step(
    summary: dict[str, Any], rows: list[dict[str, Any]], rate: float | None, place: Path | None, tried: Collection[float]
) -> str:
    if summary["method"] == "linear_probe":
        return 'fine-tune the whole model (method = "full" or "dcft"), and see whether that is better.'
    if summary["best_epoch"] == 0:
        return _if_nothing_improved(summary, rows, rate, place, tried)
    why = "whether the selected weights helped, one run cannot say. " if summary["method"] == "dcft" else ""
    how = "with other methods, over several seeds (--method full --seed 1)"
    if place and "accuracy" in summary["validation"]:  # studies compare accuracies
        file, minutes = f"{summary['name']}_study.toml", sum(summary["seconds"].values()) / 60
        how = f"methods over seeds: `dcft init {file} --study {place}`, then `dcft compare {file} --count`. It counts the "
        how += f"trainings; each takes about as long as this run, {minutes:.1f} minutes"
    return f"{why}{'Compare' if why else 'compare'} {how}."


def _if_nothing_improved(
    summary: dict[str, Any], rows: list[dict[str, Any]], rate: float | None, place: Path | None, tried: Collection[float]
) -> str:
    """Another metric or another learning rate, as a command; or an end, where those have been tried."""
    if rate is None:
        return "other learning rates (optimizer.lr), smaller and larger ones; choose on the validation data."
    name = re.sub(r"_(loss|lr[\d.e-]+)$", "", summary["name"])
    train = f"dcft train {place or 'RUN'}/config.toml"
    runs = place.parent if place else "runs"
    if _lower_loss(summary, rows) is not None:
        return (
            "let the loss choose the epoch; it also counts how sure the model is. "
            f"`{train} --train.metric loss --name {name}_loss`, then `dcft table {runs}`."
        )
    losses = _over_epochs(rows, "loss")
    smaller = len(losses) > 1 and losses.get(1, 0.0) > losses[0]
    other = rate / 4 if smaller else 2 * rate
    rates = sorted({rate, *tried})
    if len(rates) >= _ENOUGH or any(isclose(other, one, rel_tol=0.01) for one in tried):
        return (
            f"learning rates from {rates[0]:g} to {rates[-1]:g} were no better than the new head alone. Keep it, or get "
            "more examples."
        )
    return (
        f"a {'smaller' if smaller else 'larger'} learning rate than {rate:g}. "
        f"`{train} --optimizer.lr {other:g} --name {name}_lr{other:g}`, then `dcft table {runs}`; choose on the "
        "validation data."
    )
