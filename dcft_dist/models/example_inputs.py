"""Inputs with the shapes that a configuration asks for, filled with random values: for plans and exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import Config


def example_inputs(config: Config, module: nn.Module, size: int, length: int) -> dict[str, Tensor]:
    """Inputs of a batch, by the name of the model's argument.

    Args:
        config: configuration of the run; `data.modality = "own"` has no known shapes.
        module: the model, to see whether it reads tokens.
        size: examples.
        length: tokens of a text.
    """
    draw = torch.Generator().manual_seed(0)
    if reads_tokens(config, module):
        embedding = next((m for m in module.modules() if isinstance(m, nn.Embedding)), None)
        words = embedding.num_embeddings if embedding else 100
        ids = torch.randint(words, (size, length), generator=draw)
        mask = torch.ones_like(ids)
        if size > 1:
            mask[-1, length // 2 + 1 :] = 0  # a shorter text
        return {"input_ids": ids, "attention_mask": mask}
    if config.data.modality == "volume":
        channels = 1 if isinstance(config.data.input, str) else len(config.data.input)
        return {"image": torch.randn(size, channels, *config.data.patch, generator=draw)}
    side = config.model.image_size
    return {"pixel_values": torch.randn(size, len(config.data.mean), side, side, generator=draw)}


def reads_tokens(config: Config, module: nn.Module) -> bool:
    """Whether the model's inputs are tokens of text."""
    first = next((name for m in module.modules() if (name := getattr(m, "main_input_name", None))), None)
    return config.data.modality == "text" or config.task.kind == "causal_lm" or first == "input_ids"
