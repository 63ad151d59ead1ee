"""The penalty: fundamental weights move only `factor` of their step; all others move as usual.

Two multipliers act over the fundamental set: `factor` on its members and `rest_factor` on the other eligible weights; a
third, `unscored_factor`, on weights that are neither eligible nor head. The head is never touched. Two levels:

gradient   the gradient is multiplied. `before`: by an out-of-place hook on the autograd leaf that receives the unsharded
           gradient, hence before the reduce-scatter or all-reduce. `after`: once per optimizer step on the reduced shard.
update     the gradient is left alone; around `optimizer.step` the weights keep only the multiplied part of the step that
           was proposed, decay included: w <- w_old + m (w_new - w_old), a learning rate for each weight.

Optimizers that divide by the gradient's own scale cancel a constant gradient penalty (docs/results/displacement.md: at
factor 0.1 the penalised weights move 0.10 of their way under SGD, but 1.00 under Adam), hence the level `auto`.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..distributed import collectives
from ..engines.base import Engine, Leaf, Segment, Shard, local_tensor
from ..engines.box import Box
from ..engines.find import find_engine
from ..errors import EngineError, PenaltyError, alone, listing
from .bits import Packed, cut
from .fundamental_set import FundamentalSet
from .multipliers import Multipliers
from .penalty_checks import (
    CANCELLED,
    Level,
    Optimizer,
    Placement,
    Where,
    check_factors,
    check_model,
    check_placement,
    check_shareable,
    choose_level,
)
from .penalty_watch import LeafCount, PenaltyWatch

log = logging.getLogger(__name__)


def attach_penalty(
    model: torch.nn.Module,
    fundamental: FundamentalSet,
    factor: float = 0.1,
    *,
    optimizer: Optimizer | None = None,
    level: Level = "auto",
    where: Where = "before",
    rest_factor: float = 1.0,
    unscored_factor: float = 1.0,
    mask_placement: Placement = "replicated",
) -> Penalty:
    """Puts the penalty in force on `model`, prepared for training (wrapped, sharded). Collective.

    Args:
        model: a plain module, a DistributedDataParallel, an FSDP2-sharded module, a FullyShardedDataParallel, or a
            DeepSpeedEngine, made by hand or by Accelerate; attach after wrapping or sharding.
        fundamental: the set; its names and shapes must be the model's.
        factor: multiplier of fundamental weights, in [0, 1].
        optimizer: steps the model's weights. May be left out for the gradient level before the reduction alone, and
            for a DeepSpeedEngine, which has its own. What Accelerate or DeepSpeed made of an optimizer is unwrapped.
        level: `gradient`, `update`, or `auto`: gradient for `torch.optim.SGD` without weight decay, update for all else.
        where: place of the gradient level: `before` or `after` the reduction.
        rest_factor: multiplier of eligible weights that are not fundamental, in [0, 1].
        unscored_factor: multiplier of weights that are neither eligible nor head, in [0, 1].
        mask_placement: for the gradient level before the reduction, which needs the bits of whole weights. `replicated`:
            each rank holds all, an eighth of a byte a weight, and sends nothing. `sharded`: each rank holds its part, and
            the bits of a leaf are gathered when its gradient is ready (1/32 of the traffic of a float32 gradient); every
            rank's backward must then reach the same weights in the same order. No effect elsewhere: a shard needs its own.

    Returns:
        A handle: `calls`, `set_factor`, `remove`; also a context manager that removes the penalty at its end. The model
        keeps the penalty in force also where the handle is dropped.

    Raises:
        FundamentalSetError: names or shapes of the set that the model does not have.
        PenaltyError: a factor out of range, a penalty already attached, an optimizer that does not step the model, weights
            stored in half precision. At an optimizer step: a hook that did not fire, which all ranks find together at the
            first, and at each `in_force`; other steps check what a rank can tell alone and send nothing.
    """
    engine = find_engine(model)
    with collectives.agreed("attach penalty"):
        check_factors(factor=factor, rest_factor=rest_factor, unscored_factor=unscored_factor)
        optimizer = check_model(engine, fundamental, optimizer)
        chosen = choose_level(level, where, optimizer)
        check_placement(mask_placement)
    leaves = engine.leaves() if chosen == "gradient" and where == "before" else []
    boxes = {s.name: s.box for leaf in leaves for s in leaf.segments} or {s.name: s.box for s in engine.shards()}
    device = leaves[0].tensor.device if leaves else engine.shards()[0].local.device
    if shared := mask_placement == "sharded" and bool(leaves):
        check_shareable(leaves, fundamental)
    bits = _read_bits(engine, fundamental, boxes, unscored_factor)
    multipliers = Multipliers(bits, device, rest_factor, unscored_factor, shared)
    multipliers.set_factor(factor)
    engine.penalty = penalty = Penalty(engine, multipliers, leaves, chosen, where, optimizer)
    return penalty


def _read_bits(
    engine: Engine, fundamental: FundamentalSet, boxes: dict[str, Box], unscored: float
) -> dict[str, Packed | None]:
    """Bits of every weight that a multiplier acts on, as far as they lie in this rank's boxes. Collective."""
    names = engine.names
    head = set(names.match(fundamental.info.head, what="head")) if fundamental.info.head else set()
    trained = set(names.trainable) - head
    bits: dict[str, Packed | None] = {}
    for given in fundamental.names:  # every name, on every rank, in this order: reading may be collective
        name, packed = names.aliases[given], fundamental.packed(given)
        if name in trained:
            bits[name] = cut(packed, boxes[name])
    if unscored != 1.0:
        bits.update(dict.fromkeys(sorted(trained - bits.keys())))
    return bits


# -- the penalty in force -----------------------------------------------------------------------------------------------


class Penalty:
    """A penalty in force. Made by `attach_penalty`.

    Attributes:
        level, where: what was chosen.
        calls: per parameter name, how often its gradient or its step has been multiplied on this rank.
        frozen: names that are skipped since they are not trained.
        keep_proposal: True: after each step at the update level `proposal` has what the optimizer proposed for the
            fundamental weights of each shard, zero for others. Takes the memory of another set of weights.
    """

    def __init__(
        self,
        engine: Engine,
        multipliers: Multipliers,
        leaves: list[Leaf],
        level: Literal["gradient", "update"],
        where: Where,
        optimizer: Optimizer | None,
    ) -> None:
        self._told = optimizer is not None  # whether it was known, and warned of, when the level was chosen
        self._given = weakref.ref(optimizer) if optimizer is not None else None
        self.level, self.where = level, where
        self.calls: Counter[str] = Counter()
        self._engine, self._multipliers = engine, multipliers
        self._seen = PenaltyWatch(engine, multipliers.bits)
        self.frozen = self._seen.frozen
        self._handles: list[Any] = []
        self._scaled: set[str] = set()  # weights whose reduced gradient has been multiplied for the coming step
        self._old: list[tuple[Shard, Tensor]] = []
        self._stepping: Optimizer | None = None
        self._stepped: set[str] = set()  # weights that it steps
        self.keep_proposal = False
        self.proposal: dict[str, Tensor] = {}
        if self.frozen:
            log.info("penalty: %d frozen weights are skipped: %s", len(self.frozen), listing(self.frozen))
        if level == "gradient" and where == "before":
            self._hook_leaves(leaves)
        self._hook_optimizers()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a copy or a pickle of the model is without penalty, as it is without hooks

    def __repr__(self) -> str:
        place = f", {self.where} the reduction" if self.level == "gradient" else ""
        return f"Penalty(factor {self.factor:g} on the {self.level}{place}, {len(self._multipliers.bits)} weight tensors)"

    @property
    def factor(self) -> float:
        return self._multipliers.factor

    @property
    def mask_bytes(self) -> int:
        """What this rank keeps of the set: a bit for each weight that it holds or, before the reduction, for all; of the
        latter its part if they are sharded."""
        return sum(packed.numel() for packed in self._multipliers.bits.values() if packed is not None)

    @property
    def watch(self) -> bool:
        """True: measure what is applied over what is proposed, for `in_force`. Costs another pass over the weights."""
        return self._multipliers.watch

    @watch.setter
    def watch(self, on: bool) -> None:
        self._multipliers.watch = on

    def set_factor(self, factor: float) -> None:
        """Changes the multiplier of the fundamental weights from the next backward or step on. Call on every rank.

        Raises:
            PenaltyError: the factor is outside [0, 1].
        """
        check_factors(factor=factor)
        self._multipliers.set_factor(factor)

    def apply(self) -> None:
        """With `where="after"`: multiplies the reduced gradients now, once per step, so that a clipping that follows sees
        the penalised gradients. Without this call it happens at the start of `optimizer.step`. Else it does nothing.

        Raises:
            PenaltyError: the engine clips inside its own step, before gradients can be reached after the reduction.
        """
        if self.level == "gradient" and self.where == "after" and self._engine.clips_inside:
            raise PenaltyError(
                "DeepSpeed clips inside its step, before a penalty that comes after the reduction: use where='before' to "
                "clip penalised gradients, or leave apply() out to clip plain ones"
            )
        self._scale_reduced(list(self._multipliers.bits))

    def in_force(self) -> float:
        """Norm of what was applied over norm of what was proposed, for the fundamental weights, since last asked.

        At the update level of the steps, at the gradient level of the gradients where they are multiplied. NaN where
        nothing was proposed, or `watch` is off. Collective.

        Raises:
            PenaltyError: the ranks have different factors, or a weight that holds a gradient was multiplied on no rank.
        """
        self._seen.agree(self.factor)
        m = self._multipliers
        applied, proposed = collectives.reduce_numbers([m.applied, m.proposed], what="penalty in force")
        m.applied = m.proposed = 0.0
        return float((applied / proposed) ** 0.5) if proposed else float("nan")

    def remove(self) -> None:
        """Takes all hooks off; the model trains on without penalty. May be called more than once."""
        _watching.pop(self._number, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.leaves.clear()
        if self._engine.penalty is self:
            self._engine.penalty = None

    def __enter__(self) -> Penalty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    # -- gradient level, before the reduction -----------------------------------------------------------------------

    def _hook_leaves(self, leaves: list[Leaf]) -> None:
        for leaf in leaves:
            segments = [s for s in leaf.segments if s.name in self._multipliers.bits]
            if segments:
                count = self._seen.leaf([s.name for s in segments])
                self._handles.append(leaf.tensor.register_hook(self._leaf_hook(segments, count)))
                self._handles.append(leaf.tensor.register_post_accumulate_grad_hook(count.reach))
        if missed := self._seen.unhooked():
            raise EngineError(f"no autograd leaf was found for {listing(missed)}")

    def _leaf_hook(self, segments: list[Segment], count: LeafCount) -> Callable[[Tensor], Tensor]:
        multipliers, calls = self._multipliers, self.calls
        cells = sum(s.box.numel for s in segments)

        def hook(gradient: Tensor) -> Tensor:
            # Out of place: autograd may have given the same memory to other leaves.
            plain = local_tensor(gradient) is gradient and not torch.is_grad_enabled()  # enabled: create_graph
            if plain and gradient.is_contiguous() and gradient.numel() == cells:
                scaled, source = torch.empty_like(gradient), gradient.detach().view(-1)
                flat = scaled.view(-1)
            else:
                scaled = gradient.clone(memory_format=torch.contiguous_format)
                flat = source = local_tensor(scaled).detach().view(-1)
            for s in segments:
                part = slice(s.offset, s.offset + s.box.numel)
                multipliers.scale_into(s.name, source[part], flat[part])
                calls[s.name] += 1
            count.fired += 1
            return scaled

        return hook

    # -- around optimizer.step --------------------------------------------------------------------------------------

    def _hook_optimizers(self) -> None:
        """Watches every optimizer: also one that was not passed, several that share the weights, one made too early."""
        _watch_optimizers()
        self._number = next(_numbers)
        _watching[self._number] = self
        self._handles.append(self._engine.module.register_forward_pre_hook(_ForwardHook(self)))

    def on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before a step of any optimizer; returns other arguments for it, or None."""
        if not self._before_step(optimizer):
            return None
        given = [a for a in (*args, *kwargs.values()) if callable(a) and a is not optimizer]
        if not given:
            return self._gradients_are_there()
        instead = {id(given[0]): self._closure(optimizer, given[0])}
        return tuple(instead.get(id(a), a) for a in args), {k: instead.get(id(a), a) for k, a in kwargs.items()}

    def _before_step(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer steps weights that are penalised, or should be."""
        nested = getattr(self._stepping, "optim", None) is optimizer  # the inner one of ZeroRedundancyOptimizer
        names = set() if nested else self._seen.stepped_by(optimizer)
        if not self._seen.concerns(optimizer, names):
            if self._given is not None and self._given() is optimizer and self._seen.has_lost(optimizer):
                raise alone(
                    PenaltyError(
                        f"rank {collectives.rank()}: {type(optimizer).__name__}, given to attach_penalty, steps none of the "
                        "weights that it stepped then: attach the penalty after deepspeed.initialize, or after wrapping"
                    )
                )
            return False
        self._warn_if_cancelled(optimizer)
        self._stepping, self._stepped, self._old = optimizer, names, []
        return True

    def _gradients_are_there(self) -> None:
        """Between the last backward and the step proper."""
        self._seen.check(self._stepped, self.factor)
        self._scale_reduced([n for n in self._multipliers.bits if n in self._stepped])
        if self.level == "update":
            self._old = [(s, s.local.clone()) for s in self._shards(self._stepped) if s.gradient is not None]

    def _closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of `optimizer.step(closure)`, which computes the gradients inside the step."""
        evaluations, names = 0, self._stepped

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1 and (self.level == "update" or self.where == "after"):
                raise PenaltyError(
                    f"{type(optimizer).__name__} evaluates its closure more than once in a step, where only a gradient "
                    "penalty before the reduction is the same each time: use level='gradient', where='before'"
                )
            loss = closure()
            self._stepping, self._stepped = optimizer, names  # the closure may have stepped another optimizer
            self._gradients_are_there()
            return loss

        return evaluate

    def _warn_if_cancelled(self, optimizer: Optimizer) -> None:
        """Once, about an optimizer that `attach_penalty` was not told of."""
        if self.level == "gradient" and not self._told and not isinstance(optimizer, torch.optim.SGD):
            log.warning(CANCELLED, type(optimizer).__name__)
        self._told = True

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Called after a step of any optimizer."""
        if self._stepping is not optimizer:
            return
        self._stepping = None
        with torch.no_grad():
            for shard, old in self._old:
                if self.keep_proposal:
                    self.proposal[shard.name] = self._multipliers.only_chosen(shard.name, shard.local - old)
                self._multipliers.shorten(shard.name, old, shard.local)
                self.calls[shard.name] += 1
        self._old = []
        self._scaled -= self._stepped
        self._seen.after_step(self._stepped)

    def _shards(self, names: set[str]) -> list[Shard]:
        return [shard for shard in self._engine.shards() if shard.name in names]

    def _scale_reduced(self, names: list[str]) -> None:
        if self.level == "update" or self.where == "before":
            return
        for shard in self._shards(set(names) - self._scaled):
            if (gradient := shard.gradient) is not None:
                self._multipliers.scale(shard.name, gradient)
                self.calls[shard.name] += 1
                self._scaled.add(shard.name)

    def on_forward(self) -> None:
        """New gradients are on their way, and what was multiplied for a skipped step does not count."""
        self._scaled.clear()
        self._seen.forwards += 1


# In the order in which they were attached, which is the same on every rank: they meet in collectives.
_watching: weakref.WeakValueDictionary[int, Penalty] = weakref.WeakValueDictionary()


_numbers = itertools.count()


@cache
def _watch_optimizers() -> None:
    """Once for the process: hooks that go with their penalty might go while torch is walking through its hooks."""

    def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        changed = None
        for penalty in list(_watching.values()):
            found = penalty.on_step(optimizer, args, kwargs)
            if found is not None:
                changed = args, kwargs = found
        return changed

    def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for penalty in list(_watching.values()):
            penalty.on_stepped(optimizer)

    register_optimizer_step_pre_hook(pre)
    register_optimizer_step_post_hook(post)


class _ForwardHook:
    """Tells the penalty of a forward in training."""

    def __init__(self, penalty: Penalty) -> None:
        self._penalty = weakref.ref(penalty)

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        penalty = self._penalty()
        if penalty is not None and module is penalty._engine.module and module.training and torch.is_grad_enabled():
            penalty.on_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_inert_hook, ())


def _inert_hook() -> Callable[[torch.nn.Module, Any], None]:
    return _ignore


def _ignore(module: torch.nn.Module, args: Any) -> None:
    return None


def _nothing() -> None:
    return None
