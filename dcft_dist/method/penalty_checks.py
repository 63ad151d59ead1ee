"""The checks that `attach_penalty` makes before it changes anything, and its choice of the level."""

from __future__ import annotations

import hashlib
import logging
from math import prod
from typing import Literal, get_args

import torch

from ..distributed import collectives
from ..engines.base import Engine, Leaf
from ..engines.find import torch_optimizer
from ..errors import FundamentalSetError, PenaltyError, did_you_mean, listing
from .fundamental_set import FundamentalSet

log = logging.getLogger(__name__)

Level = Literal["auto", "gradient", "update"]


Where = Literal["before", "after"]


Placement = Literal["replicated", "sharded"]


Optimizer = torch.optim.Optimizer


def check_factors(**factors: float) -> None:
    """Checks multipliers, passed by their names.

    Raises:
        PenaltyError: a multiplier is not a number in [0, 1].
    """
    for name, value in factors.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise PenaltyError(f"{name} must lie between 0 and 1, not {value}")


def check_placement(placement: str) -> None:
    """
    Raises:
        PenaltyError: the value of `mask_placement` is unknown.
    """
    if placement not in get_args(Placement):
        raise PenaltyError(f"mask_placement must be 'replicated' or 'sharded', not {placement!r}")


def check_shareable(leaves: list[Leaf], fundamental: FundamentalSet) -> None:
    """Checks that each rank can store a part of the bits, which requires the same bits on every rank. Collective.

    Raises:
        PenaltyError: the ranks have different sets, or tensor parallelism splits the weights.
    """
    digest = hashlib.sha256(repr((fundamental.info.shapes, fundamental.info.counts)).encode()).digest()
    marks = collectives.all_gather_ints([int.from_bytes(digest[:7], "little")], what="comparison of the sets")
    if any(mark != marks[0] for mark in marks):
        raise PenaltyError(
            "the ranks have different fundamental sets, so mask_placement='sharded' cannot spread the bits: pass the same "
            "set on every rank"
        )
    parts = [s.name for leaf in leaves for s in leaf.segments if s.box.numel != prod(s.box.grid)]
    if parts:
        raise PenaltyError(
            f"mask_placement='sharded' does not support tensor parallelism ({listing(parts, 3)} are split): use 'replicated'"
        )


def check_model(engine: Engine, fundamental: FundamentalSet, given: Optimizer | None) -> Optimizer | None:
    """Checks that the model can be penalised with this set and this optimizer.

    Args:
        engine: the engine of the model.
        fundamental: the fundamental set.
        given: the optimizer passed to `attach_penalty`, wrapped or not.

    Returns:
        The torch optimizer that steps the weights, or None if it is unknown.

    Raises:
        PenaltyError: the set is not a FundamentalSet, a penalty is already attached, weights are stored in half precision,
            or the optimizer does not step the model.
        FundamentalSetError: the set does not fit the model.
    """
    if not isinstance(fundamental, FundamentalSet):
        raise PenaltyError(
            f"fundamental must be a FundamentalSet, not {type(fundamental).__name__}: use select_fundamental(scores) or "
            "FundamentalSet.load(path)"
        )
    if engine.name == "single" and collectives.world_size() > 1:
        log.warning(
            "the model is a plain module on %d ranks: average the gradients in your loop, or use DDP",
            collectives.world_size(),
        )
    if engine.penalty is not None:
        raise PenaltyError("a penalty is already attached to this model: remove it first, or use set_factor")
    _check_fit(engine, fundamental)
    check_precision(engine)
    optimizer: Optimizer | None = torch_optimizer(given)
    if engine.own_optimizer is not None:
        if optimizer not in (None, engine.own_optimizer):
            raise PenaltyError("DeepSpeed steps with the optimizer given to deepspeed.initialize: pass that one, or none")
        return engine.own_optimizer
    if optimizer is not None:
        _check_optimizer(optimizer, engine.stepped(), fundamental)
    return optimizer


def check_precision(engine: Engine) -> None:
    """Checks that the trained weights are stored in float32 or float64. Call it before scoring, which takes long.

    Raises:
        PenaltyError: some are stored in half precision.
    """
    trainable = set(engine.names.trainable)
    half = [s.name for s in engine.shards() if s.name in trainable and s.local.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise PenaltyError(
            f"weights are stored in half precision without float32 masters ({listing(half, 3)}): small steps would be "
            "rounded away; keep the weights in float32 and compute in bfloat16 (MixedPrecisionPolicy or autocast)"
        )


def _check_optimizer(optimizer: Optimizer, names: dict[int, list[str]], fundamental: FundamentalSet) -> None:
    if not isinstance(optimizer, Optimizer):
        raise PenaltyError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    stepped = set(names_stepped(optimizer, names))
    if not stepped:
        raise PenaltyError(
            "the optimizer steps none of the model's weights: create it after the model was wrapped or sharded"
        )
    num_foreign = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    missed = [n for group in names.values() for n in group if n in fundamental.info.shapes and n not in stepped]
    if num_foreign and missed:
        log.warning(
            "the optimizer steps %d tensors that are not the model's, and does not step %s: was it created before sharding, "
            "or under FSDP2 after a forward without backward?",
            num_foreign,
            listing(missed),
        )


def _check_fit(engine: Engine, fundamental: FundamentalSet) -> None:
    shapes = engine.full_shapes()
    problems = []
    for name, shape in fundamental.info.shapes.items():
        known = engine.names.aliases.get(name)
        if known is None:
            problems.append(f"{name} is not in the model{did_you_mean(name, shapes)}")
        elif known != name and known in fundamental.info.shapes:
            problems.append(f"{name} and {known} are the same weight")
        elif shapes[known] != shape:
            problems.append(f"{name} is {list(shape)} in the set and {list(shapes[known])} in the model")
    if problems:
        raise FundamentalSetError(f"the fundamental set does not fit the model: {listing(problems)}")


def choose_level(level: Level, where: Where, optimizer: Optimizer | None) -> Literal["gradient", "update"]:
    """Resolves level "auto", logs the result, and warns if the optimizer may cancel a gradient penalty.

    Raises:
        PenaltyError: an unknown choice of `level` or `where`, or no optimizer for a choice that needs one.
    """
    for name, value, known in (("level", level, get_args(Level)), ("where", where, get_args(Where))):
        if value not in known:
            raise PenaltyError(f"{name} must be one of {', '.join(known)}, not {value!r}{did_you_mean(value, known)}")
    chosen, reason = _auto_level(optimizer) if level == "auto" else (level, "requested")
    log.info("penalty level %s: %s", chosen, reason)
    if optimizer is None and (chosen == "update" or where == "after"):
        raise PenaltyError("level='update' and where='after' hook optimizer.step: pass the optimizer")
    if level == "gradient" and optimizer is not None and not isinstance(optimizer, torch.optim.SGD):
        log.warning(CANCELLED, type(optimizer).__name__)
    return "update" if chosen == "update" else "gradient"


CANCELLED = (
    "%s may cancel a gradient penalty: use level='update'. Measured at factor 0.1, relative to no penalty, the penalised "
    "weights moved 0.10 as far under SGD, but 1.00 under Adam, AdamW, NAdam, Adamax, RMSprop and Adagrad"
)


def _auto_level(optimizer: Optimizer | None) -> tuple[str, str]:
    """The level for an optimizer, and the reason for the log."""
    if optimizer is None:
        return "gradient", "no optimizer was passed, so only the gradient can be multiplied"
    if not isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        return "update", f"{name} makes steps of the same size for small gradients too, so steps are multiplied instead"
    if any(group["weight_decay"] for group in optimizer.param_groups):
        return "update", "SGD with weight decay, and a gradient penalty would leave the decay at full strength"
    return "gradient", "steps of SGD without weight decay are proportional to the gradient"


def names_stepped(optimizer: Optimizer, names: dict[int, list[str]]) -> list[str]:
    """Names of the weights that the optimizer steps.

    Args:
        optimizer: a torch optimizer.
        names: id of a tensor -> names of the weights in it (`Engine.stepped`).
    """
    return [n for group in optimizer.param_groups for p in group["params"] for n in names.get(id(p), ())]
