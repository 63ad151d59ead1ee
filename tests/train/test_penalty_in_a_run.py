"""A run that loses its penalty, or has another one than its configuration asks for, stops and says so."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizers

from dcft_dist.method.penalty import Penalty

from ..processes import dcft
from .test_handshake import pictures, weights, words


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


def attached() -> list[Penalty]:
    return [thing for thing in gc.get_objects() if type(thing) is Penalty and sum(thing.calls.values()) > 4]


def removes(outputs: Tensor, labels: Tensor) -> Tensor:
    for penalty in attached():
        penalty.remove()
    return loss(outputs, labels)


def loosens(outputs: Tensor, labels: Tensor) -> Tensor:
    for penalty in attached():
        penalty.set_factor(0.9)
    return loss(outputs, labels)


def clears_hooks(outputs: Tensor, labels: Tensor) -> Tensor:
    if attached():
        torch_optimizers._global_optimizer_pre_hooks.clear()
    return loss(outputs, labels)


@pytest.mark.parametrize(
    ("what", "level", "said"),
    [
        (removes, "update", "the penalty was removed from the model"),
        (removes, "gradient", "the penalty was removed from the model"),
        (loosens, "update", "the factor is 0.9 at step"),
        (clears_hooks, "update", "a hook of the penalty was taken off"),
    ],
)
def test_code_of_the_user_takes_the_penalty_off(tmp_path: Path, what: object, level: str, said: str) -> None:
    pictures(tmp_path / "pictures")
    weights(tmp_path / "net.safetensors")
    own = words(tmp_path, "--engine", "single", "--penalty.level", level, "--train.epochs", "3")
    done = dcft("train", "smoke.toml", *own, "--task.loss", f"{__name__}:{what.__name__}")  # type: ignore[attr-defined]
    assert done.returncode == 2 and said in done.stderr, done.stderr[-500:]
    assert not (tmp_path / "runs/smoke/summary.json").exists()
