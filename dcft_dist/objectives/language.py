"""The objective of causal language models: the next token of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.text import IGNORED
from ..errors import ConfigError
from .base import Metrics, Objective


class CausalLanguage(Objective):
    """The next token of the answer: cross-entropy, the mean over an example's tokens, then over examples.

    Outputs are logits [size, tokens, vocabulary], labels [size, tokens]. Records: sum of the losses of the tokens, their
    number, how many were right.
    """

    best, num_outputs, width = "perplexity", 0, 3

    def check(self, outputs: Tensor) -> None:
        """
        Raises:
            ConfigError: outputs are not [size, tokens, vocabulary].
        """
        if outputs.ndim != 3:
            raise ConfigError(f"the model gives outputs of shape {list(outputs.shape)}, not [size, tokens, vocabulary]")

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        each, wanted = _token_losses(outputs, labels)
        return each.sum(-1) / (wanted != IGNORED).sum(-1)

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        each, wanted = _token_losses(outputs, labels)
        right = (outputs[:, :-1].argmax(-1) == wanted).sum(-1)
        return torch.stack([each.double().sum(-1), (wanted != IGNORED).sum(-1), right], 1).double()

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        losses, number, right = records.unbind(-1)
        return {
            "loss": float((losses / number).mean()),
            "perplexity": float((losses.sum() / number.sum()).exp()),
            "token_accuracy": float(right.sum() / number.sum()),
            "exact": float((right == number).double().mean()),
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        losses, number, right = records.unbind(-1)
        return {"tokens": number.long().tolist(), "right": right.long().tolist(), "loss": (losses / number).tolist()}


def _token_losses(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[size, tokens - 1]: loss of each next token (0 where it is ignored), and the labels."""
    wanted = labels[:, 1:]
    each = functional.cross_entropy(outputs[:, :-1].transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return each, wanted
