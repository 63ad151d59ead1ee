"""What a run's report and its terminal say first: what has changed, how sure that is, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcft_dist.config.schema import Config
from dcft_dist.config.toml import load_config, to_toml
from dcft_dist.files import write_json
from dcft_dist.reports.about import rates_in_vain
from dcft_dist.reports.outcome import reached
from dcft_dist.reports.render import template, what_it_is


def rows(*values: float, metric: str = "accuracy") -> list[dict[str, Any]]:
    return [{"step": 10 * i, "train/epoch": float(i), f"validation/{metric}": v} for i, v in enumerate(values)]


def summary(end: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    found = {"method": "dcft", "best_epoch": 2, "validation": {metric: end, "macro_f1": 0.5}, "test": {metric: 0.71}}
    found |= {"metric": metric, "seconds": {"train": 90.0}, "splits": {"test": [2040, 289]}}
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
        "Compare methods over seeds: `dcft init mine_study.toml --study runs/mine`, then `dcft compare mine_study.toml "
        "--count`. It counts the trainings; each takes about as long as this run, 1.5 minutes."
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
        "Next: a smaller learning rate than 0.0002. `dcft train RUN/config.toml --optimizer.lr 5e-05 --name mine_lr5e-05`, "
        "then `dcft table runs`; choose on the validation data."
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
    assert reached(found, rows(0.61, 0.68, 0.72), tested=False) == [first, following] and "test examples" in tested


def test_a_loss_that_improves_is_the_next_thing_to_choose_by() -> None:
    """One of few examples counts several points, so that the accuracy cannot tell epochs apart which the loss can."""
    losses = (0.379, 0.242, 0.289)
    found = [{**row, "validation/loss": loss} for row, loss in zip(rows(0.93, 0.93, 0.89), losses, strict=True)]
    few = summary(0.93, best_epoch=0, name="mine_lr5e-06") | {"splits": {"validation": [28, 10], "test": [38, 9]}}
    first, _, following = reached(few, found, 2e-5, Path("runs/mine_lr5e-06"))
    assert first.endswith(
        "the first is kept. With 28 validation examples, one of them counts 3.6 points. "
        "The validation loss did improve: 0.379, and 0.242 at epoch 1."
    )
    assert following.startswith("Next: let the loss choose the epoch; it also counts how sure the model is. `dcft train")
    assert "runs/mine_lr5e-06/config.toml --train.metric loss --name mine_loss`" in following
    *_, following = reached(few | {"metric": "loss"}, found, 2e-5)
    assert "--train.metric" not in following
    first, *_ = reached(few | {"splits": {"validation": [100, 50], "test": [38, 9]}}, found, 2e-5)
    assert "counts" not in first


@pytest.mark.parametrize(("more", "chance"), [(1, True), (5, True), (6, False), (0, False), (-2, False)])
def test_a_gain_of_few_examples_may_be_chance(more: int, chance: bool) -> None:
    """Fewer than six examples more are no evidence, even if none was better before."""
    sizes = {"validation": [200, 50], "test": [38, 9]}
    first, *_ = reached(summary(0.8 + more / 200, best_epoch=1) | {"splits": sizes}, rows(0.8, 0.8 + more / 200))
    assert first.endswith(f"That is {more} of 200 examples more, which may be chance.") == chance
    assert ("chance" in first) == chance


def test_a_model_chosen_by_the_loss_may_be_less_accurate() -> None:
    found = [{**row, "validation/loss": loss} for row, loss in zip(rows(0.929, 0.857), (0.379, 0.242), strict=True)]
    lower = summary(0.857, best_epoch=1) | {"metric": "loss", "validation": {"accuracy": 0.857, "loss": 0.242}}
    first, *_ = reached(lower, found)
    assert first == (
        "Fine-tuning improved the loss on the validation data: 0.379 with the new head alone, 0.242 at epoch 1. "
        "The accuracy fell, from 0.929 to 0.857."
    )


def test_advice_ends(tmp_path: Path) -> None:
    """Rates that other runs have tried on the same data are not proposed again, and after three of them none is."""
    losses = [{**row, "validation/loss": loss} for row, loss in zip(rows(0.6, 0.5), (0.5, 0.9), strict=True)]
    found = summary(0.6, best_epoch=0, name="mine_lr5e-06")
    *_, following = reached(found, losses, 2e-5, tried=[8e-5])
    assert "--optimizer.lr 5e-06 --name mine_lr5e-06`" in following
    for tried in ([5e-6], [8e-5, 1e-4]):
        *_, following = reached(found, losses, 2e-5, tried=tried)
        low, high = min(2e-5, *tried), max(2e-5, *tried)
        assert following.startswith(f"Next: learning rates from {low:g} to {high:g} were no better than the new head alone.")
    own = ["--task.name", "own", "--model.name", "own", "--data.path", "x", "--data.modality", "image"]
    own += ["--data.format", "image_folder", "--model.build", "a:b"]

    def run(name: str, *words: str, best: int = 0) -> Config:
        config = load_config("smoke.toml", [*own, *words, "--name", name])
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(to_toml(config))
        write_json(tmp_path / name / "summary.json", {"best_epoch": best})
        return config

    mine = run("mine", "--optimizer.lr", "2e-5")
    run("same", "--optimizer.lr", "5e-6")
    run("good", "--optimizer.lr", "1e-6", best=3)
    run("other", "--optimizer.lr", "7e-6", "--data.path", "y")
    run("torn", "--optimizer.lr", "8e-6")
    (tmp_path / "torn/summary.json").write_text("{")
    assert rates_in_vain(tmp_path / "mine", mine) == [5e-6]


def test_commands_are_code_in_the_report() -> None:
    found = summary(0.72, name="mine")
    *_, following = reached(found, rows(0.61, 0.72), 2e-5, Path("runs/<b>"))
    page = template("report.html").render(summary=found | {"caveat": ""}, reached=[following])
    assert "<code>dcft init mine_study.toml --study runs/&lt;b&gt;</code>, then" in page
