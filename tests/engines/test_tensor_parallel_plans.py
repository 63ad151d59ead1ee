"""Decoders split by the plan that they bring: scores, set, weights and files as with one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dcft_dist import attach_penalty, load_weights, save_weights, score_importance, select_fundamental
from dcft_dist.engines.find import find_engine
from dcft_dist.engines.prepared import Prepared, WrapOptions
from dcft_dist.engines.wrap import prepare
from dcft_dist.errors import EngineError
from dcft_dist.weights.checkpoint import save_checkpoint
from dcft_dist.weights.model_state import load_checkpoint, model_state

from ..nets import full, make_optimizer
from ..ranks import run_ranks
from .cases import whole_scores

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, vocab_size=50)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, vocab_size=50, tie_word_embeddings=True)),
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=48, vocab_size=50)),
}
OPTIMIZERS = {"update": "adamw_smooth", "before": "momentum", "after": "momentum"}


def built(model: str, together: int, optimizer: str = "adamw_smooth", **more: Any) -> Prepared:
    torch.manual_seed(0)
    net: Any = MODELS[model]()
    with torch.no_grad():
        for p in net.parameters():  # norms too: where they are all ones, some mistakes do not show
            p.add_(0.05 * torch.randn(p.shape))
    engine = "single" if dist.get_world_size() == 1 else "fsdp2"
    options = WrapOptions(engine, CPU, list(net.model.layers), tensor_parallel=together, clip_grad_norm=0.5, **more)
    return prepare(net.double(), options, lambda weights: make_optimizer(optimizer, [p for _, p, _ in weights]))


def batches_of(together: int) -> list[Tensor]:
    """This rank's part of six batches of eight texts; ranks that compute together take the same."""
    generator, parts = torch.Generator().manual_seed(1), dist.get_world_size() // together
    whole = [torch.randint(0, 50, (8, 6), generator=generator) for _ in range(6)]
    return [ids.chunk(parts)[dist.get_rank() // together] for ids in whole]


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    return net(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def trained(
    model: str, together: int, how: str, more: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Scores, masks of the set, and weights after four steps of one or two micro-batches."""
    prepared, batches = built(model, together, OPTIMIZERS[how], **more), batches_of(together)
    scores = score_importance(prepared.model, batches[:2], loss_of, head="lm_head", criterion="taylor_squared")
    chosen = select_fundamental(scores, fraction=0.1)
    level: Any = {"level": "update"} if how == "update" else {"level": "gradient", "where": how}
    attach_penalty(prepared.model, chosen, 0.1, optimizer=prepared.optimizer, unscored_factor=0.5, **level)
    for ids in batches[2:]:
        prepared.zero_grad()
        parts = ids.chunk(prepared.options.accumulation)
        for i, part in enumerate(parts):
            with prepared.accumulating(last=i == len(parts) - 1):
                prepared.backward(loss_of(prepared.model, part) / len(parts))
        prepared.clip()
        prepared.step()
    weights = {name: full(p.detach()).clone() for name, p in find_engine(prepared.model).names.parameters.items()}
    return whole_scores(scores), {name: chosen.mask(name) for name in chosen.info.shapes}, weights


@pytest.mark.parametrize(("ranks", "together"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("model", "how"), [("llama", "update"), ("tied", "before"), ("qwen", "after"), ("qwen", "update")])
def test_equals_one_process(model: str, how: str, ranks: int, together: int) -> None:
    more: dict[str, Any] = {"checkpointing": "blocks", "accumulation": 2} if how == "update" else {}
    scores, chosen, weights = run_ranks(1, trained, model, 1, how, more)[0]
    for found, masks, state in run_ranks(ranks, trained, model, together, how, more):
        assert found.keys() == scores.keys() and all(torch.equal(masks[name], mask) for name, mask in chosen.items())
        for name, values in scores.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-12)
        distances = {name: float((state[name] - weight).abs().max()) for name, weight in weights.items()}
        assert max(distances.values()) <= 1e-9, distances


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled(checkpointing: str) -> None:
    """The first block's input comes from the split embedding, which is still on its way."""
    _, _, weights = run_ranks(1, trained, "llama", 1, "update", {})[0]
    more = {"compiler": "aot_eager", "checkpointing": checkpointing}
    for _, _, state in run_ranks(2, trained, "llama", 2, "update", more):
        assert max(float((state[name] - weight).abs().max()) for name, weight in weights.items()) <= 1e-9


def layers_of(model: str) -> dict[str, tuple[int, ...]]:
    """Shape of this rank's part of each weight."""
    return {shard.name: tuple(shard.local.shape) for shard in find_engine(built(model, 2).model).shards()}


def test_the_layers_are_split() -> None:
    found = run_ranks(2, layers_of, "qwen")[0]
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj.weight"] == (16, 32) and found[f"{attention}.o_proj.weight"] == (32, 16)
    assert found["model.layers.0.mlp.down_proj.weight"] == (32, 24) and found["model.embed_tokens.weight"] == (25, 32)
    assert found[f"{attention}.q_norm.weight"] == (8,) and found["lm_head.weight"] == (25, 32)


def there_and_back(folder: str, save: bool) -> dict[str, Tensor]:
    together = 2 if dist.get_world_size() == 4 else 1
    prepared, place = built("tied", together), Path(folder)
    if save:
        prepared.backward(loss_of(prepared.model, batches_of(together)[0]))
        prepared.step()
        save_weights(prepared.model, place / "weights")
        save_checkpoint(place / "checkpoint", model_state(prepared.model, prepared.optimizer), {})
        return {name: full(p.detach()).clone() for name, p in find_engine(prepared.model).names.parameters.items()}
    load_weights(prepared.model, place / "weights")
    weights = {name: full(p.detach()).clone() for name, p in find_engine(prepared.model).names.parameters.items()}
    other = built("tied", together)
    load_checkpoint(place / "checkpoint", other.model, other.optimizer)
    again = {name: full(p.detach()) for name, p in find_engine(other.model).names.parameters.items()}
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert all(float(full(other.optimizer.state[p]["exp_avg"]).abs().max()) > 0 for p in other.model.parameters())
    return weights


def test_files_go_to_and_from_other_layouts(tmp_path: Path) -> None:
    expected = run_ranks(4, there_and_back, str(tmp_path), True)[0]
    for ranks in (1, 2, 4):
        for found in run_ranks(ranks, there_and_back, str(tmp_path), False):
            assert all(torch.equal(found[name].double(), weight) for name, weight in expected.items())


def refused(kind: str) -> str:
    net: Any = {
        "no plan": lambda: BertModel(BertConfig(**{**SIZES, "intermediate_size": 48}, vocab_size=50)),
        "heads": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, vocab_size=50)),
        "uneven": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, vocab_size=51)),
        "style": MODELS["llama"],
        "inside": MODELS["llama"],
        "replicas": MODELS["llama"],
        "compiled": MODELS["llama"],
        "beside": lambda: PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=48, vocab_size=50, qk_layernorm=True)),
    }[kind]()
    if kind == "style":
        net._tp_plan = {**net._tp_plan, "model.norm": "sequence_parallel"}
    if kind == "inside":
        net.model.layers[0].mlp.gate = nn.Parameter(torch.zeros(3))
    with pytest.raises(EngineError) as error:
        options = WrapOptions("fsdp2", CPU, [], tensor_parallel=2, replicas=2 if kind == "replicas" else 1)
        if kind == "compiled":
            options = replace(options, compiler="aot_eager", checkpointing="blocks")
        prepare(net, options, lambda weights: make_optimizer("momentum", [p for _, p, _ in weights]))
    return str(error.value)


REFUSED = {
    "no plan": "BertModel has no plan (tp_plan), as decoders of transformers have: use 1",
    "heads": "sharding.tensor_parallel = 2 does not divide the 1 heads of the model (num_key_value_heads)",
    "uneven": "sharding.tensor_parallel = 2 does not divide 51, a dimension of ",
    "style": "the plan of the model has styles that are not known: sequence_parallel",
    "inside": "model.layers.0.mlp.gate belongs to a module with submodules, and the plan of the model leaves it out",
    "compiled": "train.compile with sharding.tensor_parallel needs train.activation_checkpointing = 'none' or 'selective'",
    "beside": "model.layers.0.self_attn.q_layernorm has weights beside layers that are split, and the plan of the model",
    "replicas": "sharding.tensor_parallel needs the engine fsdp2, without replicas",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str) -> None:
    assert all(REFUSED[kind] in said for said in run_ranks(2, refused, kind))
