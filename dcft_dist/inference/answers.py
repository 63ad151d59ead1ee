"""Answers of a finished run's language model to instructions."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..data.splits import Split
from ..data.text import AnswerProcessor
from ..distributed import collectives
from ..engines.find import find_engine
from ..errors import ConfigError, DataError
from ..train.task_model import TaskModel
from .load import identify


@torch.no_grad()
def answers_of(adapted: TaskModel, split: Split, tokens: int) -> dict[str, list[Any]]:
    """Greedy decoding: takes the most probable token until the text ends or the answer is full. Collective.

    Batches do not depend on the number of ranks. So, in float32, the answers do not depend on it either.

    Args:
        adapted: the finished run's model.
        split: the instructions.
        tokens: largest number of tokens in an answer.

    Returns:
        Columns of a table: input, group, answer.

    Raises:
        ConfigError: `tokens` is below 1; the model has no `generate` as models of transformers have; or its engine cannot
            run `generate` (FSDP1).
        DataError: an instruction and its answer are longer than the model allows.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: must be at least 1")
    if not isinstance(adapted.pretrained.processor, AnswerProcessor):
        raise ConfigError("answers to inputs that data.collate makes cannot be predicted: call the model's `generate`")
    world = adapted.world
    generate = _generate(adapted)
    with collectives.agreed("read the data"):
        prompts = _prompts(adapted, split, tokens)
    ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together
    size = adapted.config.evaluation_batch
    batches = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    mine: dict[int, str] = {}
    for begin in range(0, len(batches), world.world_size):
        # All ranks take part in every forward: a rank without a batch repeats the first one.
        batch = batches[turn] if (turn := begin + world.rank) < len(batches) else batches[0]
        with adapted.prepared.computing():
            mine |= zip(batch, generate([prompts[i] for i in batch], tokens), strict=True)
    texts: dict[str, str] = {}
    for rank in range(world.world_size):
        texts |= json.loads(collectives.broadcast_text(json.dumps(mine), rank, what="answers"))
    return {**identify(split, range(len(prompts))), "answer": [texts[str(i)] for i in range(len(prompts))]}


def _prompts(adapted: TaskModel, split: Split, tokens: int) -> list[list[int]]:
    """Token ids of each instruction, all short enough that an answer of `tokens` fits into the model's positions."""
    processor: Any = adapted.pretrained.processor
    prompts: list[list[int]] = processor.prompts(split)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    positions = getattr(getattr(adapted.pretrained.module, "config", None), "max_position_embeddings", None)
    if positions is not None and len(prompts[longest]) + tokens > positions:
        raise DataError(
            f"an instruction of {len(prompts[longest])} tokens with an answer of {tokens} does not fit into the model's "
            f"{positions} positions: lower --tokens, or leave out {str(split.inputs[longest])[:60]!r}"
        )
    return prompts


def _generate(adapted: TaskModel) -> Any:
    """A function (token ids of prompts, number of new tokens) -> texts of the answers."""
    engine = find_engine(adapted.prepared.model)
    net: Any = engine.module.eval()
    if not callable(getattr(net, "generate", None)):
        raise ConfigError(
            f"model.build: {adapted.config.model.build} has no `generate`: answers need a text model of transformers"
        )
    if engine.name == "fsdp1":
        raise ConfigError("generate bypasses the hooks of FSDP1: use --engine fsdp2")
    processor: Any = adapted.pretrained.processor
    tokenizer, device = processor.tokenizer, adapted.world.device
    end = tokenizer.eos_token_id
    pad = next((t for t in (tokenizer.pad_token_id, end) if t is not None), 0)

    def texts(prompts: list[list[int]], tokens: int) -> list[str]:
        width = max(map(len, prompts))
        # Padded on the left, so that all answers start in the same column.
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens, "eos_token_id": end, "pad_token_id": pad}
        # synced_gpus: ranks that have finished continue with forwards until all ranks have.
        generated = net.generate(input_ids=ids, attention_mask=attention, synced_gpus=adapted.world.world_size > 1, **greedy)
        return [text.strip() for text in tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)]

    return texts
