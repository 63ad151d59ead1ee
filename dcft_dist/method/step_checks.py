"""Does the optimizer go on from what the penalty writes? Found by behaviour, not by a list of names.

At the update level the penalty shortens a step by writing into the parameter after `optimizer.step`. An optimizer that keeps
weights of its own (master copies, offloaded ones, further iterates) and copies them back undoes that. So at its steps 1 to
6, 8, 16 and so on, and at the next one after each `Penalty.in_force`, two things are checked:

- a trial: two small tensors, equal but for a constant, take the place of one weight for one step. What is left of the
  constant says how far the step goes on from the parameter. No other weight may change meanwhile.
- a checksum of what the penalty wrote, compared before the next step.

Other steps cost nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..compat.pytorch import has_values
from ..distributed import collectives
from ..engines.base import Engine, Shard, local_tensor
from ..engines.checksum import checksum
from ..errors import PenaltyError, alone, line_of, listing
from .penalty_hooks import unseen

Optimizer = torch.optim.Optimizer

_DISTANCE = 64.0  # between the two tensors of a trial: large against any step, and exact in float32
_LEFT = 0.95  # of the distance, that must be left, besides what weight decay takes away (lr * weight_decay)
_MOST = 1 << 20  # elements of a trial
_PARTS = 8  # in which the tensors are compared at later steps, so that a log costs little


class StepChecks:
    """The checks of one penalty at the update level."""

    def __init__(self, engine: Engine, names: Iterable[str]) -> None:
        """
        Args:
            engine: the engine of the model.
            names: names of the penalised weights.
        """
        self._engine, self._names = engine, list(names) if all(has_values(s.local) for s in engine.shards()) else []
        self._steps: Counter[int] = Counter()  # by id of the optimizer
        self._asked: set[int] = set()  # optimizers whose next step is to be checked
        self._written: dict[str, Tensor] = {}  # checksums of weights after the last checked step
        self._turn = 0
        self._untried = ""  # why the last trial failed

    def again(self) -> None:
        """Checks the next step of every optimizer."""
        self._asked = set(self._steps)

    def _is_early(self, optimizer: Optimizer) -> bool:
        """Whether its next step is one of 1 to 6, 8, 16 and so on."""
        # What an optimizer sets up lazily shows at its second step, and what it does at every sixth (Lookahead) at that one.
        # A phase of its own, such as that of RAdam, ends later.
        number = self._steps[id(optimizer)] + 1
        return number <= 6 or number & (number - 1) == 0

    def _compared(self, optimizer: Optimizer) -> list[str]:
        """The weights to compare at its next step: all of them early, later a part of the tensors in turn."""
        parts = min(_PARTS, len(self._names))
        return self._names if self._is_early(optimizer) else self._names[self._turn % parts :: parts]

    def before(self, optimizer: Optimizer, shards: Sequence[Shard]) -> None:
        """Checks what has been written, and tries the optimizer, if it is time for that.

        Args:
            optimizer: it will make a step.
            shards: penalised weights with a gradient that it steps.

        Raises:
            PenaltyError: the penalty's writing is undone, or something else changes the weights.
        """
        if not self._names:  # `dcft plan`
            return
        if problem := self.problem():
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))
        self._written, self._untried = {}, ""
        due = self._is_early(optimizer) or id(optimizer) in self._asked
        if due and (problem := self._trial(optimizer, shards)):
            raise alone(PenaltyError(f"rank {collectives.rank()}: {problem}"))

    def after(self, optimizer: Optimizer, watch: bool) -> None:
        """Notes what the weights are now, if the step is to be checked.

        Args:
            optimizer: it has made a step, and the penalty has shortened it.
            watch: True: check it in any case.

        Raises:
            PenaltyError: the optimizer could not be tried.
        """
        if not self._names:
            return
        if self._untried:
            raise alone(PenaltyError(f"rank {collectives.rank()}: {self._untried}"))
        if watch or self._is_early(optimizer) or id(optimizer) in self._asked:
            self._written = self._sums(self._compared(optimizer))
            self._turn += 1
        self._steps[id(optimizer)] += 1
        self._asked.discard(id(optimizer))

    def problem(self) -> str:
        """Which weights no longer hold what the penalty wrote, if the last step was checked; otherwise an empty string."""
        if not self._written:
            return ""
        now = self._sums(self._written)
        changed = [name for name, value in now.items() if bool(value != self._written[name])]
        if not changed:
            return ""
        return (
            f"{listing(changed, 3)} changed after the penalty had shortened the last step, without a step that the penalty "
            "sees: by an optimizer that copies weights of its own back or steps them elsewhere, or by other code. After "
            "loading a checkpoint attach the penalty again"
        )

    def _sums(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Checksums of weights, on the CPU: read together, since each read waits for a GPU."""
        wanted = set(names)
        shards = [shard for shard in self._engine.shards() if shard.name in wanted]
        sums = [checksum(shard.local, shard.box) for shard in shards]
        return dict(zip((s.name for s in shards), torch.stack(sums).cpu(), strict=True)) if sums else {}

    def _trial(self, optimizer: Optimizer, shards: Sequence[Shard]) -> str:
        """Tries a step of one weight; returns what is wrong with it, or an empty string."""
        own = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        stepped = {id(p) for group in own.param_groups for p in group["params"]}
        tried = [s for s in shards if s.local.numel() and id(s.parameter) in stepped]
        if not tried:
            return ""
        shard, kind = min(tried, key=lambda s: s.parameter.numel()), type(optimizer).__name__
        compared = self._compared(optimizer)
        before = self._sums(compared)
        try:
            left = distance_left(own, shard.parameter)
        except Exception as error:  # whatever an optimizer may raise for a tensor that it has not seen before
            self._untried = f"{kind} cannot be tried on a copy of {shard.name} ({line_of(error)}); so {_ADVICE}"
            return ""  # the step itself may fail too, and says why
        after = self._sums(compared)
        if moved := [name for name in before if bool(before[name] != after[name])]:
            return f"{kind} keeps weights of its own: without being given {listing(moved, 3)}, it changes them; so {_ADVICE}"
        if left < _LEFT * (1 - _decay(own, shard.parameter)):
            return (
                f"{kind} keeps weights of its own: of a change that the penalty writes into {shard.name}, its next step "
                f"leaves {max(left, 0.0):.0%}; so {_ADVICE}"
            )
        return ""


_ADVICE = (
    "the penalty cannot hold at the update level: use an optimizer that goes on from its parameters, such as "
    "torch.optim.AdamW, or level='gradient'"
)


def _decay(optimizer: Optimizer, parameter: Tensor) -> float:
    """Part of a weight that weight decay takes away in one step."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return min(float(group.get("lr") or 0.0) * float(group.get("weight_decay") or 0.0), 1.0)


def is_where_it_was(shard: Shard) -> bool:
    """Whether the parameter still has the memory of the shard: some optimizers put another tensor there (`p.data = ...`)."""
    return local_tensor(shard.parameter).untyped_storage().data_ptr() == shard.local.untyped_storage().data_ptr()


def distance_left(optimizer: Optimizer, parameter: Tensor) -> float:
    """How much of a change of a parameter is left after the optimizer's next step: 1 if it goes on from the parameter.

    Two copies of the parameter, a constant apart, with copies of its gradient and state, take the place of all parameters
    for one step. Then everything is as before: the optimizer's state, the values in its groups, random numbers.

    Args:
        optimizer: it steps the parameter.
        parameter: a parameter with a gradient. Of a large one only the first rows are copied.

    Returns:
        Mean distance after the step divided by the distance before; NaN gradients give 1.
    """
    values = local_tensor(parameter).detach()
    rows = max(_MOST // max(values[:1].numel(), 1), 1) if values.ndim else 1

    def part(tensor: Tensor) -> Tensor:
        local = local_tensor(tensor).detach()
        return (local[:rows] if local.ndim and local.shape == values.shape else local).clone()

    gradient = part(parameter.grad) if parameter.grad is not None else torch.zeros_like(part(parameter))
    state = optimizer.state.get(parameter, {})
    twins = [nn.Parameter(part(parameter)), nn.Parameter(part(parameter) + _DISTANCE)]
    start = twins[1].detach() - twins[0].detach()
    with _only(optimizer, parameter, twins):
        for twin in twins:
            twin.grad = gradient.clone()
            if state:
                copies = {k: part(v) if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
                optimizer.state[twin] = copies
        _bare_step(optimizer)
    left = float(((twins[1].detach() - twins[0].detach()) / start).double().mean())
    return left if left == left else 1.0


@contextmanager
def _only(optimizer: Optimizer, parameter: Tensor, twins: list[nn.Parameter]) -> Iterator[None]:
    """The optimizer with these parameters in place of `parameter`, and without any other, for the block."""
    groups = list(optimizer.param_groups)
    lists = [group["params"] for group in groups]
    settings = [{key: _copied(value) for key, value in group.items() if key != "params"} for group in groups]
    numbers = {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float | str | None)}
    attributes = set(vars(optimizer))
    devices = [values.device] if (values := local_tensor(parameter)).is_cuda else []
    for group, parameters in zip(groups, lists, strict=True):
        group["params"] = list(twins) if any(p is parameter for p in parameters) else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for group, parameters, old in zip(groups, lists, settings, strict=True):
            group["params"] = parameters
            for key in group.keys() - old.keys() - {"params"}:  # the step has set it for the first time
                del group[key]
            for key, value in old.items():
                if isinstance(value, Tensor):
                    group[key].copy_(value)  # others may hold the same tensor
                else:
                    group[key] = value
        for twin in twins:
            optimizer.state.pop(twin, None)
        for key in [key for key in vars(optimizer) if key not in attributes]:
            delattr(optimizer, key)
        vars(optimizer).update(numbers)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _bare_step(optimizer: Optimizer) -> Any:
    """A step without hooks: neither a penalty nor anybody else may take it for a step of the training."""
    step = type(optimizer).step
    bare: Any = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    with unseen():
        return bare(optimizer)
