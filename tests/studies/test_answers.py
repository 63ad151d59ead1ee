"""What a study's report says first: the decision, how sure it is, and the next step."""

from __future__ import annotations

import numpy as np
import pytest

from dcft_dist.studies.answers import answers
from dcft_dist.studies.bootstrap import contrast_verdict, estimate
from dcft_dist.studies.study import Contrast
from dcft_dist.studies.table import ArmResult, Difference, SettingResult

EXAMPLES = 200


def arm(name: str, right: float, seeds: int = 5, diverged: tuple[int, ...] = ()) -> ArmResult:
    """An arm that is right in the share `right` of the examples, in each seed others."""
    draw = np.random.default_rng(sum(map(ord, name)))
    correct = {seed: (draw.random(EXAMPLES) < right).astype(float) for seed in range(seeds)}
    mean = estimate(np.stack([*correct.values()]), [str(i) for i in range(EXAMPLES)]) if seeds > 1 else None
    return ArmResult(name, None, (), correct, diverged, {}, mean)


def result(one: ArmResult, other: ArmResult, deciding: bool = True) -> SettingResult:
    contrast = Contrast(arm=one.arm, minus=other.arm, deciding=deciding)
    groups, seeds = [str(i) for i in range(EXAMPLES)], sorted(one.correct.keys() & other.correct.keys())
    value = estimate(np.stack([one.correct[s] - other.correct[s] for s in seeds]), groups) if len(seeds) > 1 else None
    verdict = "" if value is None else "undecided" if one.diverged else contrast_verdict(value)
    return SettingResult("tiny", EXAMPLES, groups, [one, other], [Difference(contrast, value, np.array([]), verdict)])


@pytest.mark.parametrize(
    ("one", "other", "decision", "following"),
    [
        (arm("dcft", 0.9), arm("full", 0.6), "dcft is better than full here: +2", "add controls as contrasts, then try"),
        (arm("dcft", 0.6), arm("full", 0.9), "dcft is not better than full here: -", "nothing here speaks for dcft"),
        (
            arm("dcft", 0.7),
            arm("full", 0.69),
            "Undecided whether dcft is better than full here: ",
            "more seeds or more test",
        ),
        (arm("dcft", 0.9, diverged=(7,)), arm("full", 0.6), "Undecided whether", "runs of dcft diverged; lower their"),
        (arm("dcft", 0.9, seeds=1), arm("full", 0.6), "Undecided whether dcft is better", "run more seeds."),
    ],
)
def test_the_decision_comes_first_and_then_the_next_step(
    one: ArmResult, other: ArmResult, decision: str, following: str
) -> None:
    first, second, *rest = answers(result(one, other))
    assert first.startswith(decision) and second.startswith(f"Next: {following}")
    assert len(one.correct) < 2 or (
        first.endswith("over 5 seeds and 200 examples.") and "points of test accuracy, 95 % interval" in first
    )
    assert [text for text in rest if "has the highest mean" in text]


def test_without_a_deciding_contrast_nothing_is_decided() -> None:
    first, *rest = answers(result(arm("dcft", 0.9), arm("full", 0.6), deciding=False))
    assert first.startswith("No contrast decides on these data")
    (best,) = rest
    assert best.startswith(("dcft has the highest mean, 8", "dcft has the highest mean, 9"))
    assert best.endswith("every other arm is lower.")
