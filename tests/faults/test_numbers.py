"""Numbers that are none: in losses, gradients, the optimizer, buffers and weights. No good checkpoint is lost by them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dcft_dist.errors import DivergedError
from dcft_dist.runs.status import run_verdict
from dcft_dist.weights.checkpoint import damage_in, save_checkpoint
from dcft_dist.weights.model_state import model_state
from dcft_dist.weights.shard_files import FlatPiece

from ..nets import loss_fn, make_batches, make_net
from ..processes import Process, finish
from ..ranks import run_ranks
from ..train.test_run import encoder, tiny

__all__ = ["encoder", "tiny"]


def misbehave(how: str, config: Path, runs: Path, *words: str, ranks: int = 2) -> list[tuple[int, str]]:
    import socket

    own = ["--task.loss", f"misbehaving.{how}", "--import_roots", json.dumps([str(Path(__file__).parent)])]
    command = ["train", str(config), "--runs_dir", str(runs), *own, "--removal.fractions", "[]", *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **world, "MISBEHAVING_RUN": str(runs / "tiny")}
    return finish([Process(command, {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("loss_becomes_nan", "the training loss is nan at step 5"),
        ("gradient_becomes_nan", "are NaN or infinite: nothing was saved; step 5 is the last good checkpoint"),
        ("gradient_becomes_huge", "elements of the optimizer's state "),
    ],
)
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_the_good_checkpoint_is_kept(how: str, said: str, engine: str, tiny: Path, tmp_path: Path) -> None:
    """The step that goes wrong is one that saves. Every later start ends there too, and the good checkpoint stays."""
    words = ["--engine", engine, "--checkpoint.every", "1"]
    for _ in range(2):
        results = misbehave(how, tiny, tmp_path, *words)
        assert {code for code, _ in results} == {2} and said in results[0][1], results[0][1]
        assert "Traceback" not in results[0][1]
        kept = sorted(folder.name for folder in (tmp_path / "tiny/checkpoints").glob("step_*"))
        assert kept == ["step_00000005"] and damage_in(tmp_path / "tiny/checkpoints/step_00000005") == ""
    verdict, why = run_verdict(tmp_path / "tiny", "step 5", 3)
    assert verdict == "failed" and "DivergedError" in why


def poisoned(kind: str, folder: str) -> list[str]:
    """On two ranks: one number of the last rank's share is none."""
    import torch.distributed as dist

    from ..prepared import prepare

    prepared = prepare(make_net, "fsdp2", lambda p: torch.optim.AdamW(p, lr=1e-3), micro_batch=6)
    prepared.zero_grad(to_none=True)
    prepared.backward(loss_fn(prepared.model, make_batches(1, 6, torch.float32)[0]), True)
    prepared.step()
    save_checkpoint(Path(folder) / "step_00000001", model_state(prepared.model, prepared.optimizer), {})
    found = []
    state = model_state(prepared.model, prepared.optimizer)
    key, value = {
        "weight": ("model.mix.weight", float("nan")),
        "infinity": ("model.mix.weight", float("inf")),
        "state": ("optimizer.mix.weight.exp_avg_sq", float("inf")),
        "buffer": ("buffer.poisoned", float("nan")),
        "mask": ("buffer.poisoned", float("-inf")),
    }[kind]
    if key.startswith("buffer"):
        state[key] = torch.zeros(3)
    values: Any = state[key].values if isinstance(state[key], FlatPiece) else state[key]
    if dist.get_rank() == 1 and len(values):
        values[-1] = value
    try:
        save_checkpoint(Path(folder) / "step_00000001", state, {})
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return [*found, damage_in(Path(folder) / "step_00000001")]


@pytest.mark.parametrize("kind", ["weight", "infinity", "state", "buffer", "mask"])
def test_one_number_on_one_rank(kind: str, tmp_path: Path) -> None:
    """All ranks refuse together, and what lay there before is whole. Buffers may hold -inf: masks of attention do."""
    for found in run_ranks(2, poisoned, kind, str(tmp_path)):
        assert found[-1] == ""
        assert (found[:-1] == []) == (kind == "mask"), found
        assert kind == "mask" or "NaN or infinite: nothing was saved" in found[0]


def test_a_weight_that_is_nan_before_the_run(tmp_path: Path) -> None:
    net = make_net()
    with torch.no_grad():
        net.mix.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"1 elements of the weight mix\.weight are NaN or infinite: nothing was saved"):
        save_checkpoint(tmp_path / "step_00000001", model_state(net), {})
    assert not (tmp_path / "step_00000001").exists()
