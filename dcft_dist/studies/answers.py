"""What a study says to someone who has to decide, in sentences: did it help, by how much, how sure, and what to do next."""

from __future__ import annotations

import numpy as np

from .bootstrap import estimate
from .table import ArmResult, Difference, SettingResult

_WORDS = {
    "supported": "{arm} is better than {minus} here",
    "not supported": "{arm} is not better than {minus} here",
    "undecided": "Undecided whether {arm} is better than {minus} here",
}


def answers(result: SettingResult) -> list[str]:
    """Sentences for the top of a study's report.

    Args:
        result: of one setting.

    Returns:
        Of each deciding contrast what it says, with its interval, and the next step. Then which arms are the most accurate.
    """
    texts = [
        text for difference in result.differences if difference.contrast.deciding for text in _decision(difference, result)
    ]
    if not any(difference.contrast.deciding for difference in result.differences):
        texts.append("No contrast decides on these data: those below describe.")
    tested = [arm for arm in result.arms if arm.accuracy]
    if tested:
        best = max(tested, key=lambda arm: arm.accuracy.mean if arm.accuracy else 0.0)
        close = [arm.arm for arm in tested if arm is not best and _reaches_zero(best, arm, result)]
        texts.append(
            f"{best.arm} has the highest mean, {100 * best.accuracy.mean:.1f} %"  # type: ignore[union-attr]
            + (f"; the study does not separate it from: {', '.join(close)}." if close else "; every other arm is lower.")
        )
    return texts


def _decision(difference: Difference, result: SettingResult) -> list[str]:
    contrast, value = difference.contrast, difference.value
    names = {"arm": contrast.arm, "minus": contrast.minus}
    if value is None:
        return [f"{_WORDS['undecided'].format(**names)}: they have fewer than two seeds in common.", "Next: run more seeds."]
    low, high = 100 * value.low, 100 * value.high
    says = (
        f"{_WORDS[difference.verdict].format(**names)}: {100 * value.mean:+.2f} points of test accuracy, 95 % interval "
        f"{low:+.2f} to {high:+.2f}, over {value.num_seeds} seeds and {result.num_examples} examples."
    )
    return [says, f"Next: {_next_step(difference, result)}"]


def _next_step(difference: Difference, result: SettingResult) -> str:
    contrast, controls = difference.contrast, [d for d in result.differences if not d.contrast.deciding]
    diverged = [arm.arm for arm in result.arms if arm.diverged and arm.arm in (contrast.arm, contrast.minus)]
    if diverged:
        return f"runs of {', '.join(diverged)} diverged; lower their learning rate, and run the study again."
    if difference.verdict == "supported":
        compared = f"see below whether {contrast.arm} also beats its controls" if controls else "add controls as contrasts"
        return f"{compared}, then try another data set."
    if difference.verdict == "not supported":
        return (
            f"nothing here speaks for {contrast.arm} over {contrast.minus}. Use what is simpler, or tune {contrast.arm} "
            "over more values and test it on fresh seeds."
        )
    return f"more seeds or more test examples. Until then nothing speaks for {contrast.arm}."


def _reaches_zero(best: ArmResult, other: ArmResult, result: SettingResult) -> bool:
    """Whether the interval of the difference between the two arms reaches 0, or cannot be computed."""
    seeds = sorted(best.correct.keys() & other.correct.keys())
    if len(seeds) < 2:
        return True
    return estimate(np.stack([best.correct[s] - other.correct[s] for s in seeds]), result.groups).low <= 0
