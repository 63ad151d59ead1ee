"""Instructions and their answers as a causal language model takes them: only the answer is learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .batches import Processor
from .splits import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedTexts:
    """A tokenized split: token ids of each text, labels."""

    ids: list[list[int]]
    labels: list[Any]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, index: int) -> int:
        return len(self.ids[index])

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Texts padded to the longest of them."""
        rows = [self.ids[i] for i in indices]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": attention}


class TextProcessor(Processor):
    """Makes tokens of texts."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self._max_tokens = tokenizer, max_tokens

    def __call__(self, split: Split) -> TokenizedTexts:
        ids = self.tokenizer(split.inputs, truncation=True, max_length=self._max_tokens)["input_ids"]
        return TokenizedTexts([list(row) for row in ids], split.labels, pad_id(self.tokenizer))

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


IGNORED = -100  # label of what is not learned


def pad_id(tokenizer: Any) -> int:
    """The token that fills up, or where there is none (GPT-2, Llama) the end of the text: attention passes over it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


@dataclass(frozen=True)
class TokenizedAnswers:
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


class AnswerProcessor(Processor):
    """Tokens of `template` filled with the instruction, then those of the answer and the end of the text."""

    def __init__(self, tokenizer: Any, max_tokens: int, template: str) -> None:
        self.tokenizer, self._max_tokens, self._template = tokenizer, max_tokens, template

    def __call__(self, split: Split) -> TokenizedAnswers:
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
        return TokenizedAnswers(ids, given, pad_id(self.tokenizer), [0] * len(ids))

    def prompts(self, split: Split) -> list[list[int]]:
        """Token ids of each instruction, up to where its answer begins."""
        texts = [self._template.replace("{input}", str(text)) for text in split.inputs]
        return [list(row) for row in self.tokenizer(texts)["input_ids"]]

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
