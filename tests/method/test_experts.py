"""Mixtures of experts, as transformers keeps them: one tensor [experts, rows, columns] for all experts of a layer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dcft_dist import attach_penalty, score_importance, select_fundamental
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.prepared import WrapOptions
from dcft_dist.engines.wrap import prepare

from ..ranks import run_ranks

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
HELD = "model.layers.1.mlp.experts.down_proj"


def mixture() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=8, vocab_size=30, num_local_experts=4))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def trained(engine: str, stage: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The set, and how far an expert's fundamental weights have moved when they are held."""
    model = mixture()
    options = WrapOptions(engine, torch.device("cpu"), list(model.model.layers), zero_stage=stage)
    prepared = prepare(model, options, lambda weights: torch.optim.AdamW([p for _, p, _ in weights], lr=0.01))
    ids = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(1))
    rank = torch.distributed.get_rank()
    mine = ids[rank : rank + 1] if torch.distributed.get_world_size() == 2 else ids
    chosen = select_fundamental(score_importance(prepared.model, [mine], loss_of, head="lm_head"), 0.3)
    shard = {s.name: s for s in find_engine(prepared.model).shards()}[HELD]
    bits, before = chosen.mask_in(HELD, shard.box).view(-1), shard.local.detach().clone().view(-1)
    attach_penalty(prepared.model, chosen, 0.0, optimizer=prepared.optimizer)
    prepared.backward(loss_of(prepared.model, mine))
    prepared.step()
    find_engine(prepared.model).settle()
    after = {s.name: s for s in find_engine(prepared.model).shards()}[HELD].local.detach().view(-1)
    assert before.numel() == 0 or not torch.equal(after, before)
    return {n: chosen.mask(n) for n in chosen.names}, (after - before)[bits[: before.numel()]].abs()


@pytest.mark.parametrize(
    ("engine", "stage", "ranks"), [("single", 0, 1), ("fsdp2", 0, 2), ("fsdp1", 0, 2), ("deepspeed", 3, 2)]
)
def test_experts_are_scored_selected_and_held(engine: str, stage: int, ranks: int) -> None:
    expected, _ = run_ranks(1, trained, "single")[0]
    experts = {n for n in expected if "experts" in n}
    assert len(experts) == 4 and all(expected[n].any() and expected[n].ndim == 3 for n in experts)
    for masks, moved in run_ranks(ranks, trained, engine, stage):
        differing = sum(int((masks[n] != expected[n]).sum()) for n in expected)
        assert masks.keys() == expected.keys() and differing <= 2, differing  # scores are equal up to rounding
        assert not moved.any()


def test_no_weight_of_the_mixture_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = mixture()
    with caplog.at_level(logging.WARNING):
        scores = score_importance(model, [torch.zeros(1, 3, dtype=torch.int64)], loss_of, head="lm_head")
    assert "are not scored" not in caplog.text
    assert {n for n, p in model.named_parameters() if p.ndim == 3} <= set(scores.shapes)
