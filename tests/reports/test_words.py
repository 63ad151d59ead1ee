"""Metrics in words, and axes without impossible ticks."""

from __future__ import annotations

import pytest

from dcft_dist.reports.pictures import loss_curves, metric_curves
from dcft_dist.reports.words import name_of, unit_of

from .test_outcome import rows, summary


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
