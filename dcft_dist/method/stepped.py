"""Which penalised weights an optimizer steps: looked up once, and again only if its parameters or the model have changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from ..engines.base import Shard
from ..engines.current import Current
from .multipliers import Multipliers
from .penalty_checks import Optimizer
from .penalty_watch import PenaltyWatch
from .shard_table import CellBits, ShardTable


@dataclass
class Stepped:
    """What one optimizer steps.

    Attributes:
        optimizer: the optimizer; not kept alive, since it has memory for each weight.
        parameters: the tensors in its groups.
        version: of `Current`, when this was looked up.
        names: penalised weights that it steps.
        shards: this rank's shards of them, in model order.
        table: the same shards, to be multiplied; None where hooks multiply gradients.
        concerned: whether it steps penalised weights, or weights that have replaced them.
    """

    optimizer: weakref.ref[Optimizer]
    parameters: list[Any]
    version: int
    names: set[str]
    shards: list[Shard]
    table: ShardTable | None
    concerned: bool


class SteppedWeights:
    """What each optimizer steps, for one penalty."""

    def __init__(self, current: Current, seen: PenaltyWatch, bits: Mapping[str, CellBits], multipliers: Multipliers) -> None:
        """
        Args:
            current: the shards of the model.
            seen: finds the weights of an optimizer.
            bits: the bits of the penalised shards; empty where hooks multiply gradients.
            multipliers: the numbers.
        """
        self._current, self._seen, self._bits, self._multipliers = current, seen, bits, multipliers
        self._found: dict[int, Stepped] = {}  # by id of the optimizer
        self._every: tuple[int, ShardTable] | None = None

    def by(self, optimizer: Optimizer) -> Stepped:
        """What the optimizer steps now."""
        self._current.refresh()
        parameters = list(chain.from_iterable(map(_parameters, optimizer.param_groups)))
        found = self._found.get(id(optimizer))
        if found is not None and found.version == self._current.version and found.optimizer() is optimizer:
            known = found.parameters
            if len(known) == len(parameters) and all(map(is_, known, parameters)):
                return found
        names = self._seen.stepped_by(optimizer)
        shards = [shard for name, shard in self._current.shards.items() if name in names]
        table = ShardTable(shards, self._bits, self._multipliers) if self._bits else None
        concerned = self._seen.concerns(optimizer, names)
        key = id(optimizer)
        reference = weakref.ref(optimizer, lambda _: self._found.pop(key, None))
        found = Stepped(reference, parameters, self._current.version, names, shards, table, concerned)
        self._found[key] = found
        return found

    def every(self) -> ShardTable:
        """All penalised shards, whichever optimizer steps them."""
        self._current.refresh()
        if self._every is None or self._every[0] != self._current.version:
            shards = [shard for name, shard in self._current.shards.items() if name in self._bits]
            self._every = self._current.version, ShardTable(shards, self._bits, self._multipliers)
        return self._every[1]


_parameters = itemgetter("params")
