"""Pre-trained models that install as a package, with a new head on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import config
from .data import Batch
from .errors import ConfigError
from .packages import minilm_folder

HEAD = "head"  # the head's name in every model of this module


class TextClassifier(nn.Module):
    """A transformer encoder, the mean of its token states, and a linear head."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes)

    def features(self, batch: Batch) -> Tensor:
        """[size, width]: mean over the tokens of each text."""
        states = self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return mean

    def forward(self, batch: Batch) -> Tensor:
        """[size, num_classes] logits."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def describe(self, folder: Path) -> None:
        """Writes what `AutoModel` needs to know of the backbone besides its weights."""
        self.backbone.config.save_pretrained(folder)  # type: ignore[union-attr, operator]

    def blocks(self) -> list[nn.Module]:
        """The units to shard one by one."""
        return list(self.backbone.encoder.layer)  # type: ignore[union-attr, arg-type]


def build_model(model: config.Model, num_classes: int, seed: int) -> tuple[TextClassifier, Any]:
    """The pre-trained model with a head drawn from `seed`, and its tokenizer.

    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: more layers are asked for than there are.
    """
    folder = minilm_folder()
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report lists the unused pooler
    backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    if model.num_layers is not None:
        if model.num_layers > len(backbone.encoder.layer):
            raise ConfigError(
                f"model.num_layers: the model has {len(backbone.encoder.layer)} layers, not {model.num_layers}"
            )
        backbone.encoder.layer = backbone.encoder.layer[: model.num_layers]
        backbone.config.num_hidden_layers = model.num_layers
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TextClassifier(backbone.float(), backbone.config.hidden_size, num_classes), tokenizer
