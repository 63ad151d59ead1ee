"""Instructions and their answers as a causal language model takes them: only the answer is learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ConfigError, DataError
from .objective import Metrics, Objective
from .splits import Split

log = logging.getLogger(__name__)
IGNORED = -100  # label of what is not learned


def pad_id(tokenizer: Any) -> int:
    """The token that fills up, or where there is none (GPT-2, Llama) the end of the text: attention passes over it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


@dataclass(frozen=True)
class Answers:
    """A tokenized split: token ids of instruction and answer, and how many of them are the instruction's."""

    ids: list[list[int]]
    given: list[int]
    pad_id: int
    labels: list[int] = field(default_factory=list)  # nothing: the labels are tokens, in `inputs`

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, index: int) -> int:
        return len(self.ids[index])

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Padded to the longest; `labels` [size, tokens] are the ids of the answers."""
        width = max(len(self.ids[i]) for i in indices)
        ids = torch.full((len(indices), width), self.pad_id)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, i in enumerate(indices):
            found = torch.tensor(self.ids[i])
            ids[row, : len(found)], attention[row, : len(found)] = found, 1
            labels[row, self.given[i] : len(found)] = found[self.given[i] :]
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}


class AnswerProcessor:
    """Tokens of `template` filled with the instruction, then those of the answer and the end of the text."""

    def __init__(self, tokenizer: Any, max_tokens: int, template: str) -> None:
        self.tokenizer, self._max_tokens, self._template = tokenizer, max_tokens, template

    def __call__(self, split: Split) -> Answers:
        """
        Raises:
            DataError: an instruction leaves no room for its answer.
        """
        prompts = self.prompts(split)
        answers = self.tokenizer([str(text) for text in split.labels], add_special_tokens=False)["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = [[*prompt, *answer, *end][: self._max_tokens] for prompt, answer in zip(prompts, answers, strict=True)]
        given = [len(prompt) for prompt in prompts]
        wholes = zip(prompts, answers, strict=True)
        if cut := sum(len(p) + len(a) + len(end) > self._max_tokens for p, a in wholes):
            log.warning("%d of %d answers are cut at task.max_tokens = %d", cut, len(ids), self._max_tokens)
        full = [i for i, n in enumerate(given) if n >= len(ids[i])]
        if full:
            raise DataError(
                f"{len(full)} instructions leave no room for an answer in {self._max_tokens} tokens, such as "
                f"{str(split.inputs[full[0]])[:60]!r}: raise task.max_tokens"
            )
        return Answers(ids, given, pad_id(self.tokenizer), [0] * len(ids))

    def prompts(self, split: Split) -> list[list[int]]:
        """Token ids of each instruction, up to where its answer begins."""
        texts = [self._template.replace("{input}", str(text)) for text in split.inputs]
        return [list(row) for row in self.tokenizer(texts)["input_ids"]]

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        return None

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


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
