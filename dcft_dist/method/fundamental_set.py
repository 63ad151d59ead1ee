"""The fundamental set: one bit per eligible weight, by parameter name, under any engine and any number of ranks.

In memory each rank stores the bits of its own boxes. On disk the set is one safetensors file with one bit per weight.
Code that needs the bits of whole weights handles one weight at a time. No rank ever stores the full mask as booleans.
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
from ..tensor_file import TensorFile
from .bits import Packed, cut, num_bytes, pack, paste, popcount, unpack

FORMAT = "dcft_dist.fundamental.v1"


Reader = Callable[[str], Packed]  # name -> packed bits of the whole weight


@dataclass(frozen=True)
class SetInfo:
    """Everything about a fundamental set except its bits.

    Attributes:
        shapes: canonical name -> full shape of every eligible weight, in model order.
        counts: canonical name -> number of selected weights.
        fraction: the requested share of the eligible weights; for a set built from masks, the selected share.
        criterion: the criterion of the scores; "given" for a set built from masks.
        scope: "global" or "per_tensor"; "given" for a set built from masks.
        threshold: lowest selected score. None unless one cut was made through the whole model (scope "global", no
            active floor or cap) and something was selected.
        head: patterns of the head.
        unscored: names that were neither eligible nor head when the model was scored.
        frozen: names of weights that were not trained when the model was scored.
        num_weights: number of weights of the whole model, head included; 0 for a set built from masks.
        extra: further provenance, as JSON values.
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
        """The information as JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> SetInfo:
        """Reads what `to_json` wrote."""
        raw = json.loads(text)
        raw["shapes"] = {name: tuple(shape) for name, shape in raw["shapes"].items()}
        for key in ("head", "unscored", "frozen"):
            raw[key] = tuple(raw[key])
        return SetInfo(**raw)


class FundamentalSet:
    """The fundamental set: which of the eligible weights are fundamental.

    `select_fundamental(scores)` returns one. `FundamentalSet.load(path)` opens a saved one, and
    `FundamentalSet.from_masks(masks)` builds one from your own boolean tensors.

    A set selected over several ranks has its bits spread over the ranks. Then `mask`, `mask_in`, `packed`, `jaccard` and
    `save` are collective: call them on every rank, in the same order. A set from `load` or `from_masks` is complete on
    each rank. It needs no communication, except that `save` always is collective.

    Attributes:
        info: names, shapes, counts and provenance (`SetInfo`).
    """

    def __init__(self, info: SetInfo, reader: Reader) -> None:
        """Builds a set from its description.

        Args:
            info: names, shapes, counts and provenance.
            reader: canonical name -> packed bits of the whole weight, read when they are needed.
        """
        self.info = info
        self._reader = reader

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the eligible weights, in model order."""
        return tuple(self.info.shapes)

    @property
    def num_selected(self) -> int:
        """Number of fundamental weights."""
        return sum(self.info.counts.values())

    @property
    def num_eligible(self) -> int:
        """Number of eligible weights, fundamental or not."""
        return sum(prod(shape) for shape in self.info.shapes.values())

    @property
    def fraction(self) -> float:
        """The requested share of the eligible weights; for a set built from masks, the selected share."""
        return self.info.fraction

    @property
    def threshold(self) -> float | None:
        """Lowest selected score, or None if no single cut goes through the whole model (`SetInfo.threshold`)."""
        return self.info.threshold

    def __repr__(self) -> str:
        share = self.num_selected / max(self.num_eligible, 1)
        return (
            f"FundamentalSet({self.num_selected:,} of {self.num_eligible:,} eligible weights = {share:.4%}, "
            f"{len(self.names)} tensors, criterion {self.info.criterion}, scope {self.info.scope})"
        )

    def packed(self, name: str) -> Packed:
        """Packed bits of one whole weight. Collective for a set selected over several ranks.

        Args:
            name: canonical parameter name.

        Returns:
            uint8 array of ceil(numel / 8) bytes. Flat index i is bit i % 8 (least significant first) of byte i // 8.

        Raises:
            FundamentalSetError: the set has no weight of that name.
        """
        if name not in self.info.shapes:
            raise FundamentalSetError(f"{name!r} is not in the fundamental set{did_you_mean(name, self.names)}")
        return self._reader(name)

    def mask(self, name: str) -> Tensor:
        """Mask of one weight: True where the weight is fundamental. Collective for a set selected over several ranks.

        Args:
            name: canonical parameter name.

        Returns:
            Boolean tensor of the weight's full shape, on the CPU.

        Raises:
            FundamentalSetError: the set has no weight of that name.
        """
        shape = self.info.shapes.get(name, ())
        return unpack(self.packed(name), prod(shape)).view(shape)

    def mask_in(self, name: str, box: Box) -> Tensor:
        """Mask of the cells of one box in a weight. Collective for a set selected over several ranks.

        Args:
            name: canonical parameter name.
            box: the cells, such as `shard.box` or `shard.owned_box`.

        Returns:
            Flat boolean tensor in the box's row-major order, on the CPU.

        Raises:
            FundamentalSetError: the set has no weight of that name.
        """
        return unpack(cut(self.packed(name), box), box.numel)

    def jaccard(self, other: FundamentalSet, names: Iterable[str] | None = None) -> float:
        """Jaccard index: size of the intersection with `other`, divided by size of the union.

        Collective if one of the sets was selected over several ranks.

        Args:
            other: a set over the same weights.
            names: canonical names of the weights to compare; None for all.

        Returns:
            A number from 0.0 (disjoint) to 1.0 (equal); 1.0 for two empty sets.

        Raises:
            FundamentalSetError: the two sets are not over the same weights, or a name is not in them.
        """
        if self.info.shapes != other.info.shapes:
            differing = sorted(set(self.info.shapes.items()) ^ set(other.info.shapes.items()))
            names_shown = listing(dict.fromkeys(name for name, _ in differing))
            raise FundamentalSetError(
                f"the two sets differ in {names_shown}: only sets over the same weights can be compared"
            )
        intersection = union = 0
        for name in self.names if names is None else names:
            a, b = self.packed(name), other.packed(name)
            intersection, union = intersection + popcount(a & b), union + popcount(a | b)
        return intersection / union if union else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the set to one file. Collective.

        Rank 0 writes a temporary file weight by weight, then renames it to `path`. The format is safetensors: per weight a
        uint8 tensor of ceil(numel / 8) bytes. Flat index i is bit i % 8 (least significant first) of byte i // 8. The
        metadata contain `info` as JSON, and a SHA-256 of `info` and all bits.

        Args:
            path: the file to write; an existing file is replaced.
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
        """Opens a saved set and verifies its checksum, without communication.

        The bits stay in the file and are read weight by weight when needed: keep the file.

        Args:
            path: a file that `save` wrote.

        Raises:
            FundamentalSetError: the file does not exist, is truncated or altered, or is not a fundamental set.
        """
        source = Path(path)
        if not source.is_file():
            raise FundamentalSetError(f"no fundamental set at {source}")
        try:
            with safe_open(source, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise FundamentalSetError(f"{source} is a safetensors file, but not a fundamental set")
                info = SetInfo.from_json(metadata["info"])
                digest = hashlib.sha256(info.to_json().encode())
                for name in info.shapes:
                    digest.update(file.get_tensor(name).tobytes())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FundamentalSetError(f"{source} is truncated or damaged, or not a safetensors file: {error}") from error
        if digest.hexdigest() != metadata.get("sha256"):
            raise FundamentalSetError(f"{source} was altered after it was saved: its checksum does not match")

        def read(name: str) -> Packed:
            with safe_open(source, framework="numpy") as file:
                if (file.metadata() or {}).get("sha256") != digest.hexdigest():
                    raise FundamentalSetError(
                        f"{source} was replaced by another set after it was opened: keep a copy of each"
                    )
                bits: Packed = file.get_tensor(name)
                return bits

        return cls(info, read)

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], *, head: Iterable[str] = ()) -> FundamentalSet:
        """Builds a set from boolean tensors. Every weight in `masks` is eligible, whatever its layer.

        Args:
            masks: canonical parameter name -> boolean tensor of the parameter's full shape; True where the weight is
                fundamental. Pass the same masks on every rank.
            head: patterns of the head, which no multiplier touches; empty for no head.

        Raises:
            FundamentalSetError: a mask is not boolean, or `masks` is empty.
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
        """Builds a set with its bits spread over the ranks.

        Args:
            info: names, shapes, counts and provenance; the same on every rank.
            pieces: name -> this rank's owned box of the weight, and the packed bits of that box.
        """

        def gather(name: str) -> Packed:
            whole = np.zeros(num_bytes(prod(info.shapes[name])), dtype=np.uint8)
            if name in pieces:
                box, bits = pieces[name]
                paste(bits, box, whole)
            # Owned boxes are disjoint, so no bit is set twice and the sum of the bytes is their union.
            all_bits = collectives.all_reduce(torch.from_numpy(whole), what=f"bits of {name}").numpy()
            return all_bits

        return cls(info, gather)

    def with_extra(self, **extra: Any) -> FundamentalSet:
        """Returns the same set with more provenance in `info.extra`; the values must be JSON values."""
        return FundamentalSet(replace(self.info, extra={**self.info.extra, **extra}), self._reader)
