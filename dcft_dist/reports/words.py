"""What reports call a metric, and sentences that say what a run has reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..objectives.base import LOWER_IS_BETTER, oriented

_NAMES = {
    "accuracy": "accuracy",
    "label_accuracy": "accuracy of single findings",
    "balanced_accuracy": "balanced accuracy",
    "token_accuracy": "accuracy of tokens",
    "macro_f1": "macro-averaged F1",
    "auroc": "area under the ROC curve",
    "auprc": "area under the precision-recall curve",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "quadratic_kappa": "quadratic kappa",
    "hd95": "Hausdorff distance, 95th percentile",
    "dice": "Dice",
    "exact": "answers that are right in every token",
}


def name_of(metric: str) -> str:
    """A metric in words; its key if there are none for it.

    Args:
        metric: key of a metric, also of one class (`dice_tumour`).
    """
    for stem in ("dice", "hd95"):
        if metric.startswith(f"{stem}_"):
            return f"{_NAMES[stem]}, {metric.removeprefix(f'{stem}_')}"
    return _NAMES.get(metric, metric)


def unit_of(metric: str) -> str:
    """What the values of a metric are measured in: `share` (0 to 1), or the metric itself.

    Args:
        metric: key of a metric.
    """
    known = metric in _NAMES or metric.startswith("dice_")
    return "share" if known and metric not in {*LOWER_IS_BETTER, "quadratic_kappa"} - {"ece"} else metric


def shown_metrics(metrics: Mapping[str, float]) -> tuple[str, str]:
    """The names of the two metrics that reports show where there is room for two only.

    Args:
        metrics: of a validation or a test.
    """
    preferred = [name for name in ("accuracy", "macro_f1", "dice", "auroc", "mae", "token_accuracy") if name in metrics]
    rest = [name for name in metrics if name not in preferred]
    first, second, *_ = [*preferred, *rest, "loss"]
    return first, second


def chosen_by(summary: dict[str, Any]) -> str:
    """Key of the metric that has chosen the epoch of a run.

    Args:
        summary: of the run; one of an older version does not name it, and has the first of `shown_metrics`.
    """
    return str(summary.get("metric") or shown_metrics(summary["validation"])[0])


def reached(
    summary: dict[str, Any], rows: list[dict[str, Any]], rate: float | None = None, place: Path | None = None
) -> list[str]:
    """Sentences for the top of a run's report: what fine-tuning has changed, how sure that is, and what to do next.

    Args:
        summary: of the run, the content of its `summary.json`.
        rows: of `metrics.jsonl`.
        rate: the learning rate; None: not known.
        place: the run's folder, for the commands that come next.
    """
    return [*_changed(summary, rows), _tested(summary), f"Next: {_next_step(summary, rows, rate, place)}"]


def answer(summary: dict[str, Any], rows: list[dict[str, Any]], rate: float | None = None, place: Path | None = None) -> str:
    """The same for a terminal that shows the test metrics already: what fine-tuning has changed, and what to do next.

    Args and lines as in `reached`.
    """
    return "\n".join([*_changed(summary, rows), f"Next: {_next_step(summary, rows, rate, place)}"])


def _changed(summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """A sentence: from which value of the metric that chooses the epoch to which; none for a linear probe."""
    metric = chosen_by(summary)
    of_epochs = {int(row["train/epoch"]): row[key] for row in rows if (key := f"validation/{metric}") in row}
    start, end = of_epochs.get(0), summary["validation"].get(metric)
    if start is None or end is None or summary["method"] == "linear_probe":
        return []
    verb = "improved" if oriented(metric, end) > oriented(metric, start) else "did not improve"
    equal = [epoch for epoch, value in of_epochs.items() if value == end and epoch > summary["best_epoch"]]
    sentence = f"Fine-tuning {verb} the {name_of(metric)} on the validation data: {_from_to(summary, start, end)}"
    if equal:
        many = len(equal) > 1
        numbers = f"{', '.join(map(str, equal[:-1]))} and {equal[-1]}" if many else str(equal[-1])
        sentence += f" Epoch{'s' * many} {numbers} equalled it; of equal ones the first is kept."
    return [sentence]


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


def _next_step(summary: dict[str, Any], rows: list[dict[str, Any]], rate: float | None, place: Path | None) -> str:
    if summary["method"] == "linear_probe":
        return 'fine-tune the whole model (method = "full" or "dcft"), and see whether that is better.'
    if summary["best_epoch"] == 0:
        if rate is None:
            return "other learning rates (optimizer.lr), smaller and larger ones; choose on the validation data."
        losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
        smaller = len(losses) > 1 and losses[1] > losses[0]
        other = rate / 4 if smaller else 2 * rate
        file = f"{place}/config.toml" if place else "CONFIG"
        return (
            f"a {'smaller' if smaller else 'larger'} learning rate than {rate:g}. "
            f"dcft train {file} --optimizer.lr {other:g} --name {summary['name']}_lr{other:g} "
            "(choose between the two runs on the validation data)."
        )
    why = "whether the selected weights helped, one run cannot say. " if summary["method"] == "dcft" else ""
    how = "with other methods, over several seeds (--method full --seed 1)"
    if place and "accuracy" in summary["validation"]:  # studies compare accuracies
        file = f"{summary['name']}_study.toml"
        how = f"methods over seeds: dcft init {file} --study {place}, then dcft compare {file}"
    return f"{why}{'Compare' if why else 'compare'} {how}."
