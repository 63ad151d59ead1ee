"""Checks that a penalty is in force: each hook fires once per backward, and every gradient to penalise is multiplied.

All ranks check the first step of a weight together. At later steps each rank checks what it can see alone, and sends
nothing. Checks that need all ranks wait until `Penalty.in_force` is called.
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
    """Counts of one leaf with a hook.

    Attributes:
        names: penalised weights in the leaf.
        fired: how often the hook fired since the last step.
        reached: how often a backward reached the leaf since the last step.
        forwards: the number of forwards of the model at the last step (`PenaltyWatch.forwards`).
    """

    names: list[str]
    fired: int = 0
    reached: int = 0
    forwards: int = 0

    def reach(self, _: Any) -> None:
        """Hook for a backward that has reached the leaf."""
        self.reached += 1


class PenaltyWatch:
    """Observes the weights and hooks of one penalty.

    Attributes:
        frozen: names of the weights that were not trained when the penalty was attached.
        leaves: counts of the leaves that have hooks.
        forwards: number of forwards of the model in training.
    """

    def __init__(self, engine: Engine, names: Iterable[str]) -> None:
        """Notes the state of the model when the penalty is attached.

        Args:
            engine: the engine of the model.
            names: names of the penalised weights.
        """
        self._engine, self._names = engine, list(names)
        self._at_attach = engine.stepped()
        self.frozen = tuple(n for n, p in engine.names.parameters.items() if not p.requires_grad)
        self.forwards = 0
        self.leaves: list[LeafCount] = []
        self._agreed: set[str] = set()  # weights whose first step all ranks have checked together
        self._fired: set[str] = set()  # since the ranks last agreed: multiplied on this rank
        self._silent: set[str] = set()  # since then: had a gradient that was not multiplied, both on this rank

    def leaf(self, names: list[str]) -> LeafCount:
        """Adds a leaf with these weights; its hooks update the returned counts."""
        self.leaves.append(LeafCount(names))
        return self.leaves[-1]

    def unhooked(self) -> list[str]:
        """Names of penalised weights that belong to no leaf."""
        covered = {name for count in self.leaves for name in count.names}
        return [name for name in self._names if name not in covered]

    # -- which weights an optimizer steps ------------------------------------------------------------------------------

    def stepped_by(self, optimizer: Optimizer) -> set[str]:
        """Penalised weights that the optimizer steps, in the model as it is now or was when the penalty was attached."""
        return set(self._names).intersection(names_stepped(optimizer, self._at_attach | self._engine.stepped()))

    def concerns(self, optimizer: Optimizer, names: set[str]) -> bool:
        """Whether the optimizer steps penalised weights, or weights that have replaced them.

        Args:
            optimizer: the optimizer that begins a step.
            names: what `stepped_by` returned for it.
        """
        if names:
            return True
        new_ids = self._engine.stepped().keys() - self._at_attach.keys()
        replaced = any(id(p) in new_ids for group in optimizer.param_groups for p in group["params"])
        return replaced or not self._engine.holds()

    def has_lost(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that used to step weights of the model now steps none of them."""
        return not names_stepped(optimizer, self._at_attach | self._engine.stepped())

    def after_step(self, names: set[str]) -> None:
        """Resets the counts of the leaves with these weights, once they have been stepped."""
        for count in self.leaves:
            if names.intersection(count.names):
                count.fired = count.reached = 0
                count.forwards = self.forwards

    # -- checks -----------------------------------------------------------------------------------------------------

    def check(self, names: set[str], factor: float) -> None:
        """Checks the penalty before a step, when the gradients are complete.

        Collective at the first step of a weight.

        Args:
            names: penalised weights that the optimizer steps.
            factor: this rank's factor.

        Raises:
            PenaltyError: the penalty is not in force.
        """
        problem = self._local_problem()
        leaves = [count for count in self.leaves if names.intersection(count.names)]
        with_gradient = self._with_gradient({n for c in leaves if c.fired == 0 for n in c.names})
        self._fired.update(n for c in leaves if c.fired for n in c.names)
        silent = [c for c in leaves if c.fired == 0 and with_gradient.intersection(c.names)]
        self._silent.update(n for c in silent for n in c.names)
        if self.forwards and any(c.forwards == self.forwards for c in silent):  # no forward, so no backward on any rank
            problem = problem or _without_hook([n for c in silent for n in c.names])
        if not names <= self._agreed or collectives.world_size() == 1:
            self.agree(factor, problem)
            self._agreed |= names
        elif problem:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))

    def agree(self, factor: float, problem: str = "", cause: str = "") -> None:
        """Checks over all ranks that the factor is the same, and that each gradient was multiplied on some rank. Collective.

        One rank cannot check this alone: a weight that only this rank does not use gets its gradient from the other ranks.

        Args:
            factor: this rank's factor.
            problem: what this rank has found wrong already, if anything.
            cause: the same, but said only if no consequence of it is found.

        Raises:
            PenaltyError: the penalty is not in force on this or another rank.
        """
        flags = [float(n in names) for names in (self._fired, self._silent) for n in self._names]
        state = [bool(problem or cause), factor, -factor, *flags]
        bad, high, low, *flags = collectives.reduce_numbers(state, "max", what="penalty check")
        fired, unmultiplied = flags[: len(self._names)], flags[len(self._names) :]
        silent = [n for n, f, u in zip(self._names, fired, unmultiplied, strict=True) if u and not f]
        self._fired.clear()
        self._silent.clear()
        if high != -low:
            problem = problem or f"the ranks disagree on the factor ({-low} to {high})"
        if silent:
            problem = problem or _without_hook(silent)
        problem = problem or cause
        if bad or problem:
            raise PenaltyError(f"rank {collectives.rank()}: {problem or 'the penalty is not in force on another rank'}")

    def _local_problem(self) -> str:
        """What this rank alone can see to be wrong, or an empty string."""
        if self._engine.stepped().keys() != self._at_attach.keys() or not self._engine.holds():
            return "the model's weights were replaced after the penalty was attached: attach it after sharding"
        thawed = [n for n in self.frozen if self._engine.names.parameters[n].requires_grad]
        if thawed:
            return f"{listing(thawed)} were frozen when the penalty was attached: attach it again"
        uneven = [c for c in self.leaves if c.fired != c.reached]
        if uneven:
            count = uneven[0]
            return f"the hook of {listing(count.names)} fired {count.fired} times for {count.reached} backwards"
        return ""

    def _with_gradient(self, names: set[str]) -> set[str]:
        """The weights with a gradient on this rank that is not all zero. A gradient cleared in place is all zero."""
        shards: list[Shard] = [s for s in self._engine.shards() if s.name in names] if names else []
        return {s.name for s in shards if (gradient := s.gradient) is not None and bool(gradient.any())}


def _without_hook(names: list[str]) -> str:
    return (
        f"{listing(names)} have a gradient, but no penalty hook fired: check for a second step on the same gradients, "
        "gradients set by hand, or a model that was wrapped again"
    )
