"""Counts what a block of code costs the host: Python calls, dispatcher operations, launches, waits, collectives.

Counts are exact, where times are not. `vit_like` builds the structure on which they are stated.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcft_dist.distributed import collectives

# Operations that only describe memory anew.
VIEWS = {"view", "_unsafe_view", "reshape", "slice", "select", "split", "split_with_sizes", "chunk", "detach", "alias"}
VIEWS |= {"as_strided", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "unbind", "_reshape_alias"}


@dataclass
class Counts:
    """What a block has cost.

    Attributes:
        calls: Python calls of all threads (`sys.setprofile`, event "call").
        operations: dispatcher operations by name, without `VIEWS`.
        views: the others.
        waits: reads of a value, for which a GPU would be waited for.
        sent: collectives of the package.
        where: function -> Python calls.
    """

    calls: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    views: int = 0
    waits: int = 0
    sent: int = 0
    where: Counter[str] = field(default_factory=Counter)

    @property
    def non_views(self) -> int:
        return self.operations.total()


@contextmanager
def python_calls(detailed: bool = False) -> Iterator[Counts]:
    """Counts Python calls and the package's collectives. `detailed`: also by function."""
    counts, before = Counts(), sys.getprofile()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            counts.calls += 1
            if detailed:
                code = frame.f_code
                counts.where[f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}"] += 1

    with collectives.counted() as sent:
        threading.setprofile_all_threads(watch) if hasattr(threading, "setprofile_all_threads") else threading.setprofile(
            watch
        )
        sys.setprofile(watch)
        try:
            yield counts
        finally:
            sys.setprofile(before)
            threading.setprofile(None)
    counts.sent = sent.calls


@contextmanager
def operations() -> Iterator[Counts]:
    """Counts dispatcher operations and reads of values."""
    counts = Counts()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "item", "is_nonzero"):
                counts.waits += 1
            if name in VIEWS:
                counts.views += 1
            else:
                counts.operations[name] += 1
            return func(*args, **(kwargs or {}))

    with Mode():
        yield counts


class Layer(nn.Module):
    """A block with the tensors of a vision transformer's: six matrices and their biases, two norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = torch.softmax(self.query(y) @ self.key(y).transpose(-1, -2), -1) @ self.value(y)
        x = x + self.out(y)
        return x + self.down(torch.nn.functional.gelu(self.up(self.after(x))))


class VitLike(nn.Module):
    """[batch, 12] -> [batch, 3]: 145 eligible of 392 tensors with 24 blocks, as a ViT-L has."""

    def __init__(self, layers: int = 24, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.place, self.first = nn.Parameter(torch.zeros(1, 2, width)), nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).unsqueeze(1)
        y = torch.cat([self.first.expand(len(y), -1, -1), y], 1) + self.place
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])
