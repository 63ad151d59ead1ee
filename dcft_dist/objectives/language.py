"""The objective of causal language models: the next token of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.packing import IGNORED
from ..errors import ConfigError
from .base import Metrics, Objective


class CausalLanguage(Objective):
    """Prediction of the next token of the answer: cross-entropy, averaged over the tokens of an example, then over examples.

    Outputs are logits [size, tokens, vocabulary], labels [size, tokens]. A record contains the sum of the token losses, the
    number of tokens, and the number of correct tokens.
    """

    best, num_outputs, width = "perplexity", 0, 3

    def check(self, outputs: Tensor) -> None:
        """Checks the shape of the model's outputs.

        Raises:
            ConfigError: outputs are not [size, tokens, vocabulary].
        """
        if outputs.ndim != 3:
            raise ConfigError(f"the model returns outputs of shape {list(outputs.shape)}, not [size, tokens, vocabulary]")

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of a batch; an example counts once, however many tokens it has.

        Args:
            outputs: logits [size, tokens, vocabulary], or [rows, tokens, vocabulary] of packed examples.
            labels: [size, tokens], or those of packed examples [rows, tokens, 2]; see `data.packing.packed`.
        """
        if labels.ndim == 2:
            return super().loss(outputs, labels)
        labels, learned = labels.unbind(-1)
        token_losses, targets = _token_losses(outputs.float(), labels)
        shares = (targets != IGNORED) / learned[:, 1:]  # of a token in the mean of its example
        return (token_losses * shares).sum() / shares.sum().round()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        token_losses, targets = _token_losses(outputs, labels)
        return token_losses.sum(-1) / (targets != IGNORED).sum(-1)

    def records(self, outputs: Tensor, labels: Tensor) -> Tensor:
        token_losses, targets = _token_losses(outputs, labels)
        correct = (outputs[:, :-1].argmax(-1) == targets).sum(-1)
        return torch.stack([token_losses.double().sum(-1), (targets != IGNORED).sum(-1), correct], 1).double()

    def metrics(self, records: Tensor, labels: Tensor) -> Metrics:
        losses, number, correct = records.unbind(-1)
        return {
            "loss": float((losses / number).mean()),
            "perplexity": float((losses.sum() / number.sum()).exp()),
            "token_accuracy": float(correct.sum() / number.sum()),
            "exact": float((correct == number).double().mean()),
        }

    def predictions(self, records: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        losses, number, correct = records.unbind(-1)
        return {"tokens": number.long().tolist(), "right": correct.long().tolist(), "loss": (losses / number).tolist()}


def _token_losses(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss (0 where it is ignored) and the label of each next token, both [size, tokens - 1]."""
    targets = labels[:, 1:]
    losses = functional.cross_entropy(outputs[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return losses, targets
