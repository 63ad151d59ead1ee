"""Batches: which examples go to which rank at which step is a function of (seed, epoch, step, rank) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import DcftError, alone
from .files import write_json
from .language import pad_id
from .splits import Split

# `labels`, `index` [size]; `real` [size] (False: padding); and the inputs: `input_ids`, `attention_mask` [size, tokens], or
# `pixel_values` [size, 3, side, side].
Batch = dict[str, Tensor]


class Examples(Protocol):
    """A split as a model takes it."""

    @property
    def labels(self) -> list[Any]: ...

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Examples of like length are evaluated together."""

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`draw`: which random variant of the examples to train on (an epoch; 0: none); None: whole ones to evaluate."""


class Processor(Protocol):
    """Makes inputs of a split."""

    def __call__(self, split: Split) -> Examples: ...

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        """Reads all inputs once, each rank its part, where they could be damaged.

        Raises:
            DataError: some cannot be read; the first are named.
        """

    def save(self, folder: Path) -> None:
        """Writes what transformers reads as a tokenizer or image processor, if there is such a thing."""


@dataclass(frozen=True)
class Tokens:
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


@dataclass(frozen=True)
class Images:
    """Grey images [size, height, width] of uint8, given to the model as `side` x `side` in three equal channels."""

    pixels: Tensor
    labels: list[Any]
    side: int

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """Normalised as ImageNet's are."""
        grey = self.pixels[list(indices)].unsqueeze(1).float() / 255
        sized = functional.interpolate(grey, (self.side, self.side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return {"pixel_values": (sized.expand(-1, 3, -1, -1) - mean) / std}


@dataclass(frozen=True)
class OneByOne:
    """A split whose inputs are made one at a time, from files: images, volumes. `make`: of a source, and which variant."""

    sources: list[Any]
    labels: list[Any]
    name: str
    make: Callable[[Any, str | None], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        return 0

    def inputs(self, indices: Sequence[int], draw: int | None = None) -> dict[str, Tensor]:
        """`name` [size, ...]."""
        return {self.name: torch.stack([self.make(self.sources[i], f"{draw}:{i}" if draw else None) for i in indices])}


class TextProcessor:
    """Makes tokens of texts."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self._max_tokens = tokenizer, max_tokens

    def __call__(self, split: Split) -> Tokens:
        ids = self.tokenizer(split.inputs, truncation=True, max_length=self._max_tokens)["input_ids"]
        return Tokens([list(row) for row in ids], split.labels, pad_id(self.tokenizer))

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        return None

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class ImageProcessor:
    """Scales images to a size."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, split: Split) -> Images:
        return Images(torch.from_numpy(split.inputs), split.labels, self.side)

    def check(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        return None

    def save(self, folder: Path) -> None:
        """As transformers' image processors read it."""
        facts = {"size": {"height": self.side, "width": self.side}, "image_mean": [0.485, 0.456, 0.406]}
        write_json(
            folder / "preprocessor_config.json",
            {**facts, "image_std": [0.229, 0.224, 0.225], "resample": 2, "do_center_crop": False},
        )


def make_batch(
    examples: Examples,
    indices: Sequence[int],
    device: torch.device,
    real: int | None = None,
    draw: int | None = None,
) -> Batch:
    """Only the first `real` samples count."""
    try:
        inputs = examples.inputs(indices, draw)
    except DcftError as error:
        alone(error)  # other ranks read other examples
        raise
    batch = {
        "labels": torch.tensor([examples.labels[i] for i in indices]),
        **inputs,
        "real": torch.arange(len(indices)) < (len(indices) if real is None else real),
        "index": torch.tensor(indices),
    }
    return {key: value.to(device) for key, value in batch.items()}


def order(seed: int, epoch: int, size: int, classes: Sequence[int] | None = None) -> list[int]:
    """The permutation of the training data in one epoch; with `classes`, as many draws, all classes equally likely."""
    draw = np.random.default_rng([seed, epoch])
    if classes is None:
        return [int(i) for i in draw.permutation(size)]
    counts = np.bincount(classes)
    weights = 1 / counts[np.asarray(classes)]
    return [int(i) for i in draw.choice(size, size, p=weights / weights.sum())]


def micro_batches(
    indices: Sequence[int],
    rank: int,
    ranks: int,
    micro_batch: int,
    examples: Examples,
    device: torch.device,
    draw: int | None = None,
) -> list[Batch]:
    """This rank's part of one global batch, cut into micro-batches of equal size."""
    share = len(indices) // ranks
    mine = indices[rank * share : (rank + 1) * share]
    return [make_batch(examples, mine[i : i + micro_batch], device, draw=draw) for i in range(0, share, micro_batch)]


def evaluation_batches(
    examples: Examples, rank: int, ranks: int, size: int, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """Every example once over all ranks, in batches of `size` a rank, as many on every rank: the last are padded.

    With `limit`, an even sample of that many.
    """
    n = len(examples)
    wanted = list(range(n)) if limit is None or limit >= n else [int(i) for i in np.linspace(0, n - 1, limit).round()]
    wanted.sort(key=examples.length)  # texts of like length together: less padding
    for begin in range(0, len(wanted), size * ranks):
        mine = wanted[begin : begin + size * ranks][rank::ranks]
        filler = [wanted[0]] * (1 if not mine else 0)  # no rank may skip a forward that the others take part in
        yield make_batch(examples, mine + filler, device, real=len(mine))
