"""One rank is killed, ended or suspended in any phase: the other says so, and the next start ends with the same bits."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dcft_dist.runs.status import status

from ..processes import finish
from ..train.test_run import encoder, start, tiny, train, wait_for_phase, write_tiny
from .harness import PHASES, same_result, strike

__all__ = ["encoder", "tiny"]


@pytest.fixture(scope="session")
def undisturbed(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(write_tiny(folder, encoder), folder)


@pytest.mark.parametrize(("action", "first"), [("kill", 0), ("terminate", 1)])
def test_a_rank_that_ends_in_any_phase(
    action: str, first: int, tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """Nine starts, each cut off in another phase. One action hits one rank in a phase, the other action the other."""
    struck = []
    for number, phase in enumerate(PHASES):
        found = strike(tiny, tmp_path, phase, action, (first + number) % 2)
        if found is None:
            continue
        seconds, results = found
        struck.append((phase, round(seconds, 1)))
        code, said = results[1 - (first + number) % 2]
        assert seconds < 30 and "Traceback" not in said, said
        assert code == 0 or (code == 1 and "dcft: error: rank " in said), (code, said)
    print(action, struck)
    assert len(struck) >= 8
    assert same_result(train(tiny, tmp_path, "--max_attempts", "99"), undisturbed)


def test_ranks_that_are_suspended_for_a_moment(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    processes = start(tiny, tmp_path)
    for number, phase in enumerate(PHASES):
        if wait_for_phase(tmp_path / "tiny", phase, processes):
            processes[number % 2].send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            processes[number % 2].send_signal(signal.SIGCONT)
    assert [code for code, _ in finish(processes)] == [0, 0]
    assert same_result(train(tiny, tmp_path), undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_suspended_for_good(rank: int, tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The other one waits `timeout_s`, says who is missing, and ends; so does the suspended one once it wakes up."""
    found = strike(tiny, tmp_path, "train", "suspend", rank, "--timeout_s", "4")
    assert found is not None
    seconds, results = found
    assert seconds < 25 and results[1 - rank][0] == 1
    assert f"rank {rank}" in results[1 - rank][1] or "does not answer" in results[1 - rank][1]
    assert all("Traceback" not in said for _, said in results)
    assert "last failure: rank" in status(tmp_path / "tiny")
    assert same_result(train(tiny, tmp_path, "--max_attempts", "99"), undisturbed)


def test_a_slow_rank_is_waited_for(tiny: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Two seconds behind at a step, with a time limit of four."""
    processes = start(tiny, tmp_path, "--timeout_s", "4")
    assert wait_for_phase(tmp_path / "tiny", "train", processes)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(2)
    processes[1].send_signal(signal.SIGCONT)
    assert [code for code, _ in finish(processes)] == [0, 0]
    assert same_result(train(tiny, tmp_path), undisturbed)


def test_a_killed_run_is_not_said_to_live(tiny: Path, tmp_path: Path) -> None:
    processes = start(tiny, tmp_path)
    assert wait_for_phase(tmp_path / "tiny", "train", processes)
    assert "tiny: train" in status(tmp_path / "tiny")
    for process in processes:
        process.kill()
    finish(processes)
    said = status(tmp_path / "tiny")
    assert "tiny: not running; it was interrupted in the phase " in said
    assert f"to go on: the same command again, such as dcft train {tmp_path / 'tiny'}/config.toml" in said
