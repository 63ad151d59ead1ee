"""A step that is captured in a CUDA graph: the penalty reads nothing there. On a GPU: `tests/test_gpu.py` captures one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcft_dist import attach_penalty, score_importance, select_fundamental
from dcft_dist.errors import PenaltyError
from dcft_dist.method import penalty, penalty_watch, shard_table, step_checks

from ..nets import HEAD, loss_fn, make_batches, make_net, make_optimizer
from ..train.test_no_reads import READS

LEVELS = [("update", "after", "adamw"), ("gradient", "after", "momentum"), ("gradient", "before", "momentum")]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Append True, and from then on a CUDA graph seems to be captured: the package may read nothing."""
    begun: list[bool] = []
    for module in (penalty, penalty_watch, shard_table, step_checks):
        monkeypatch.setattr(module, "is_capturing", lambda: bool(begun))

    def refused(method: Any) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            assert not (begun and "dcft_dist" in caller.parts), f"{caller.name} reads from the device"
            return method(self, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(Tensor, name, refused(getattr(Tensor, name)))
    return begun


def trained(level: str, where: str, name: str, capture: list[bool], captured_from: int = 99) -> dict[str, Tensor]:
    net = make_net()
    scores = score_importance(net, make_batches(4, 8, torch.float32), loss_fn, head=HEAD)
    optimizer = make_optimizer(name, net.parameters())
    attached = attach_penalty(net, select_fundamental(scores), 0.1, optimizer=optimizer, level=level, where=where)  # type: ignore[arg-type]
    for step, batch in enumerate(make_batches(10, 8, torch.float32)):
        if step == captured_from:
            capture.append(True)
        attached.set_factor(0.1 * step)
        optimizer.zero_grad()
        loss_fn(net, batch).backward()
        optimizer.step()
    capture.clear()
    assert attached.in_force() != attached.in_force()  # nothing was watched, and nothing is wrong
    return {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize(("level", "where", "name"), LEVELS)
def test_captured_steps_read_nothing(level: str, where: str, name: str, capture: list[bool]) -> None:
    """Steps 4, 6 and 8 would be tried and read from otherwise."""
    plain = trained(level, where, name, capture)
    for n, value in trained(level, where, name, capture, captured_from=3).items():
        assert torch.equal(value, plain[n]), n


def test_a_capture_needs_a_step_before(capture: list[bool]) -> None:
    with pytest.raises(PenaltyError, match="is checked, so make one before you capture"):
        trained(*LEVELS[0], capture, captured_from=0)


def test_what_is_captured_cannot_be_measured(capture: list[bool]) -> None:
    net = make_net()
    scores = score_importance(net, make_batches(4, 8, torch.float32), loss_fn, head=HEAD)
    optimizer = make_optimizer("momentum", net.parameters())
    attached = attach_penalty(net, select_fundamental(scores), 0.1, optimizer=optimizer, level="update")
    loss_fn(net, make_batches(1, 8, torch.float32)[0]).backward()
    optimizer.step()
    attached.watch = True
    capture.append(True)
    with pytest.raises(PenaltyError, match="cannot be measured: set watch to False"):
        optimizer.step()
