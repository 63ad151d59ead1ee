"""The fundamental set: one bit per eligible weight, by parameter name, under any engine and any number of ranks.

In memory each rank holds the bits of its own boxes; on disk the set is one safetensors file with one bit a weight.
Everything that needs the bits of a whole weight goes weight by weight, so no rank ever holds the full mask as booleans.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..distributed import collectives
from ..engines.box import Box
from ..errors import FundamentalSetError, did_you_mean, listing
from ..files import TensorFile
from .bits import Packed, cut, num_bytes, pack, paste, popcount, unpack

FORMAT = "dcft_dist.fundamental.v1"


Reader = Callable[[str], Packed]  # name -> packed bits of the whole weight


@dataclass(frozen=True)
class SetInfo:
    """Everything about a fundamental set but its bits.

    `counts` is the number of selected weights per name, `threshold` the lowest selected score of a global selection
    (None for other scopes and for sets made from masks), `unscored` what was neither eligible nor head when scored.
    """

    shapes: dict[str, tuple[int, ...]]
    counts: dict[str, int]
    fraction: float
    criterion: str = "given"
    scope: str = "given"
    threshold: float | None = None
    head: tuple[str, ...] = ()
    unscored: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    num_weights: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> SetInfo:
        raw = json.loads(text)
        raw["shapes"] = {name: tuple(shape) for name, shape in raw["shapes"].items()}
        for key in ("head", "unscored", "frozen"):
            raw[key] = tuple(raw[key])
        return SetInfo(**raw)


class FundamentalSet:
    """Which weights are fundamental.

    Attributes:
        info: names, shapes, counts and provenance (`SetInfo`).

    `mask`, `save` and `jaccard` are collective for a set that was selected over several ranks: call them on every
    rank. A set that was loaded or made from masks is complete on each rank, and needs no communication.
    """

    def __init__(self, info: SetInfo, reader: Reader) -> None:
        self.info = info
        self._reader = reader

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the eligible weights, in model order."""
        return tuple(self.info.shapes)

    @property
    def num_selected(self) -> int:
        return sum(self.info.counts.values())

    @property
    def num_eligible(self) -> int:
        return sum(prod(shape) for shape in self.info.shapes.values())

    @property
    def fraction(self) -> float:
        """The fraction that was asked for (for a set made from masks: the fraction selected)."""
        return self.info.fraction

    @property
    def threshold(self) -> float | None:
        return self.info.threshold

    def __repr__(self) -> str:
        share = self.num_selected / max(self.num_eligible, 1)
        return (
            f"FundamentalSet({self.num_selected:,} of {self.num_eligible:,} eligible weights = {share:.4%}, "
            f"{len(self.names)} tensors, criterion {self.info.criterion}, scope {self.info.scope})"
        )

    def packed(self, name: str) -> Packed:
        """Packed bits of one whole weight (see `bits`). Collective for a set selected over several ranks."""
        if name not in self.info.shapes:
            raise FundamentalSetError(f"{name!r} is not in the fundamental set{did_you_mean(name, self.names)}")
        return self._reader(name)

    def mask(self, name: str) -> Tensor:
        """Boolean tensor of the weight's full shape, on the CPU; True where fundamental.

        Raises:
            FundamentalSetError: the set has no weight of that name.
        """
        shape = self.info.shapes.get(name, ())
        return unpack(self.packed(name), prod(shape)).view(shape)

    def mask_in(self, name: str, box: Box) -> Tensor:
        """Flat boolean tensor of the cells of a box in a weight, on the CPU. Collective as `mask` is."""
        return unpack(cut(self.packed(name), box), box.numel)

    def jaccard(self, other: FundamentalSet, names: Iterable[str] | None = None) -> float:
        """Size of the intersection over size of the union with `other`; 1.0 for two empty sets.

        Args:
            names: only within these weights.

        Raises:
            FundamentalSetError: the two sets are not over the same weights.
        """
        if self.info.shapes != other.info.shapes:
            odd = sorted(set(self.info.shapes.items()) ^ set(other.info.shapes.items()))
            raise FundamentalSetError(f"the two sets differ in {listing(dict.fromkeys(name for name, _ in odd))}")
        both = either = 0
        for name in self.names if names is None else names:
            a, b = self.packed(name), other.packed(name)
            both, either = both + popcount(a & b), either + popcount(a | b)
        return both / either if either else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the set: rank 0 writes a temporary file weight by weight, then renames it. Collective.

        The file is safetensors: per weight a uint8 tensor of ceil(numel / 8) bytes, bit i % 8 of byte i // 8 being flat
        index i; the metadata hold `info` as JSON and a SHA-256 of it and all bits.
        """
        file: TensorFile | None = None
        with collectives.agreed("save fundamental set"):
            if collectives.rank() == 0:
                sizes = {name: num_bytes(prod(shape)) for name, shape in self.info.shapes.items()}
                text = self.info.to_json()
                file = TensorFile(
                    Path(path),
                    {name: ("U8", (size,), size) for name, size in sizes.items()},
                    {"format": FORMAT, "info": text},
                    seed=text.encode(),
                )
        for name in self.names:
            bits = self.packed(name)
            if file is not None:
                file.write(bits.tobytes())
        with collectives.agreed("save fundamental set"):
            if file is not None:
                file.close()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FundamentalSet:
        """Opens a saved set and checks its checksum; bits are read from the file weight by weight when needed. Local.

        Raises:
            FundamentalSetError: there is no such file, or it is truncated, altered, or no fundamental set.
        """
        source = Path(path)
        if not source.is_file():
            raise FundamentalSetError(f"no fundamental set at {source}")
        try:
            with safe_open(source, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise FundamentalSetError(f"{source} is a safetensors file, but no fundamental set")
                info = SetInfo.from_json(metadata["info"])
                digest = hashlib.sha256(info.to_json().encode())
                for name in info.shapes:
                    digest.update(file.get_tensor(name).tobytes())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FundamentalSetError(f"{source} is truncated or damaged, or no safetensors file: {error}") from error
        if digest.hexdigest() != metadata.get("sha256"):
            raise FundamentalSetError(f"{source} was altered after it was saved: its checksum does not match")

        def read(name: str) -> Packed:
            with safe_open(source, framework="numpy") as file:
                bits: Packed = file.get_tensor(name)
                return bits

        return cls(info, read)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], *, head: Iterable[str] = ()) -> FundamentalSet:
        """A set from boolean tensors of full shape; every given name is eligible, whatever kind of weight it is.

        Args:
            masks: canonical parameter name -> BoolTensor of the parameter's full shape, the same on every rank.
            head: patterns of the head, which no multiplier touches.

        Raises:
            FundamentalSetError: a mask is not boolean, or there is none.
        """
        wrong = [name for name, m in masks.items() if m.dtype != torch.bool]
        if wrong or not masks:
            raise FundamentalSetError(f"masks must be boolean tensors: {listing(wrong) or 'none was given'}")
        bits = {name: pack(mask) for name, mask in masks.items()}
        counts = {name: popcount(b) for name, b in bits.items()}
        eligible = sum(mask.numel() for mask in masks.values())
        info = SetInfo(
            shapes={name: tuple(mask.shape) for name, mask in masks.items()},
            counts=counts,
            fraction=sum(counts.values()) / max(eligible, 1),
            head=(head,) if isinstance(head, str) else tuple(head),
        )
        return cls(info, bits.__getitem__)

    @classmethod
    def from_pieces(cls, info: SetInfo, pieces: Mapping[str, tuple[Box, Packed]]) -> FundamentalSet:
        """A set whose bits are spread over the ranks: this rank's owned box of each weight, and its packed bits."""

        def gather(name: str) -> Packed:
            whole = np.zeros(num_bytes(prod(info.shapes[name])), dtype=np.uint8)
            if name in pieces:
                box, bits = pieces[name]
                paste(bits, box, whole)
            # Owned boxes are disjoint, so no bit is set twice and the sum of the bytes is their union.
            union = collectives.all_reduce(torch.from_numpy(whole), what=f"bits of {name}").numpy()
            return union

        return cls(info, gather)

    def with_extra(self, **extra: Any) -> FundamentalSet:
        """The same set with more provenance in `info.extra` (JSON values)."""
        return FundamentalSet(replace(self.info, extra={**self.info.extra, **extra}), self._reader)
