"""Collectives that fail say which rank is missing, in time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dcft_dist.distributed import collectives, progress
from dcft_dist.distributed.world import record_collectives
from dcft_dist.errors import DcftError, EngineError, WorldError

from ..ranks import run_ranks

LATE = f"rank 1 on {socket.gethostname()} has not arrived (its last report: reading a slow disk)"


def one_rank_is_late() -> str:
    collectives.all_reduce(torch.zeros(1), what="warm-up of the test")
    if dist.get_rank() == 1:
        progress.arrive("reading a slow disk")
        time.sleep(6)
        return ""
    with pytest.raises(WorldError) as error:
        progress.arrive("step 1")
        collectives.all_reduce(torch.zeros(1), what="sum of losses")
    return str(error.value)


def test_a_late_rank_is_named_after_the_timeout() -> None:
    started = time.monotonic()
    message = run_ranks(2, one_rank_is_late, timeout_s=3, breaks=True)[0]
    assert time.monotonic() - started < 15
    expected = f"rank 0: sum of losses failed: {LATE}"
    assert message.startswith(expected), message


def one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def test_the_tests_say_how_a_rank_died() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1:\ndied with exit code -11.*in one_rank_dies"):
        run_ranks(2, one_rank_dies)


def named() -> str:
    collectives.all_reduce(torch.zeros(1), what="start")
    if dist.get_rank() == 1:
        progress.arrive("reading a slow disk")
        dist.barrier()
        return ""
    dist.barrier()
    progress.arrive("step 1")
    progress.arrive("step 2")
    return progress.missing_ranks()


def who_writes_notes() -> tuple[set[str], bool]:
    """Names of the threads that used the store while this rank went on, and whether the last note got there."""
    store, used = progress.default_store(), set[str]()

    def seen_store() -> object:
        used.add(threading.current_thread().name)
        return store

    progress.default_store = seen_store
    for step in range(1000):
        progress.arrive(f"training step {step}")
    key, until = f"dcft_dist/progress/{dist.get_rank()}", time.monotonic() + 20
    while not (store.check([key]) and store.get(key).endswith(b"training step 999")) and time.monotonic() < until:
        time.sleep(0.05)
    dist.barrier()
    return used, time.monotonic() < until


def test_a_step_does_not_wait_for_the_store() -> None:
    """A rank only notes what it has reached; another thread writes the latest note."""
    assert run_ranks(2, who_writes_notes) == [({"dcft_dist: progress"}, True)] * 2


def test_the_flight_recorder_writes_into_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCH_FR_", "TORCH_NCCL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "77")  # what the user has chosen stays
    record_collectives(tmp_path)
    found = {name: os.environ[name] for name in os.environ if name.startswith(("TORCH_FR_", "TORCH_NCCL_"))}
    for name in set(found) - {"TORCH_FR_BUFFER_SIZE"}:
        del os.environ[name]
    assert found == {
        "TORCH_FR_BUFFER_SIZE": "77",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/nccl_trace_rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/nccl_trace_rank_",
    }


def error_of_one_rank() -> str:
    with pytest.raises(DcftError) as error, collectives.agreed("reading a file"):
        if dist.get_rank() == 1:
            raise WorldError("disk on fire: é")
    return str(error.value)


def test_messages() -> None:
    assert run_ranks(2, named)[0] == LATE
    assert run_ranks(2, error_of_one_rank) == ["rank 1: disk on fire: é", "disk on fire: é"]


def references_after_reductions() -> int:
    return sum(still_held() for _ in range(500))


def still_held() -> bool:
    tensor = torch.zeros(1)
    before = sys.getrefcount(tensor)
    collectives.all_reduce(tensor, what="sum")
    return sys.getrefcount(tensor) > before


def test_no_reduction_is_left_to_threads_that_outlive_the_interpreter() -> None:
    """Else the process may abort at its exit, after all was done."""
    assert run_ranks(2, references_after_reductions) == [0, 0]


def test_what_arises_while_a_lost_rank_is_cleaned_up_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that lost a rank leaves a module half gathered; the engine then complains. The cause is the lost rank."""
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "missing_ranks", lambda: "rank 1 does not answer")
    said = r"training failed: rank 1 does not answer \[\[gloo\] Connection reset by peer\]"
    with pytest.raises(WorldError, match=said), collectives.explained("training"):
        try:
            raise RuntimeError("[gloo] Connection reset by peer")
        finally:
            raise EngineError("these weights are outside every fully_shard group")
    with pytest.raises(EngineError), collectives.explained("training"):  # another error alone stays what it is
        raise EngineError("these weights are outside every fully_shard group")
    with pytest.raises(EngineError), collectives.explained("training"):
        try:
            raise RuntimeError("[gloo] Connection reset by peer")
        except RuntimeError as error:
            raise EngineError("it was looked at, and this is what it means") from error
