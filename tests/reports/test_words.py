"""What a run's report says first, in words, and axes without impossible ticks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcft_dist.reports.pictures import loss_curves, metric_curves
from dcft_dist.reports.render import what_it_is
from dcft_dist.reports.words import answer, name_of, reached, unit_of


def rows(*values: float, metric: str = "accuracy") -> list[dict[str, Any]]:
    return [{"step": 10 * i, "train/epoch": float(i), f"validation/{metric}": v} for i, v in enumerate(values)]


def summary(end: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    found = {"method": "dcft", "best_epoch": 2, "validation": {metric: end, "macro_f1": 0.5}, "test": {metric: 0.71}}
    found |= {"metric": metric, "splits": {"test": [2040, 289]}}
    return found | {"test_intervals": {metric: [0.68, 0.74]}} | more


def test_the_first_sentences_of_a_report() -> None:
    assert reached(summary(0.72), rows(0.61, 0.68, 0.72)) == [
        "Fine-tuning improved the accuracy on the validation data: 0.610 with the new head alone, 0.720 at epoch 2.",
        "On the 2,040 test examples it is 0.710; its 95 % interval is 0.680 to 0.740.",
        "Next: whether the selected weights helped, one run cannot say. Compare with other methods, over several seeds "
        "(--method full --seed 1).",
    ]
    *_, following = reached(summary(0.72, name="mine"), rows(0.61, 0.72), 2e-5, Path("runs/mine"))
    assert following.endswith(
        "Compare methods over seeds: dcft init mine_study.toml --study runs/mine, then dcft compare mine_study.toml."
    )
    first, *_ = reached(summary(8.2, "mae"), rows(7.9, 8.4, 8.2, metric="mae"))
    assert first.startswith("Fine-tuning did not improve the mean absolute error on the validation data: 7.900")
    probe = summary(0.61, method="linear_probe", test=None)
    first, following = reached(probe, rows(0.61))
    assert first == "It was not tested." and following.startswith("Next: fine-tune the whole model")
    full = summary(0.72, method="full", test_intervals=None)
    first, following = reached(full, [])
    assert first == "On the 2,040 test examples it is 0.710, without an interval."
    assert following == "Next: compare with other methods, over several seeds (--method full --seed 1)."
    first, _, following = reached(summary(0.61, best_epoch=0), rows(0.61, 0.6, 0.59))
    assert first.startswith("Fine-tuning did not improve the accuracy on the validation data: no epoch was better than")
    assert "0.610. So this model is the linear probe" in first and following.startswith("Next: other learning rates")
    language = {"perplexity": 9.1}
    first, *_ = reached(summary(9.1, "perplexity", validation=language), rows(9.9, 9.1, metric="perplexity"))
    assert first == "Fine-tuning improved the perplexity on the validation data: 9.900 before it, 9.100 at epoch 2."
    jumped = [{**row, "validation/loss": loss} for row, loss in zip(rows(0.61, 0.6), (0.5, 1.6), strict=True)]
    *_, following = reached(summary(0.61, best_epoch=0, name="mine"), jumped, 2e-4)
    assert following == (
        "Next: a smaller learning rate than 0.0002. dcft train CONFIG --optimizer.lr 5e-05 --name mine_lr5e-05 "
        "(choose between the two runs on the validation data)."
    )
    *_, following = reached(summary(0.61, best_epoch=0, name="mine"), rows(0.61, 0.6), 2e-5)
    assert "a larger learning rate than 2e-05" in following and "--optimizer.lr 4e-05" in following
    *_, following = reached(summary(0.61, best_epoch=0, name="mine"), jumped, 2e-4, Path("runs/mine"))
    assert "dcft train runs/mine/config.toml --optimizer.lr" in following


def test_epochs_that_equal_the_best_are_mentioned() -> None:
    """Then the metric does not tell them apart, although their losses may differ much."""
    first, *_ = reached(summary(0.95, best_epoch=0), rows(0.95, 0.9, 0.95, 0.95))
    assert first.endswith("warmed-up head. Epochs 2 and 3 equalled it; of equal ones the first is kept.")
    first, *_ = reached(summary(0.95, best_epoch=1), rows(0.9, 0.95, 0.95))
    assert first.endswith("0.950 at epoch 1. Epoch 2 equalled it; of equal ones the first is kept.")
    assert "equal" not in reached(summary(0.95, best_epoch=1), rows(0.9, 0.95, 0.94))[0]


def test_the_metric_that_chooses_is_the_one_of_the_sentences() -> None:
    """A run may choose by another metric than the one that reports show first; older runs do not name theirs."""
    by_loss = summary(0.9, best_epoch=0) | {"metric": "loss", "validation": {"accuracy": 0.9, "loss": 0.4}}
    first, *_ = reached(by_loss, rows(0.4, 0.5, metric="loss"))
    assert first.startswith("Fine-tuning did not improve the loss on the validation data: no epoch")
    assert what_it_is(by_loss).startswith("By the loss on the validation data no epoch of fine-tuning was better")
    del by_loss["metric"]
    assert what_it_is(by_loss).startswith("By the accuracy on the validation data")


def test_what_a_terminal_shows_at_the_end() -> None:
    found = summary(0.72, name="mine")
    first, tested, following = reached(found, rows(0.61, 0.68, 0.72))
    assert answer(found, rows(0.61, 0.68, 0.72)).splitlines() == [first, following] and "test examples" in tested


@pytest.mark.parametrize(
    ("metric", "words", "unit"),
    [
        ("ece", "calibration error", "share"),
        ("hd95_tumour", "Hausdorff distance, 95th percentile, tumour", "hd95_tumour"),
        ("dice_tumour", "Dice, tumour", "share"),
        ("quadratic_kappa", "quadratic kappa", "quadratic_kappa"),
        ("loss", "loss", "loss"),
        ("my_own", "my_own", "my_own"),
    ],
)
def test_metrics_in_words(metric: str, words: str, unit: str) -> None:
    assert (name_of(metric), unit_of(metric)) == (words, unit)


def test_axes_have_whole_epochs_and_no_accuracy_above_one() -> None:
    found = [row | {"validation/macro_f1": 0.97, "validation/loss": 0.1} for row in rows(0.90, 1.0, 1.0)]
    figure = metric_curves(found, summary(1.0))
    (axes,) = figure.axes
    assert axes.get_ylim()[1] <= 1.0 and axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "accuracy, macro-averaged F1\n(validation data)"
    figure.canvas.draw()
    low, high = axes.get_xlim()
    assert all(tick == round(tick) for tick in axes.get_xticks() if low <= tick <= high)
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"accuracy", "macro-averaged F1", "tested epoch"}
    (axes,) = loss_curves(found).axes
    assert axes.get_ylabel() == "loss"


def test_metrics_of_two_units_have_axes_of_their_own() -> None:
    found = [row | {"validation/loss": 0.4} for row in rows(0.5, 0.6, metric="dice")]
    figure = metric_curves(found, {"best_epoch": 1, "validation": {"dice": 0.6, "loss": 0.4}})
    assert [axes.get_legend().get_texts()[0].get_text() for axes in figure.axes] == ["Dice", "loss"]
