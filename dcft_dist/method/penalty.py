"""The penalty: fundamental weights move only by `factor` times their step; all other weights move as usual.

`attach_penalty` explains the multipliers, the levels and where the gradient is multiplied. Optimizers that divide by the
gradient's own scale cancel a constant gradient penalty. Measured at factor 0.1: relative to no penalty, the penalised
weights move 0.10 as far under SGD, but 1.00 under Adam (docs/results/displacement.md). Level "auto" avoids this.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ..compat.pytorch import is_capturing
from ..distributed import collectives
from ..engines.base import Engine, Leaf
from ..engines.box import Box
from ..engines.current import Current
from ..engines.find import find_engine
from ..errors import PenaltyError, alone, listing
from .bits import Packed, cut
from .fundamental_set import FundamentalSet
from .gradient_hooks import GradientHooks
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
from .penalty_hooks import ForwardHook, is_in_place, is_watched, unwatch, watch_optimizers
from .penalty_watch import PenaltyWatch
from .shard_table import CellBits, ShardTable, cell_bits
from .step_checks import StepChecks
from .stepped import Stepped, SteppedWeights

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
    """Attaches the penalty to a model that is prepared for training (wrapped, sharded). Collective.

    From then on the gradient or the step of every weight is multiplied by a number m:

    - fundamental weights: m = `factor`
    - other eligible weights: m = `rest_factor`
    - unscored weights (neither eligible nor head): m = `unscored_factor`
    - the head: m = 1, always
    - frozen weights: skipped, and listed in `Penalty.frozen`

    Args:
        model: a plain module, a DistributedDataParallel, an FSDP2-sharded module, a FullyShardedDataParallel, or a
            DeepSpeedEngine, prepared by you or by Accelerate. Attach the penalty after wrapping or sharding. Weights must
            be stored in float32 or float64; computing in bfloat16 is fine.
        fundamental: the fundamental set; its names and shapes must be those of the model.
        factor: multiplier of fundamental weights, in [0, 1]; 1 means no penalty.
        optimizer: the optimizer that steps the model's weights. Required for level "update" and for where "after". Not
            needed for a DeepSpeedEngine, which has its own. Wrappers by Accelerate or DeepSpeed are unwrapped.
        level: what is multiplied.

            - "gradient": the gradient, before the optimizer sees it.
            - "update": the step that the optimizer has made, weight decay included: w <- w_old + m (w_new - w_old). This
              acts like a learning rate per weight. During the step, the old weights of the shard are kept in memory.
            - "auto" (default): "gradient" for `torch.optim.SGD` without weight decay, or if no optimizer is passed;
              "update" for all other optimizers. Adam and its relatives cancel a penalty on the gradient.
        where: for level "gradient": when the gradient is multiplied. Both choices give the same numbers up to rounding.

            - "before" (default): before the reduction over ranks (reduce-scatter or all-reduce), by a hook on the autograd
              leaf that receives the unsharded gradient.
            - "after": after the reduction, once per optimizer step, on this rank's shard.
        rest_factor: multiplier of eligible weights that are not fundamental, in [0, 1].
        unscored_factor: multiplier of weights that are neither eligible nor head, in [0, 1].
        mask_placement: where the bits of the set are stored, for level "gradient" with where "before", which needs the bits
            of whole weights. Otherwise it has no effect: each rank stores the bits of its own shard.

            - "replicated" (default): each rank stores all bits, 1/8 byte per weight. Nothing is sent.
            - "sharded": each rank stores an equal part. The bits of a leaf are gathered when its gradient is ready, which
              costs 1/32 of the traffic of a float32 gradient. The backward must reach the same weights in the same order
              on every rank. Not available with tensor parallelism.

    Returns:
        A handle (`Penalty`), also usable as a context manager that removes the penalty at the end of the block. The
        penalty stays attached even if you drop the handle.

    Raises:
        FundamentalSetError: the set has names or shapes that the model does not have.
        PenaltyError: a factor outside [0, 1], an unknown choice, or weights stored in half precision. Also if a penalty is
            already attached, or if the optimizer is missing or does not step the model's weights.
        EngineError: the model is wrapped in an unsupported way.

    A later `optimizer.step` raises PenaltyError if the penalty was not applied, for example because a hook was lost. The
    first step of a weight, and each call of `Penalty.in_force`, check this over all ranks. Other steps check what one rank
    can see alone, and send nothing.
    """
    engine = find_engine(model)
    with collectives.agreed("attach penalty"):
        check_factors(factor=factor, rest_factor=rest_factor, unscored_factor=unscored_factor)
        optimizer = check_model(engine, fundamental, optimizer)
        chosen = choose_level(level, where, optimizer)
        check_placement(mask_placement)
    leaves = engine.leaves() if chosen == "gradient" and where == "before" else []
    boxes = {s.name: s.box for leaf in leaves for s in leaf.segments} or {s.name: s.box for s in engine.shards()}
    if shared := mask_placement == "sharded" and bool(leaves):
        check_shareable(leaves, fundamental)
    bits = _read_bits(engine, fundamental, boxes, unscored_factor)
    multipliers = Multipliers(factor, rest_factor, unscored_factor)
    engine.penalty = penalty = Penalty(engine, multipliers, bits, leaves, chosen, where, optimizer, shared)
    return penalty


def _read_bits(
    engine: Engine, fundamental: FundamentalSet, boxes: dict[str, Box], unscored: float
) -> dict[str, Packed | None]:
    """Reads the bits of this rank's boxes, for every weight that a multiplier acts on. Collective."""
    names = engine.names
    head = set(names.match(fundamental.info.head, what="head")) if fundamental.info.head else set()
    trained = set(names.trainable) - head
    bits: dict[str, Packed | None] = {}
    for alias in fundamental.names:  # all names in the same order on every rank, since reading may be collective
        name, packed = names.aliases[alias], fundamental.packed(alias)
        if name in trained:
            bits[name] = cut(packed, boxes[name])
    if unscored != 1.0:
        bits.update(dict.fromkeys(sorted(trained - bits.keys())))
    return bits


# -- the attached penalty -----------------------------------------------------------------------------------------------


class Penalty:
    """Handle of an attached penalty, returned by `attach_penalty`.

    As a context manager it removes the penalty at the end of the block. The penalty stays attached even if you drop the
    handle. A copy or a pickle of the model has no penalty.

    Attributes:
        level: "gradient" or "update"; level "auto" has been resolved.
        where: "before" or "after" the reduction; used at the gradient level only.
        factor: current multiplier of the fundamental weights (read-only; change it with `set_factor`).
        calls: parameter name -> how often this rank has multiplied the weight's gradient or step.
        frozen: names of the weights that were not trained when the penalty was attached.
        mask_bytes: memory that this rank uses for the bits of the set, in bytes.
        after_penalties: False: it follows a step before any pull to the start.
        watch: set it to True to measure the effect of the penalty, for `in_force`.
        keep_proposal: set it to True to store `proposal` after each step at the update level. This takes as much memory
            as a second set of weights.
        proposal: parameter name -> the step that the optimizer proposed for this rank's shard of the weight, with zeros
            where it is not fundamental.
    """

    after_penalties = False

    def __init__(
        self,
        engine: Engine,
        multipliers: Multipliers,
        bits: Mapping[str, Packed | None],
        leaves: list[Leaf],
        level: Literal["gradient", "update"],
        where: Where,
        optimizer: Optimizer | None,
        shared: bool,
    ) -> None:
        """Installs the hooks. Use `attach_penalty`, which checks its arguments first.

        Args:
            engine: the engine of the model.
            multipliers: the numbers to multiply by.
            bits: name of each penalised weight -> packed bits of its cells on this rank; None for an unscored weight.
            leaves: autograd leaves; used at the gradient level before the reduction.
            level: what is multiplied.
            where: before or after the reduction, at the gradient level.
            optimizer: the optimizer passed to `attach_penalty`, if any.
            shared: True: each rank stores an equal part of the bits; used at the gradient level before the reduction.

        Raises:
            EngineError: a penalised weight belongs to no leaf.
        """
        self._optimizer_known = optimizer is not None  # choose_level has warned about a known optimizer
        self._attached_optimizer = weakref.ref(optimizer) if optimizer is not None else None
        self.level, self.where = level, where
        self.calls: Counter[str] = Counter()
        self._engine, self._multipliers, self._names = engine, multipliers, list(bits)
        self._current = Current(engine)
        before = level == "gradient" and where == "before"
        self._hooks = GradientHooks(engine, leaves, bits, multipliers, self.calls, shared) if before else None
        self._bits: dict[str, CellBits] = {}
        if self._hooks is None:
            by_index = level == "update" and multipliers.rest == 1.0
            self._bits = {n: cell_bits(packed, self._current.shards[n], by_index) for n, packed in bits.items()}
        self._seen = PenaltyWatch(engine, bits, self._current, self._hooks)
        self._steps = StepChecks(self._current, bits)
        self.frozen = self._seen.frozen
        self._handles: list[Any] = []
        self._weights = SteppedWeights(self._current, self._seen, self._bits, multipliers)
        self._stepping: Stepped | None = None  # what the optimizer steps that is in its step
        self._scaled: set[str] = set()  # weights whose reduced gradient is already multiplied for the next step
        self._shortened: weakref.ref[Optimizer] | None = None  # the optimizer of which a step was shortened just now
        self._saved: list[int] = []  # entries of the table of which the old weights are saved
        self.keep_proposal = False
        self.proposal: dict[str, Tensor] = {}
        if self.frozen:
            log.info("penalty: %d frozen weights are skipped: %s", len(self.frozen), listing(self.frozen))
        self._hook_optimizers()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a copy or a pickle of the model has no hooks, and therefore no penalty

    def __repr__(self) -> str:
        timing = f", {self.where} the reduction" if self.level == "gradient" else ""
        return f"Penalty(factor {self.factor:g} on the {self.level}{timing}, {len(self._names)} weight tensors)"

    @property
    def factor(self) -> float:
        """Current multiplier of the fundamental weights; change it with `set_factor`."""
        return self._multipliers.factor

    @property
    def mask_bytes(self) -> int:
        """Memory that this rank uses for the bits of the set, in bytes.

        One bit per penalised weight of this rank's shard. At the gradient level before the reduction: one bit per penalised
        weight of the model, or this rank's part of these bits with mask_placement "sharded"; a flat buffer has bits for all
        of its elements. At the update level on a CPU also 4 bytes per fundamental weight of a sparse set.
        """
        return self._hooks.num_bytes if self._hooks is not None else sum(bits.num_bytes for bits in self._bits.values())

    @property
    def watch(self) -> bool:
        """Whether to measure the effect of the penalty, for `in_force`. Costs one more pass over the weights per step."""
        return self._multipliers.watch

    @watch.setter
    def watch(self, on: bool) -> None:
        self._multipliers.watch = on

    def set_factor(self, factor: float) -> None:
        """Changes the multiplier of the fundamental weights, from the next backward or step on. Call it on every rank.

        Args:
            factor: the new multiplier, in [0, 1], the same on every rank.

        Raises:
            PenaltyError: the factor is outside [0, 1].
        """
        check_factors(factor=factor)
        self._multipliers.set_factor(factor)

    def apply(self) -> None:
        """Multiplies the reduced gradients now, so that you can clip penalised gradients. Only for where "after".

        Call it after the last backward and before clipping. Without this call, the gradients are multiplied at the start of
        `optimizer.step`. Each gradient is multiplied once per step in any case. Otherwise the call does nothing.

        Raises:
            PenaltyError: the engine (DeepSpeed) clips inside its own step, before the reduced gradients can be reached.
        """
        if self.level == "update" or self.where == "before":
            return
        if self._engine.clips_inside:
            raise PenaltyError(
                "DeepSpeed clips inside its step, before a penalty with where='after' can be applied: use where='before' to "
                "clip penalised gradients, or do not call apply() to clip plain ones"
            )
        self._scale_reduced(self._weights.every(), set(self._names))

    def in_force(self) -> float:
        """Measures the penalty and checks it over all ranks. Collective; call it when you log.

        Returns:
            Norm applied divided by norm proposed, over the fundamental weights, since the last call. The norms are those
            of the steps at the update level, and of the gradients at the gradient level. With one factor throughout, it
            equals the factor. NaN if `watch` is off, or if nothing was proposed.

        Raises:
            PenaltyError: the penalty or a hook of it was removed, the ranks have different factors, a weight has a gradient
                that no rank multiplied, or a weight does not hold what the penalty wrote after the last step.
        """
        lost = self._lost()
        self._seen.agree(self.factor, "" if lost else self._steps.problem(), lost)
        self._steps.again()
        m = self._multipliers
        applied, proposed = collectives.reduce_numbers([m.applied, m.proposed], what="penalty in force")
        m.applied = m.proposed = 0.0
        return float((applied / proposed) ** 0.5) if proposed else float("nan")

    def _lost(self) -> str:
        """What has taken the penalty off, or an empty string."""
        if self._engine.penalty is not self:
            return "the penalty was removed from the model"
        hooks = self._hooks.handles if self._hooks is not None else []
        if not is_watched(self) or not all(map(is_in_place, [*self._handles, *hooks])):
            return "a hook of the penalty was taken off: attach the penalty again"
        return ""

    def remove(self) -> None:
        """Removes all hooks; training continues without the penalty. May be called more than once."""
        unwatch(self._number)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._hooks is not None:
            self._hooks.remove()
        if self._engine.penalty is self:
            self._engine.penalty = None

    def __enter__(self) -> Penalty:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    # -- around optimizer.step --------------------------------------------------------------------------------------

    def _hook_optimizers(self) -> None:
        """Watches every optimizer: one that was not passed, one created too early, several that share the weights."""
        self._number = watch_optimizers(self)
        self._handles.append(self._engine.module.register_forward_pre_hook(ForwardHook(self)))

    def on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before a step of any optimizer; returns new arguments for the step, or None to leave them."""
        if (stepped := self._before_step(optimizer)) is None:
            return None
        closures = [a for a in (*args, *kwargs.values()) if callable(a) and a is not optimizer]
        if not closures:
            return self._gradients_ready(stepped)
        if self.level == "update":  # now, since the optimizer is in its step when the closure is called
            self._steps.before(optimizer, stepped.shards, closure=True)
        wrapped = {id(closures[0]): self._closure(optimizer, closures[0])}
        return tuple(wrapped.get(id(a), a) for a in args), {k: wrapped.get(id(a), a) for k, a in kwargs.items()}

    def _before_step(self, optimizer: Optimizer) -> Stepped | None:
        """Called when a step begins. Returns None if the optimizer steps no weights that are penalised, or should be."""
        if self._stepping is not None and getattr(self._stepping.optimizer(), "optim", None) is optimizer:
            return None  # inside a ZeroRedundancyOptimizer
        stepped = self._weights.by(optimizer)
        if not stepped.concerned:
            passed = self._attached_optimizer is not None and self._attached_optimizer() is optimizer
            if passed and self._seen.has_lost(optimizer):
                raise alone(
                    PenaltyError(
                        f"rank {collectives.rank()}: the {type(optimizer).__name__} passed to attach_penalty no longer "
                        "steps any weight of the model: attach the penalty after deepspeed.initialize, or after wrapping"
                    )
                )
            return None
        self._warn_if_cancelled(optimizer)
        if self.watch and is_capturing():
            raise alone(
                PenaltyError(f"rank {collectives.rank()}: what a CUDA graph does cannot be measured: set watch to False")
            )
        self._stepping, self._saved = stepped, []
        return stepped

    def _gradients_ready(self, stepped: Stepped, in_step: bool = False) -> None:
        """Checks and multiplies the gradients, or saves the old weights, right before the optimizer steps.

        Args:
            stepped: what the optimizer steps.
            in_step: whether it is in its step already. Otherwise it is tried, if it is time for that.
        """
        self._seen.check(stepped.names, self.factor)
        if stepped.table is None:
            return
        if self.level == "gradient":
            self._scale_reduced(stepped.table, stepped.names)
            return
        self._saved, _ = stepped.table.with_gradient()
        optimizer = stepped.optimizer()
        if optimizer is not None and not in_step:
            self._steps.before(optimizer, [stepped.shards[number] for number in self._saved])
        stepped.table.save(self._saved, self.keep_proposal)

    def _closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wraps the closure of `optimizer.step(closure)`, which computes the gradients inside the step."""
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1 and (self.level == "update" or self.where == "after"):
                raise PenaltyError(
                    f"{type(optimizer).__name__} evaluates its closure more than once per step, which only a "
                    "gradient penalty before the reduction supports: use level='gradient', where='before'"
                )
            loss = closure()
            self._stepping = current = self._weights.by(optimizer)  # the closure may have stepped another optimizer
            self._gradients_ready(current, in_step=True)
            return loss

        return evaluate

    def _warn_if_cancelled(self, optimizer: Optimizer) -> None:
        """Warns once about an optimizer that was not passed to `attach_penalty`."""
        if self.level == "gradient" and not self._optimizer_known and not isinstance(optimizer, torch.optim.SGD):
            log.warning(CANCELLED, type(optimizer).__name__)
        self._optimizer_known = True

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Called after a step of any optimizer: at the update level, shortens the step."""
        stepped = self._stepping
        if stepped is None or stepped.optimizer() is not optimizer:
            return
        self._stepping = None
        if self.level == "update" and stepped.table is not None:
            self._current.refresh()
            if self._current.version != stepped.version:  # some optimizers put new tensors into the parameters
                stepped.table.move(self._current.shards)
            stepped.table.shorten(self._saved, self.proposal if self.keep_proposal else None)
            for number in self._saved:
                self.calls[stepped.shards[number].name] += 1
            self._saved = []
            self._shortened = stepped.optimizer
        self._scaled -= stepped.names
        self._seen.after_step(stepped.names)

    def on_finished(self, optimizer: Optimizer) -> None:
        """Called when a pull to the start, if there is one, has acted on the shortened step too."""
        if self._shortened is not None and self._shortened() is optimizer:
            self._shortened = None
            self._steps.after(optimizer, self.watch)

    def _scale_reduced(self, table: ShardTable, names: set[str]) -> None:
        """At the gradient level after the reduction: multiplies the gradients of these weights, once per step."""
        numbers, gradients = table.with_gradient()
        if self._scaled:
            wanted = names - self._scaled
            pairs = [(n, g) for n, g in zip(numbers, gradients, strict=True) if table.entries[n].shard.name in wanted]
            numbers, gradients = [n for n, _ in pairs], [g for _, g in pairs]
        table.scale(numbers, gradients)
        for number in numbers:
            name = table.entries[number].shard.name
            self.calls[name] += 1
            self._scaled.add(name)

    def sees_forward_of(self, module: torch.nn.Module) -> bool:
        """Whether a forward of this module is one of the model, and not of a part or a copy of it."""
        return module is self._engine.module

    def on_forward(self) -> None:
        """Called before a forward in training: new gradients follow, so those of a skipped step no longer count."""
        self._scaled.clear()
        self._seen.forwards += 1
        if self._hooks is not None:
            self._hooks.renew()


def _nothing() -> None:
    return None
