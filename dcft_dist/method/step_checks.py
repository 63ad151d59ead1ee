"""Does the optimizer go on from what the penalty writes? Found by behaviour, not by a list of names.

At the update level the penalty shortens a step by writing into the parameter after `optimizer.step`. An optimizer that keeps
weights of its own (master copies, offloaded ones, further iterates) and copies them back undoes that. So at its steps 1 to
6, 8, 16 and so on, and at the next one after each `Penalty.in_force`, two things are checked:

- a trial: two small tensors, equal but for a constant, take the place of one weight for one step. What is left of the
  constant says how far the step goes on from the parameter. No other weight may change meanwhile.
- samples of what the penalty wrote, compared before the next step.

Other steps cost nothing, and one that is captured in a CUDA graph is not checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..compat.pytorch import has_values, is_capturing
from ..distributed import collectives
from ..engines.base import Shard, local_tensor
from ..engines.current import Current
from ..errors import PenaltyError, alone, line_of, listing
from .trial_step import decay, distance_left

Optimizer = torch.optim.Optimizer

_LEFT = 0.95  # of the distance of a trial, that must be left, besides what weight decay takes away (lr * weight_decay)
_SAMPLE = 1 << 12  # elements of each weight that are compared
_ROUNDING = 1e-6  # relative to the largest element: `p += e; p -= e` is no change


class StepChecks:
    """The checks of one penalty at the update level, or of a pull to the start."""

    def __init__(self, current: Current, names: Iterable[str], by: str = "penalty") -> None:
        """
        Args:
            current: the shards of the model.
            names: names of the weights that are written into.
            by: who writes, for the messages.
        """
        self._by = by
        values = all(has_values(shard.local) for shard in current.shards.values())
        self._current, self._names = current, set(names) if values else set()
        self._steps: Counter[int] = Counter()  # by id of the optimizer
        self._asked: set[int] = set()  # optimizers that are to be checked at their next step
        self._written: dict[str, Tensor] = {}  # samples of the weights after the last checked step
        self._untried = ""  # why the last trial failed

    def again(self) -> None:
        """Checks the next step of every optimizer."""
        self._asked = set(self._steps)

    def _is_due(self, optimizer: Optimizer) -> bool:
        """Whether its next step is checked."""
        # What an optimizer sets up lazily shows at its second step, and what it does at every sixth (Lookahead) at that one.
        # A phase of its own, such as that of RAdam, ends later.
        number = self._steps[id(optimizer)] + 1
        return number <= 6 or number & (number - 1) == 0 or id(optimizer) in self._asked

    def before(self, optimizer: Optimizer, shards: Sequence[Shard], closure: bool = False) -> None:
        """Checks what has been written, and tries the optimizer, if it is time for that.

        Args:
            optimizer: it will make a step.
            shards: penalised weights that it steps.
            closure: its step gets a closure, without which it may not work.

        Raises:
            PenaltyError: the penalty's writing is undone, or something else changes the weights.
        """
        if not self._names:  # `dcft plan`
            return
        if is_capturing():  # nothing can be read, and a trial would be replayed with the graph
            self._written, self._untried = {}, ""
            return
        if problem := self.problem():
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))
        self._written, self._untried = {}, ""
        if self._is_due(optimizer) and (problem := self._trial(optimizer, shards, closure)):
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))

    def try_out(self, optimizer: Optimizer, shards: Sequence[Shard], closure: bool) -> None:
        """Only tries the optimizer, if it is time for that, and counts the step.

        Args:
            optimizer: as in `before`.
            shards: weights that it steps.
            closure: as in `before`.

        Raises:
            PenaltyError: the optimizer does not go on from its parameters, or could not be tried.
        """
        if not self._names or is_capturing():
            return
        self._untried = ""
        problem = self._trial(optimizer, shards, closure) if self._is_due(optimizer) else ""
        if problem := problem or self._untried:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))
        self._steps[id(optimizer)] += 1

    def after(self, optimizer: Optimizer, watch: bool) -> None:
        """Notes what the weights are now, if the step is to be checked.

        Args:
            optimizer: it has made a step, and the penalty has shortened it.
            watch: True: check it in any case.

        Raises:
            PenaltyError: the optimizer could not be tried.
        """
        if not self._names or is_capturing():
            return
        if self._untried:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {self._untried}"))
        if watch or self._is_due(optimizer):
            self._written = self._samples()
        self._steps[id(optimizer)] += 1
        self._asked.discard(id(optimizer))

    def problem(self) -> str:
        """Which weights no longer hold what the penalty wrote, if the last step was checked; otherwise an empty string."""
        if not self._written or not (changed := _different(self._written, self._samples())):
            return ""
        return (
            f"{listing(changed, 3)} changed after the penalty had shortened the last step, without a step that the penalty "
            "sees: by an optimizer that copies weights of its own back or steps them elsewhere, or by other code. After "
            "loading a checkpoint attach the penalty again"
        )

    def _samples(self) -> dict[str, Tensor]:
        """Evenly spaced elements of each penalised weight on this rank."""
        self._current.refresh()
        local = {n: s.local.detach().reshape(-1) for n, s in self._current.shards.items() if n in self._names}
        return {name: flat[:: max(len(flat) // _SAMPLE, 1)].clone() for name, flat in local.items() if len(flat)}

    def _trial(self, optimizer: Optimizer, shards: Sequence[Shard], closure: bool) -> str:
        """Tries a step of one weight; returns what is wrong with it, or an empty string."""
        own = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        stepped = {id(p): p for group in own.param_groups for p in group["params"] if local_tensor(p).numel()}
        penalised = {id(s.parameter): s.name for s in shards if s.local.numel() and id(s.parameter) in stepped}
        # A rank without a penalised element makes the trial on another weight: a step may communicate.
        tried = min((stepped[key] for key in penalised or stepped), key=lambda p: local_tensor(p).numel(), default=None)
        if tried is None:
            return ""
        advice = f"the {self._by} {_ADVICE}"
        name, kind, before = penalised.get(id(tried), "a weight"), type(optimizer).__name__, self._samples()
        try:
            left = distance_left(own, tried)
        except Exception as error:  # whatever an optimizer may raise for a tensor that it has not seen before
            # A rank was lost meanwhile, which is no fault of the optimizer.
            if collectives.world_size() > 1 and collectives.is_communication(error):
                raise
            if not closure:
                self._untried = f"{kind} cannot be tried on a copy of {name} ({line_of(error)}); so {advice}"
            return ""  # the step itself may fail too, and says why
        if moved := _different(before, self._samples()):
            moved_names = listing(moved, 3)
            return f"{kind} keeps weights of its own: without being given {moved_names}, it changes them; so {advice}"
        if id(tried) in penalised and left < _LEFT * (1 - decay(own, tried)):
            return (
                f"{kind} keeps weights of its own: of a change that the {self._by} writes into {name}, its next step leaves "
                f"{max(left, 0.0):.0%}; so {advice}"
            )
        return ""


_ADVICE = (
    "cannot hold: use an optimizer that goes on from its parameters, such as torch.optim.AdamW; or, for a penalty, "
    "level='gradient'"
)


def _different(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the weights that differ by more than rounding. NaN counts as equal: the loss shows it."""
    flags: dict[str, Any] = {}
    for name in before.keys() & after.keys():
        largest = (after[name] - before[name]).abs().max()
        flags[name] = (largest > _ROUNDING * before[name].abs().max()).cpu()
    return [name for name in before if name in flags and bool(flags[name])]
