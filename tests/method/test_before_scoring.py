"""What makes scores useless, or leaves weights out, is said before the scoring is paid for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import score_importance
from dcft_dist.errors import PenaltyError
from dcft_dist.integrations.recipe import Recipe


class Sequences(nn.Module):
    """An embedding and an LSTM, whose matrices are not those of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, 8), nn.LSTM(8, 16, batch_first=True)
        self.mix, self.head = nn.Linear(16, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.lstm(self.embed(ids))[0][:, -1]))
        return out


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.long))


def said(caplog: pytest.LogCaptureFixture, model: nn.Module, batch: Tensor, **options: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        score_importance(model, [batch], loss, head="head" if isinstance(model, Sequences) else "2", **options)
    return caplog.text


def test_matrices_that_are_not_scored_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.arange(12).view(3, 4)
    text = said(caplog, Sequences(), ids)
    assert "1536 weights in matrices outside linear and convolution layers are not scored" in text
    assert "lstm.weight_ih_l0, lstm.weight_hh_l0" in text and "embed" not in text
    assert said(caplog, Sequences(), ids, eligible=["lstm", "mix"]) == ""
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert said(caplog, plain, torch.randn(3, 8)) == ""
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))
    assert "0.parametrizations.weight.original1; name them in `eligible`" in said(caplog, normed, torch.randn(3, 8))


def test_half_precision_is_refused_before_scoring(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, calls = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16(), []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return loss(model, batch)

    batch = torch.randn(3, 8).bfloat16()
    assert "these scores will not do for a penalty on this model: weights are stored in half" in said(caplog, model, batch)
    with pytest.raises(PenaltyError, match="weights are stored in half precision"):
        Recipe("2", num_batches=1).make_set(model, lambda: [batch], counted, tmp_path / "set.safetensors")
    assert calls == [], "nothing was computed"
