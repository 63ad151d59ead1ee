"""What only a GPU can show: the Triton kernels as they really run, CUDA against the CPU, float16 with a scaler, a whole run.

The parity, selection and threshold tests run there too: `DCFT_TEST_DEVICE=cuda python -m pytest tests/test_parity.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental

from .method import kernel_cases
from .nets import HEAD, OddNet, loss_fn, make_batches, make_net, make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


# -- kernels -------------------------------------------------------------------------------------------------------------


def test_kernels_do_what_torch_does() -> None:
    kernel_cases.one_tensor(GPU, (1, 7, 4096, 10_001, 9_000_001))
    kernel_cases.tables(GPU)
    kernel_cases.selection(GPU, (3_000_001, 1, 0, 4096, 7))


# -- against the CPU -----------------------------------------------------------------------------------------------------


def chosen_by(
    device: torch.device, dtype: torch.dtype, scope: Literal["global", "per_tensor"] = "global"
) -> tuple[dict[str, Tensor], FundamentalSet]:
    net = make_net(dtype).to(device)
    batches = [(x.to(device), y.to(device)) for x, y in make_batches(4, 8, dtype)]
    scores = score_importance(net, batches, loss_fn, head=HEAD)
    assert all(s.values.device.type == device.type for s in scores.shards.values())
    values = {n: s.values.cpu() for n, s in scores.shards.items()}
    return values, select_fundamental(scores, scope=scope)


def test_scores_and_set_are_those_of_the_cpu() -> None:
    (here, mine), (there, theirs) = chosen_by(CPU, torch.float64), chosen_by(GPU, torch.float64)
    assert all(torch.equal(mine.mask(n), theirs.mask(n)) for n in mine.names)
    for name, values in here.items():
        torch.testing.assert_close(there[name], values, rtol=1e-6, atol=0)


def trained(device: torch.device, level: str, name: str) -> dict[str, Tensor]:
    net, (_, chosen) = make_net(torch.float64).to(device), chosen_by(CPU, torch.float64)
    optimizer = make_optimizer(name, net.parameters())
    attach_penalty(net, chosen, 0.1, optimizer=optimizer, level=level, rest_factor=0.7)  # type: ignore[arg-type]
    for x, y in make_batches(8, 8, torch.float64):
        optimizer.zero_grad()
        loss_fn(net, (x.to(device), y.to(device))).backward()
        optimizer.step()
    return {n: p.detach().cpu() for n, p in net.named_parameters()}


@pytest.mark.parametrize(("level", "name"), [("gradient", "momentum"), ("update", "adamw")])
def test_training_is_that_of_the_cpu(level: str, name: str) -> None:
    here, there = trained(CPU, level, name), trained(GPU, level, name)
    for n, value in here.items():
        torch.testing.assert_close(there[n], value, rtol=0, atol=1e-10)


# -- a CUDA graph --------------------------------------------------------------------------------------------------------


def stepped(captured: bool, level: str, where: str) -> dict[str, Tensor]:
    """Weights after steps with a factor that changes; captured: all but the first three are replays of one graph."""
    net, (_, chosen) = make_net().to(GPU), chosen_by(CPU, torch.float32)
    update = level == "update"
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(net.parameters(), lr=0.01, capturable=True)
        if update
        else torch.optim.SGD(net.parameters(), lr=0.01)
    )
    penalty = attach_penalty(net, chosen, 0.1, optimizer=optimizer, level=level, where=where)  # type: ignore[arg-type]
    batches = [(x.to(GPU), y.to(GPU)) for x, y in make_batches(10, 8, torch.float32)]
    x, y = batches[0][0].clone(), batches[0][1].clone()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(net, (x, y)).backward()
        optimizer.step()

    for number, batch in enumerate(batches):
        x.copy_(batch[0])
        y.copy_(batch[1])
        penalty.set_factor(0.1 * number)
        if captured and number == 3:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step()
        if captured and number >= 3:
            graph.replay()
            continue
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
    penalty.in_force()
    return {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize(("level", "where"), [("update", "after"), ("gradient", "after"), ("gradient", "before")])
def test_a_step_in_a_cuda_graph(level: str, where: str) -> None:
    """The factor is a number on the device: a captured step follows it."""
    plain = stepped(False, level, where)
    for n, value in stepped(True, level, where).items():
        torch.testing.assert_close(value, plain[n], rtol=1e-6, atol=1e-7)


# -- float16 with a scaler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_float16_with_a_scaler(factor: float) -> None:
    """The step that overflows is left out whole; the others move the held weights by factor x what they would."""
    net: OddNet = make_net().to(GPU)
    _, chosen = chosen_by(CPU, torch.float32, "per_tensor")
    optimizer, scaler = make_optimizer("momentum", net.parameters()), torch.amp.GradScaler("cuda", init_scale=2.0**40)
    penalty = attach_penalty(net, chosen, factor, optimizer=optimizer, level="update")
    start, skipped = net.mix.weight.detach().clone(), 0
    for x, y in make_batches(40, 8, torch.float32):
        before, scale = net.mix.weight.detach().clone(), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_fn(net, (x.to(GPU), y.to(GPU)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert torch.equal(net.mix.weight, before)
    mask = chosen.mask("mix.weight").to(GPU)
    assert mask.any() and 0 < skipped < 40 and penalty.calls["mix.weight"] == 40 - skipped
    assert torch.equal(net.mix.weight[mask], start[mask]) == (factor == 0.0)
    assert not torch.equal(net.mix.weight[~mask], start[~mask])


# -- the trainer ---------------------------------------------------------------------------------------------------------


def run_command(folder: Path, name: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dcft_dist.cli", "train", "reports_bert.toml", "--name", name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Texts of two words that tell the label, for a small BERT with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("reports")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wet", "dry", "left", "right"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    rows = [f"{'wet' if i % 2 else 'dry'} {'left' if i // 2 % 2 else 'right'},{i % 2},{i // 2 % 2},p{i}" for i in range(200)]
    (folder / "reports.csv").write_text("\n".join(["text,effusion,pneumonia,patient", *rows]) + "\n")
    words = ["--data.path", str(folder / "reports.csv"), "--model.weights", str(folder / "bert"), "--task.max_tokens", "8"]
    words += ["--importance.num_samples", "64", "--train.global_batch", "16", "--train.epochs", "2", "--test_resamples", "0"]
    return folder, [*words, "--runs_dir", str(folder), "--removal.fractions", "[]", "--optimizer.lr", "1e-3"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu(precision: str, reports: tuple[Path, list[str]]) -> None:
    """Under each engine the same, from NCCL to the report; the plain one twice, to the last digit."""
    folder, words = reports
    losses = {}
    for engine in ("single", "fsdp2", "ddp" if precision == "fp32" else "fsdp1", "single"):
        name = f"{engine}-{precision}-{len(losses)}"
        found = run_command(folder, name, *words, "--engine", engine, "--train.precision", precision)
        assert "NVIDIA" in json.dumps(found["machine"]) and found["peak_memory_gib"] > 0
        assert found["validation"]["auroc"] > 0.9
        losses[name] = found["validation"]["loss"]
    every = list(losses.values())
    assert every[0] == every[-1]
    assert max(every) - min(every) <= (1e-5 if precision == "fp32" else 2e-2), losses
