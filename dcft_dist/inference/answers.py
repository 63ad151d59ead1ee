"""What a finished run's language model answers to instructions."""

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
    """The most probable next token, again and again, up to the end of the text or `tokens` of them. Collective.

    Batches are the same for every number of ranks, and so, in float32, are the answers.

    Returns:
        Columns of a table: input, group, answer.

    Raises:
        ConfigError: no tokens are asked for; the model has no `generate` of transformers, or an engine where that cannot
            work.
        DataError: instruction and answer together are longer than the model can be given.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: an answer has at least one")
    if not isinstance(adapted.pretrained.processor, AnswerProcessor):
        raise ConfigError("answers to inputs that data.collate makes cannot be predicted: call the model's `generate`")
    world = adapted.world
    generate = _generate(adapted)
    with collectives.agreed("read the data"):
        prompts = _prompts(adapted, split, tokens)
    ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # of like length together
    size = adapted.config.evaluation_batch
    batches = [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    mine: dict[int, str] = {}
    for begin in range(0, len(batches), world.world_size):
        # All ranks take part in every forward: one without a batch of its own repeats the first.
        batch = batches[turn] if (turn := begin + world.rank) < len(batches) else batches[0]
        with adapted.prepared.computing():
            mine |= zip(batch, generate([prompts[i] for i in batch], tokens), strict=True)
    texts: dict[str, str] = {}
    for rank in range(world.world_size):
        texts |= json.loads(collectives.broadcast_text(json.dumps(mine), rank, what="answers"))
    return {**identify(split, range(len(prompts))), "answer": [texts[str(i)] for i in range(len(prompts))]}


def _prompts(adapted: TaskModel, split: Split, tokens: int) -> list[list[int]]:
    processor: Any = adapted.pretrained.processor
    prompts: list[list[int]] = processor.prompts(split)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = getattr(getattr(adapted.pretrained.module, "config", None), "max_position_embeddings", None)
    if room is not None and len(prompts[longest]) + tokens > room:
        raise DataError(
            f"an instruction of {len(prompts[longest])} tokens and {tokens} of its answer are more than the {room} that the "
            f"model has places for: lower --tokens, or leave out {str(split.inputs[longest])[:60]!r}"
        )
    return prompts


def _generate(adapted: TaskModel) -> Any:
    """(token ids of prompts, number of new tokens) -> texts."""
    engine = find_engine(adapted.prepared.model)
    net: Any = engine.module.eval()
    if not callable(getattr(net, "generate", None)):
        raise ConfigError(
            f"model.build: {adapted.config.model.build} has no generate, as models of transformers for text have"
        )
    if engine.name == "fsdp1":
        raise ConfigError("generate goes past the hooks of FSDP1: use --engine fsdp2")
    processor: Any = adapted.pretrained.processor
    tokenizer, device = processor.tokenizer, adapted.world.device
    end = tokenizer.eos_token_id
    pad = next((t for t in (tokenizer.pad_token_id, end) if t is not None), 0)

    def texts(prompts: list[list[int]], tokens: int) -> list[str]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # the answers begin in one column
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens, "eos_token_id": end, "pad_token_id": pad}
        # synced_gpus: ranks whose answers are done go on with forwards until those of all are.
        said = net.generate(input_ids=ids, attention_mask=attention, synced_gpus=adapted.world.world_size > 1, **greedy)
        return [text.strip() for text in tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)]

    return texts
