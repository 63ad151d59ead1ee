"""Activation checkpointing, compiled blocks, early reduction and prefetching change no number, under any engine."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dcft_dist import FundamentalSet, attach_penalty, score_importance
from dcft_dist.engines import blocks
from dcft_dist.engines.blocks import checkpoint_activations, compile_blocks
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.errors import EngineError

from ..nets import HEAD, Block, loss_fn, make_batches, make_net, make_optimizer, my_part
from ..ranks import run_ranks
from ..test_parity import make_masks

CPU = torch.device("cpu")
ENGINES = [("single", 0), ("ddp", 0), ("fsdp2", 0), ("fsdp1", 0), ("deepspeed", 2), ("deepspeed", 3)]


class Calls(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def trained(options: WrapOptions, level: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Counter[str]]:
    """Scores, weights after three steps of two micro-batches, and the operations of the last step."""
    torch.manual_seed(0)
    net = make_net()
    for block in net.blocks:
        block.norm = nn.Sequential(block.norm, nn.BatchNorm1d(13), nn.Dropout(0.3))  # type: ignore[assignment]
    options = replace(options, blocks=list(net.blocks), accumulation=2, micro_batch=4)
    prepared = prepare(net, options, lambda weights: make_optimizer("momentum", [p for _, p, _ in weights]))
    batches = [my_part(batch) for batch in make_batches(6, 8, torch.float32)]
    torch.manual_seed(1)
    scores = score_importance(prepared.model, batches[:2], loss_fn, head=HEAD)
    masks = FundamentalSet.from_masks(make_masks(torch.float32), head=HEAD)
    how: Any = {"level": level, "where": "before", "optimizer": prepared.optimizer}
    attach_penalty(prepared.model, masks, 0.1, **how)
    calls = Calls()
    prepared.model.train()
    for step in range(3):
        prepared.zero_grad()
        for i in range(2):
            calls = Calls()
            with prepared.accumulating(last=i == 1), calls:
                prepared.backward(loss_fn(prepared.model, batches[2 * step + i]) / 2)
        prepared.step()
    found = {n: s.values.clone() for n, s in scores.shards.items()}
    engine = find_engine(prepared.model)
    state = {s.name: s.local.detach().clone() for s in engine.shards()}
    return found, state | {n: b.detach().double().clone() for n, b in engine.module.named_buffers()}, calls.counts


def options_of(engine: str, stage: int, **more: Any) -> WrapOptions:
    return WrapOptions(engine, CPU, [], zero_stage=stage, **more)


EXACT: dict[str, dict[str, Any]] = {
    "blocks": {"checkpointing": "blocks"},
    "selective": {"checkpointing": "selective"},
    "prefetch": {"prefetch": 1},
    "on the host": {"activations_on_host": True},
    "inputs on the host": {"checkpointing": "blocks", "activations_on_host": True},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "reduced early": {"reduce_each": True},
    "compiled": {"compiler": "aot_eager"},
    "compiled, inputs on the host": {"compiler": "aot_eager", "checkpointing": "blocks", "activations_on_host": True},
}


def largest_differences(
    engine: str, stage: int, level: str, choices: dict[str, dict[str, Any]], replicas: int = 1
) -> dict[str, float]:
    """Largest difference of a score, weight or buffer with each choice from those without.

    Relative to the largest of its tensor, or to 0.01: a bias before a BatchNorm has no gradient but rounding.
    """
    plain = trained(options_of(engine, stage, replicas=replicas), level)
    found = {}
    for name, more in choices.items():
        changed = trained(options_of(engine, stage, replicas=replicas, **more), level)
        pairs = [(old[key], new[key]) for old, new in zip(plain[:2], changed[:2], strict=True) for key in old]
        found[name] = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-2)) for a, b in pairs if a.numel())
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_the_same_bits(engine: str, stage: int, ranks: int) -> None:
    for level in ("gradient", "update") if ranks == 1 or engine != "single" else ():
        for found in run_ranks(ranks, largest_differences, engine, stage, level, EXACT):
            assert set(found.values()) == {0.0}, (level, found)


@pytest.mark.parametrize(("engine", "stage", "ranks"), [("single", 0, 1), *((e, s, 2) for e, s in ENGINES[1:])])
def test_the_same_to_rounding(engine: str, stage: int, ranks: int) -> None:
    for level in ("gradient", "update"):
        for found in run_ranks(ranks, largest_differences, engine, stage, level, ROUNDED):
            assert max(found.values()) < 1e-5, (level, found)


@pytest.mark.parametrize(("engine", "stage"), [("ddp", 0), ("fsdp2", 0), ("deepspeed", 3)])
def test_on_four_ranks(engine: str, stage: int) -> None:
    """BatchNorm takes its statistics over two samples here, so rounding shows more."""
    for replicas in (1, 2) if engine == "fsdp2" else (1,):
        for found in run_ranks(4, largest_differences, engine, stage, "update", {**EXACT, **ROUNDED}, replicas):
            assert {found[name] for name in EXACT} == {0.0}, found
            assert max(found[name] for name in ROUNDED) < 1e-3, found


def operations(engine: str, stage: int) -> dict[str, Counter[str]]:
    """Operations of a forward and backward with each kind of checkpointing."""
    return {
        how: trained(options_of(engine, stage, checkpointing=how), "update")[2] for how in ("none", "blocks", "selective")
    }


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_what_is_computed_again(engine: str, stage: int) -> None:
    """Two blocks with a tanh and two matrix products each. ZeRO-3 has operations of its own for linear layers."""
    for found in run_ranks(1, operations, engine, stage):
        tanh, products = ({how: c[name] for how, c in found.items()} for name in ("tanh", "addmm"))
        assert tanh["blocks"] == tanh["selective"] == tanh["none"] + 2, tanh
        assert products["blocks"] > products["none"] == products["selective"], products


def collectives_of(reduce_each: bool) -> int:
    """Reductions in a step of two micro-batches, of which the first is counted here."""
    net = make_net()
    options = WrapOptions("fsdp2", CPU, list(net.blocks), reduce_each=reduce_each)
    prepared = prepare(net, options, lambda weights: make_optimizer("momentum", [p for _, p, _ in weights]))
    calls = Calls()
    with prepared.accumulating(last=False), calls:
        prepared.backward(loss_fn(prepared.model, my_part(make_batches(1, 8, torch.float32)[0])))
    whole = [p for p in prepared.model.parameters() if p.grad is not None]
    return calls.counts["c10d::_reduce_scatter_base_"] if len(whole) or not reduce_each else -1


def test_gradients_are_reduced_with_each_micro_batch() -> None:
    assert run_ranks(2, collectives_of, False) == [0, 0]
    assert run_ranks(2, collectives_of, True) == [3, 3], "two blocks and the rest"


@pytest.mark.parametrize("how", ["blocks", "selective"])
def test_a_decoder_keeps_no_cache_of_keys(how: Any) -> None:
    """By default transformers' decoders keep one, also in training; a block would add its keys to it again."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    model, ids = LlamaForCausalLM(LlamaConfig(**sizes)), torch.randint(0, 50, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    checkpoint_activations(model.model.layers, how)
    model(input_ids=ids, labels=ids).loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(plain) and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_copy_of_a_block_forgets_its_own_activations() -> None:
    torch.manual_seed(0)
    block = Block(5, 3)
    checkpoint_activations([block], "blocks")
    twin, x = copy.deepcopy(block), torch.randn(2, 5)
    with torch.no_grad():
        twin.down.weight.zero_()
        assert torch.equal(twin(x), x) and not torch.equal(block(x), x)


def test_what_cannot_be_done_is_refused() -> None:
    block = Block(5, 3)
    checkpoint_activations([block], "blocks")
    with pytest.raises(EngineError, match="the forward of a Block is replaced already"):
        checkpoint_activations([block], "selective")
    with pytest.raises(EngineError, match=r"needs the blocks of the model: name them in model\.blocks"):
        checkpoint_activations([], "blocks")
    with pytest.raises(EngineError, match=r"torch\.compile has no backend 'inducktor': use one of .*inductor"):
        compile_blocks([block], "inducktor")


class Noted(blocks.HostCopies):
    """Notes the shapes of what goes to the host, and whether it comes back."""

    def __init__(self) -> None:
        self.put_there: list[tuple[int, ...]] = []
        self.fetched = 0

    def put(self, tensor: Tensor) -> Any:
        self.put_there.append(tuple(tensor.shape))
        return super().put(tensor)

    def get(self, kept: Any) -> Tensor:
        self.fetched += 1
        return super().get(kept)


def on_the_host(engine: str, stage: int, how: Any) -> tuple[list[tuple[int, ...]], int]:
    net, noted = make_net(), Noted()
    options = options_of(engine, stage, checkpointing=how, activations_on_host=True, micro_batch=7)
    options = replace(options, blocks=list(net.blocks))
    prepared = prepare(net, options, lambda weights: make_optimizer("momentum", [p for _, p, _ in weights]))
    blocks.HOST.append(noted)
    try:
        prepared.zero_grad()
        with prepared.accumulating(last=True):
            prepared.backward(loss_fn(prepared.model, my_part(make_batches(1, 14, torch.float32)[0])))
        with torch.no_grad():
            loss_fn(prepared.model, my_part(make_batches(1, 14, torch.float32)[0]))
    finally:
        blocks.HOST.pop()
    return noted.put_there, noted.fetched


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_activations_go_to_the_host_and_weights_do_not(engine: str, stage: int) -> None:
    """With `blocks`, one tensor of each block: its input."""
    ranks = 1 if engine == "single" else 2
    weights = {tuple(p.shape) for block in make_net().blocks for p in block.parameters()}
    weights |= {shape[::-1] for shape in weights}
    for put_there, fetched in run_ranks(ranks, on_the_host, engine, stage, "blocks"):
        assert put_there == [(14 // ranks, 13)] * 2 and fetched == 2, put_there
    for put_there, fetched in run_ranks(ranks, on_the_host, engine, stage, "none"):
        assert len(put_there) >= 6 and fetched == len(put_there) and not weights & set(put_there), put_there


class InPlace(nn.Module):
    """Changes its buffer after the backward has begun to need it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("c", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.c
        self.c.add_(1)
        return y


def test_what_stays_and_is_changed_in_place_is_noticed() -> None:
    """As autograd notices it, which does not look at what a hook returns."""
    block = InPlace()
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(x).sum().backward()
    checkpoint_activations([block], "none", on_host=True)
    with pytest.raises(EngineError, match="a weight or buffer that the backward needs was changed in place"):
        block(x).sum().backward()
