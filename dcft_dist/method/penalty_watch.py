"""Whether a penalty is in force: each hook fires once per backward, and what holds a gradient was multiplied.

The first step of a weight is checked by all ranks together. Later steps check what a rank can tell alone, and send nothing;
what only all can tell waits until somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..errors import PenaltyError, alone, listing
from .penalty_checks import Optimizer, names_stepped


@dataclass
class LeafCount:
    """Since the last step: how often a leaf's hook fired, and how often a backward reached the leaf."""

    names: list[str]
    fired: int = 0
    reached: int = 0
    forwards: int = 0  # of the model, up to the last step

    def reach(self, _: Any) -> None:
        self.reached += 1


class PenaltyWatch:
    """What has been seen of a penalty's weights and hooks.

    Attributes:
        frozen: names of weights that were not trained when the penalty was attached.
        leaves: counts of the leaves that have hooks.
        forwards: of the model, in training.
    """

    def __init__(self, engine: Engine, names: Iterable[str]) -> None:
        """`names`: of the penalised weights."""
        self._engine, self._names = engine, list(names)
        self._at_attach = engine.stepped()
        self.frozen = tuple(n for n, p in engine.names.parameters.items() if not p.requires_grad)
        self.forwards = 0
        self.leaves: list[LeafCount] = []
        self._agreed: set[str] = set()  # weights whose first step has been seen by all ranks together
        self._fired: set[str] = set()  # since ranks last agreed: multiplied here
        self._silent: set[str] = set()  # and: held a gradient here that was not multiplied here

    def leaf(self, names: list[str]) -> LeafCount:
        """The count of a leaf with these weights, to be kept by its hooks."""
        self.leaves.append(LeafCount(names))
        return self.leaves[-1]

    def unhooked(self) -> list[str]:
        """Names of weights that no leaf has."""
        covered = {name for count in self.leaves for name in count.names}
        return [name for name in self._names if name not in covered]

    # -- what an optimizer steps ------------------------------------------------------------------------------------

    def stepped_by(self, optimizer: Optimizer) -> set[str]:
        """Names of penalised weights that it steps, as the model is now or was when the penalty was attached."""
        return set(self._names).intersection(names_stepped(optimizer, self._at_attach | self._engine.stepped()))

    def concerns(self, optimizer: Optimizer, names: set[str]) -> bool:
        """Whether it steps weights that are penalised (`names`), or should be: those that have replaced them."""
        if names:
            return True
        new = self._engine.stepped().keys() - self._at_attach.keys()
        replaced = any(id(p) in new for group in optimizer.param_groups for p in group["params"])
        return replaced or not self._engine.holds()

    def has_lost(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that stepped the model's weights steps none of them any more."""
        return not names_stepped(optimizer, self._at_attach | self._engine.stepped())

    def after_step(self, names: set[str]) -> None:
        for count in self.leaves:
            if names.intersection(count.names):
                count.fired = count.reached = 0
                count.forwards = self.forwards

    # -- checks -----------------------------------------------------------------------------------------------------

    def check(self, names: set[str], factor: float) -> None:
        """Before a step of these weights, once their gradients are there.

        Raises:
            PenaltyError: it is not in force.
        """
        problem = self._local_problem()
        leaves = [count for count in self.leaves if names.intersection(count.names)]
        held = self._held({n for c in leaves if c.fired == 0 for n in c.names})
        self._fired.update(n for c in leaves if c.fired for n in c.names)
        silent = [c for c in leaves if c.fired == 0 and held.intersection(c.names)]
        self._silent.update(n for c in silent for n in c.names)
        if self.forwards and any(c.forwards == self.forwards for c in silent):  # no rank can have had a backward
            problem = problem or _without_hook([n for c in silent for n in c.names])
        if not names <= self._agreed or collectives.world_size() == 1:
            self.agree(factor, problem)
            self._agreed |= names
        elif problem:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))

    def agree(self, factor: float, problem: str = "") -> None:
        """All ranks together: the factor is the same, and what holds a gradient was multiplied on some rank. A weight that
        is unused on this rank alone gets its gradient from the others. Collective.

        Raises:
            PenaltyError: it is not in force, here (`problem`) or on another rank.
        """
        seen = [float(n in where) for where in (self._fired, self._silent) for n in self._names]
        state = [bool(problem), factor, -factor, *seen]
        bad, high, low, *seen = collectives.reduce_numbers(state, "max", what="penalty check")
        fired, held = seen[: len(self._names)], seen[len(self._names) :]
        silent = [n for n, f, h in zip(self._names, fired, held, strict=True) if h and not f]
        self._fired.clear()
        self._silent.clear()
        if high != -low:
            problem = problem or f"the ranks disagree on the factor ({-low} to {high})"
        if silent:
            problem = problem or _without_hook(silent)
        if bad or problem:
            raise PenaltyError(f"rank {collectives.rank()}: {problem or 'another rank is without penalty'}")

    def _local_problem(self) -> str:
        if self._engine.stepped().keys() != self._at_attach.keys() or not self._engine.holds():
            return "the model's weights were replaced after the penalty was attached: attach it after sharding"
        thawed = [n for n in self.frozen if self._engine.names.parameters[n].requires_grad]
        if thawed:
            return f"{listing(thawed)} were frozen when the penalty was attached: attach it again"
        uneven = [c for c in self.leaves if c.fired != c.reached]
        if uneven:
            c = uneven[0]
            return f"the hook of {listing(c.names)} fired {c.fired} times for {c.reached} backwards"
        return ""

    def _held(self, names: set[str]) -> set[str]:
        """Those weights whose gradient here is not all zero (zeros: cleared in place, and not reached since)."""
        shards: list[Shard] = [s for s in self._engine.shards() if s.name in names] if names else []
        return {s.name for s in shards if (gradient := s.gradient) is not None and bool(gradient.any())}


def _without_hook(names: list[str]) -> str:
    return (
        f"{listing(names)} hold a gradient, but no hook fired: a second step on the same gradients, gradients set by "
        "hand, or a model that was wrapped again"
    )
