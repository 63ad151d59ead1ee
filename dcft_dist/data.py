"""Batches: which texts go to which rank at which step is a function of (seed, epoch, step, rank) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tasks import Split

Batch = dict[str, Tensor]  # input_ids, attention_mask [size, tokens]; labels, index [size]; real [size] (False: padding)


@dataclass(frozen=True)
class Tokens:
    """A tokenized split: token ids of each text, labels."""

    ids: list[list[int]]
    labels: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], device: torch.device, real: int | None = None) -> Batch:
        """Texts padded to the longest of them; only the first `real` samples count."""
        rows = [self.ids[i] for i in indices]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        attention = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, : len(row)] = 1
        labels = torch.tensor([self.labels[i] for i in indices])
        counted = torch.arange(len(rows)) < (len(rows) if real is None else real)
        batch = {
            "input_ids": ids,
            "attention_mask": attention,
            "labels": labels,
            "real": counted,
            "index": torch.tensor(indices),
        }
        return {key: value.to(device) for key, value in batch.items()}


def tokenize(split: Split, tokenizer: Any, max_tokens: int) -> Tokens:
    ids = tokenizer(split.texts, truncation=True, max_length=max_tokens)["input_ids"]
    return Tokens([list(row) for row in ids], split.labels, tokenizer.pad_token_id)


def order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of the training data in one epoch."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(size)]


def micro_batches(
    indices: Sequence[int], rank: int, ranks: int, micro_batch: int, tokens: Tokens, device: torch.device
) -> list[Batch]:
    """This rank's part of one global batch, cut into micro-batches of equal size."""
    share = len(indices) // ranks
    mine = indices[rank * share : (rank + 1) * share]
    return [tokens.batch(mine[i : i + micro_batch], device) for i in range(0, share, micro_batch)]


def evaluation_batches(
    tokens: Tokens, rank: int, ranks: int, size: int, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """Every text once over all ranks, in batches of `size` a rank, as many on every rank: the last are padded.

    With `limit`, an even sample of that many texts.
    """
    n = len(tokens)
    wanted = list(range(n)) if limit is None or limit >= n else [int(i) for i in np.linspace(0, n - 1, limit).round()]
    wanted.sort(key=lambda i: len(tokens.ids[i]))  # texts of like length together: less padding
    for begin in range(0, len(wanted), size * ranks):
        mine = wanted[begin : begin + size * ranks][rank::ranks]
        filler = [wanted[0]] * (1 if not mine else 0)  # no rank may skip a forward that the others take part in
        yield tokens.batch(mine + filler, device, real=len(mine))
