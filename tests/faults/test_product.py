"""The full product of phases, actions and ranks, and of files and damages: `tests/run.sh --faults`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ..train.test_run import encoder, tiny, train
from .harness import DAMAGES, PHASES, same_result, strike
from .test_files import FILES, check_file, runs
from .test_kills import undisturbed

__all__ = ["encoder", "runs", "tiny", "undisturbed"]


@pytest.mark.parametrize(("phase", "action", "rank"), itertools.product(PHASES, ("kill", "terminate", "suspend"), (0, 1)))
def test_every_phase_with_every_action(
    phase: str, action: str, rank: int, tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    found = strike(tiny, tmp_path, phase, action, rank, "--timeout_s", "4")
    if found is not None:
        print(phase, action, rank, round(found[0], 2))
        assert all("Traceback" not in said for _, said in found[1]), found
    assert same_result(train(tiny, tmp_path, "--max_attempts", "99"), undisturbed)


@pytest.mark.parametrize(("name", "how"), itertools.product(FILES, DAMAGES))
def test_every_file_with_every_damage(name: str, how: str, runs: dict[str, Any], tmp_path: Path) -> None:
    check_file(name, how, runs, tmp_path)
