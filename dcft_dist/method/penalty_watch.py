"""Checks that a penalty is in force: each hook fires once per backward, and every gradient to penalise is multiplied.

All ranks check the first step of a weight together. At later steps each rank checks what it can see alone, and sends
nothing. Checks that need all ranks wait until `Penalty.in_force` is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

from ..compat.pytorch import is_capturing
from ..distributed import collectives
from ..engines.base import Engine
from ..engines.current import Current
from ..errors import PenaltyError, alone, listing
from .gradient_hooks import BucketCount, GradientHooks, LeafCount
from .penalty_checks import Optimizer, names_stepped


class PenaltyWatch:
    """Observes the weights and hooks of one penalty.

    Attributes:
        frozen: names of the weights that were not trained when the penalty was attached.
        forwards: number of forwards of the model in training.
        current: the shards of the model.
    """

    def __init__(self, engine: Engine, names: Iterable[str], current: Current, hooks: GradientHooks | None) -> None:
        """Notes the state of the model when the penalty is attached.

        Args:
            engine: the engine of the model.
            names: names of the penalised weights.
            current: the shards of the model.
            hooks: the hooks on gradients, if there are any.
        """
        self._names, self.current = list(names), current
        self._at_attach = current.stepped
        self.frozen = tuple(n for n, p in engine.names.parameters.items() if not p.requires_grad)
        self._frozen = [engine.names.parameters[n] for n in self.frozen]
        self._leaves: list[LeafCount] = hooks.leaves if hooks is not None else []
        self._buckets: list[BucketCount] = hooks.buckets if hooks is not None else []
        self.forwards = 0
        self._ranks = collectives.world_size()
        self._agreed: set[str] = set()  # weights whose first step all ranks have checked together
        self._fired: set[str] = set()  # since the ranks last agreed: multiplied on this rank
        self._silent: set[str] = set()  # since then: had a gradient that was not multiplied, both on this rank
        self._unread: dict[str, Tensor] = {}  # since then: whether they had one, not read yet

    # -- which weights an optimizer steps ------------------------------------------------------------------------------

    def stepped_by(self, optimizer: Optimizer) -> set[str]:
        """Penalised weights that the optimizer steps, in the model as it is now or was when the penalty was attached."""
        return set(self._names).intersection(names_stepped(optimizer, self._at_attach | self.current.stepped))

    def concerns(self, optimizer: Optimizer, names: set[str]) -> bool:
        """Whether the optimizer steps penalised weights, or weights that have replaced them.

        Args:
            optimizer: the optimizer that begins a step.
            names: what `stepped_by` returned for it.
        """
        if names:
            return True
        new_ids = self.current.stepped.keys() - self._at_attach.keys()
        replaced = any(id(p) in new_ids for group in optimizer.param_groups for p in group["params"])
        return replaced or not self.current.holds

    def has_lost(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that used to step weights of the model now steps none of them."""
        return not names_stepped(optimizer, self._at_attach | self.current.stepped)

    def after_step(self, names: set[str]) -> None:
        """Resets the counts of the hooks on these weights, once they have been stepped."""
        for leaf in self._leaves:
            if not names.isdisjoint(leaf.names):
                leaf.fired = 0
                leaf.reached.clear()
                leaf.forwards = self.forwards
        for bucket in self._buckets:
            if not names.isdisjoint(bucket.names):
                bucket.fired.difference_update(names)
                bucket.problem = ""
                bucket.forwards = self.forwards

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
        quiet, old = self._not_multiplied(names)
        if is_capturing():  # nothing can be read, and no other rank be asked
            if new := names - self._agreed:
                problem = problem or f"the first step of {listing(sorted(new))} is checked, so make one before you capture"
            if problem:
                raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))
            return
        self._look_at(quiet)
        if old and self.forwards and (stale := self._with_gradient(old)):  # no forward, so no backward on any rank
            problem = problem or _without_hook(sorted(stale, key=self._names.index))
        if not names <= self._agreed or (self._ranks == 1 and not self._unread):
            self.agree(factor, problem)
            self._agreed |= names
        elif problem:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))

    def _not_multiplied(self, names: set[str]) -> tuple[set[str], set[str]]:
        """Weights among these that no hook has multiplied since the last step; those of them that the model has not computed
        since."""
        quiet: set[str] = set()
        old: set[str] = set()
        for leaf in self._leaves:
            if leaf.fired:
                self._fired.update(leaf.names)
            elif not names.isdisjoint(leaf.names):
                quiet.update(leaf.names)
                if leaf.forwards == self.forwards:
                    old.update(leaf.names)
        for bucket in self._buckets:
            self._fired |= bucket.fired
            missing = names.intersection(bucket.names) - bucket.fired
            quiet |= missing
            if bucket.forwards == self.forwards:
                old |= missing
        return quiet, old

    def _look_at(self, names: set[str]) -> None:
        """Notes which of these weights have a gradient. What lies on a GPU is read when the ranks agree: nobody waits."""
        for name in names:
            gradient = self.current.shards[name].gradient
            if gradient is None:
                continue
            flag = gradient.any()
            if _is_far(flag):
                self._unread[name] = flag | self._unread[name] if name in self._unread else flag
            elif bool(flag):
                self._silent.add(name)

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
        if self._unread:
            flags_read = torch.stack([flag.reshape(()) for flag in self._unread.values()]).tolist()
            self._silent.update(name for name, flag in zip(self._unread, flags_read, strict=True) if flag)
            self._unread.clear()
        if self._ranks == 1:
            bad, high, low, silent = False, factor, -factor, [n for n in self._names if n in self._silent - self._fired]
        else:
            flags = [float(n in names) for names in (self._fired, self._silent) for n in self._names]
            state = [bool(problem or cause), factor, -factor, *flags]
            bad_ranks, high, low, *flags = collectives.reduce_numbers(state, "max", what="penalty check")
            fired, unmultiplied = flags[: len(self._names)], flags[len(self._names) :]
            bad = bool(bad_ranks)
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
        if self.current.stepped.keys() != self._at_attach.keys() or not self.current.holds:
            return "the model's weights were replaced after the penalty was attached: attach it after sharding"
        if any(map(_trained, self._frozen)):
            thawed = [n for n, p in zip(self.frozen, self._frozen, strict=True) if p.requires_grad]
            return f"{listing(thawed)} were frozen when the penalty was attached: attach it again"
        for leaf in self._leaves:
            if leaf.fired != len(leaf.reached):
                return f"the hook of {listing(leaf.names)} fired {leaf.fired} times for {len(leaf.reached)} backwards"
        for count in self._buckets:
            if count.problem:
                return count.problem
            if count.bucket.reached and not count.bucket.waits():
                return (
                    f"the gradients of {listing(count.names, 3)} were reduced without the penalty: the communication of "
                    "their FSDP2 group was replaced between the forward and the reduction"
                )
        return ""

    def _with_gradient(self, names: set[str]) -> set[str]:
        """The weights with a gradient on this rank that is not all zero. A gradient cleared in place is all zero."""
        shards = [self.current.shards[name] for name in self.current.shards if name in names]
        return {s.name for s in shards if (gradient := s.gradient) is not None and bool(gradient.any())}


def _is_far(flag: Tensor) -> bool:
    """Whether reading a number waits for a device."""
    return flag.is_cuda


_trained = attrgetter("requires_grad")


def _without_hook(names: list[str]) -> str:
    return (
        f"{listing(names)} have a gradient, but no penalty hook fired: check for a second step on the same gradients, "
        "gradients set by hand, or a model that was wrapped again"
    )
