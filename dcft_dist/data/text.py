"""Texts as token ids.

`TextProcessor` is for texts with a label. `AnswerProcessor` is for instructions with an answer: a causal language model
learns only the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, line_of
from .batches import Processor
from .packing import IGNORED, packed
from .splits import Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedTexts:
    """A tokenized split of texts with a label.

    Attributes:
        ids: token ids of each text.
        labels: label of each text.
        pad_id: token id that fills shorter texts.
    """

    ids: list[list[int]]
    labels: list[Any]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, index: int) -> int:
        """Returns the number of tokens of a text."""
        return len(self.ids[index])

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns `input_ids` and `attention_mask` [size, tokens], padded to the longest text."""
        rows = [self.ids[i] for i in indices]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": attention}


class TextProcessor(Processor):
    """Tokenizes texts."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Prepares the processor.

        Args:
            tokenizer: a tokenizer of transformers.
            max_tokens: longer texts are cut to this many tokens.
        """
        self.tokenizer, self._max_tokens = tokenizer, max_tokens

    def __call__(self, split: Split) -> TokenizedTexts:
        ids = self.tokenizer(split.inputs, truncation=True, max_length=self._max_tokens)["input_ids"]
        return TokenizedTexts([list(row) for row in ids], split.labels, pad_id(self.tokenizer))

    def describe(self, value: Any, label: Any) -> str:
        """Length of the text, and whether the model gets all of it."""
        tokens = len(self.tokenizer(value)["input_ids"])
        cut = f", of which the model gets the first {self._max_tokens}" if tokens > self._max_tokens else ""
        return f"{len(value)} characters, {tokens} tokens{cut}"

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def pad_id(tokenizer: Any) -> int:
    """Returns the id of the padding token, or of the end of the text if the tokenizer has no padding (GPT-2, Llama).

    Either works, because the attention mask excludes the padding.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in candidates if token is not None)


@dataclass(frozen=True)
class TokenizedAnswers:
    """A tokenized split of instructions with their answers.

    Attributes:
        ids: token ids of each instruction and its answer.
        given: number of tokens of each instruction.
        pad_id: token id that fills shorter texts.
        labels: placeholders; the labels are tokens and part of `inputs`.
        packs: whether training examples share rows (`data.packing.packed`).
        width: tokens of such a row; None: one row for all.
    """

    ids: list[list[int]]
    given: list[int]
    pad_id: int
    labels: list[int] = field(default_factory=list)
    packs: bool = False
    width: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def length(self, index: int) -> int:
        """Returns the number of tokens of a text."""
        return len(self.ids[index])

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels` [size, tokens], padded to the longest text; or packed.

        `labels` are the ids of the answers, and `IGNORED` elsewhere.
        """
        if self.packs and draw is not None:
            return packed([self.ids[i] for i in indices], [self.given[i] for i in indices], self.width, self.pad_id)
        width = max(len(self.ids[i]) for i in indices)
        ids = torch.full((len(indices), width), self.pad_id)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, i in enumerate(indices):
            text_ids = torch.tensor(self.ids[i])
            ids[row, : len(text_ids)], attention[row, : len(text_ids)] = text_ids, 1
            labels[row, self.given[i] : len(text_ids)] = text_ids[self.given[i] :]
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}


class AnswerProcessor(Processor):
    """Tokenizes the template with the instruction in it, followed by the answer and the end of the text; or a chat."""

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        template: str,
        chat: bool = False,
        system: str | None = None,
        packing: bool = False,
        one_row: bool = False,
    ) -> None:
        """Prepares the processor.

        Args:
            tokenizer: a tokenizer of transformers.
            max_tokens: longer texts are cut to this many tokens.
            template: text around the instruction, which replaces `{input}`.
            chat: whether the tokenizer's chat template is used in place of `template`.
            system: text of the system's turn in a chat; None: there is none.
            packing: whether training examples share rows.
            one_row: `packing`: in one row, however long, as attention kernels for texts of different lengths take them.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        self.tokenizer, self._max_tokens, self._template = tokenizer, max_tokens, template
        self._chat, self._system = chat, system
        self._packing, self._width = packing, None if one_row else max_tokens
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("data.chat: the tokenizer has no chat template: use data.template")

    def __call__(self, split: Split) -> TokenizedAnswers:
        """Returns the tokenized split, and warns of answers that are cut.

        Raises:
            DataError: an instruction leaves no room for its answer.
        """
        prompts = self.prompts(split)
        answers = self._answers(split, prompts)
        whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        ids, prompt_lengths = [row[: self._max_tokens] for row in whole], [len(prompt) for prompt in prompts]
        if cut := sum(len(row) > self._max_tokens for row in whole):
            log.warning("%d of %d answers are cut at task.max_tokens = %d", cut, len(ids), self._max_tokens)
        without_answer = [i for i, length in enumerate(prompt_lengths) if length >= len(ids[i])]
        if without_answer:
            raise DataError(
                f"{len(without_answer)} instructions leave no room for an answer in {self._max_tokens} tokens, such as "
                f"{str(split.inputs[without_answer[0]])[:60]!r}: raise task.max_tokens"
            )
        labels, padding = [0] * len(ids), pad_id(self.tokenizer)
        return TokenizedAnswers(ids, prompt_lengths, padding, labels, self._packing, self._width)

    def prompts(self, split: Split) -> list[list[int]]:
        """Returns the token ids of each instruction in the template, up to where its answer begins."""
        if self._chat:
            return [self._turns(text) for text in split.inputs]
        texts = [self._template.replace("{input}", str(text)) for text in split.inputs]
        return [list(row) for row in self.tokenizer(texts)["input_ids"]]

    def _answers(self, split: Split, prompts: list[list[int]]) -> list[list[int]]:
        """Token ids of each answer, with the end of the text or of its turn.

        Raises:
            DataError: the chat template does not begin a chat with an answer as it begins one without.
        """
        if not self._chat:
            answers = self.tokenizer([str(text) for text in split.labels], add_special_tokens=False)["input_ids"]
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            return [[*answer, *end] for answer in answers]
        found = []
        for text, label, prompt in zip(split.inputs, split.labels, prompts, strict=True):
            chat = self._turns(text, str(label))
            if chat[: len(prompt)] != prompt:
                raise DataError(
                    "data.chat: the tokenizer's template writes an instruction with its answer in another way than one that "
                    "waits for it, so it is not known where the answer begins: use data.template"
                )
            found.append(chat[len(prompt) :])
        return found

    def _turns(self, text: Any, answer: str | None = None) -> list[int]:
        """Token ids of a chat, up to where the answer begins, or with the answer."""
        turns = [{"role": "system", "content": self._system}] if self._system is not None else []
        turns.append({"role": "user", "content": str(text)})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        try:
            found = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=answer is None, tokenize=True, return_dict=False
            )
        except Exception as error:  # raised by the template, which is a program
            raise DataError(f"data.chat: the tokenizer's template refuses a chat: {line_of(error)}") from error
        return list(found)

    def describe(self, value: Any, label: Any) -> str:
        """Length of instruction and answer, and how the answer begins."""
        split = Split([value], [str(label)], [""])
        (prompt,) = self.prompts(split)
        given, answer = len(prompt), len(self._answers(split, [prompt])[0])
        cut = f", together cut at {self._max_tokens}" if given + answer >= self._max_tokens else ""
        return f"{given} tokens, answer of {answer} tokens{cut}: {str(label)[:40]!r}"

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
