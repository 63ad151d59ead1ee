"""What `attach_penalty` checks before anything changes, and how it chooses the level."""

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
    for what, value in factors.items():
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise PenaltyError(f"{what} must lie between 0 and 1, not {value}")


def check_placement(placement: str) -> None:
    if placement not in get_args(Placement):
        raise PenaltyError(f"mask_placement must be 'replicated' or 'sharded', not {placement!r}")


def check_shareable(leaves: list[Leaf], fundamental: FundamentalSet) -> None:
    """Whether each rank can hold a part of the bits: all need the same ones. Collective."""
    digest = hashlib.sha256(repr((fundamental.info.shapes, fundamental.info.counts)).encode()).digest()
    marks = collectives.all_gather_ints([int.from_bytes(digest[:7], "little")], what="comparison of the sets")
    if any(mark != marks[0] for mark in marks):
        raise PenaltyError("the ranks have different sets, of which they cannot each hold a part")
    parts = [s.name for leaf in leaves for s in leaf.segments if s.box.numel != prod(s.box.grid)]
    if parts:
        raise PenaltyError(
            f"mask_placement='sharded' is not there for tensor parallelism ({listing(parts, 3)} are split): use 'replicated'"
        )


def check_model(engine: Engine, fundamental: FundamentalSet, given: Optimizer | None) -> Optimizer | None:
    """Refuses what cannot be penalised; returns the torch optimizer that steps the weights, if it is known."""
    if not isinstance(fundamental, FundamentalSet):
        raise PenaltyError(
            f"fundamental must be a FundamentalSet, not {type(fundamental).__name__}: select_fundamental(scores) makes one "
            "of scores, FundamentalSet.load(path) of a file"
        )
    if engine.name == "single" and collectives.world_size() > 1:
        log.warning(
            "the model is a plain module on %d ranks: nothing averages its gradients unless your loop does",
            collectives.world_size(),
        )
    if engine.penalty is not None:
        raise PenaltyError("a penalty is already attached to this model: remove it first, or use set_factor")
    _check_fit(engine, fundamental)
    trainable = set(engine.names.trainable)
    half = [s.name for s in engine.shards() if s.name in trainable and s.local.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise PenaltyError(
            f"weights are stored in half precision without float32 masters ({listing(half, 3)}): small steps would be "
            "rounded away; keep the weights in float32 and compute in bfloat16 (MixedPrecisionPolicy or autocast)"
        )
    optimizer: Optimizer | None = torch_optimizer(given)
    if engine.own_optimizer is not None:
        if optimizer not in (None, engine.own_optimizer):
            raise PenaltyError("DeepSpeed steps with the optimizer given to deepspeed.initialize: pass that one, or none")
        return engine.own_optimizer
    if optimizer is not None:
        _check_optimizer(optimizer, engine.stepped(), fundamental)
    return optimizer


def _check_optimizer(optimizer: Optimizer, names: dict[int, list[str]], fundamental: FundamentalSet) -> None:
    if not isinstance(optimizer, Optimizer):
        raise PenaltyError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    stepped = set(names_stepped(optimizer, names))
    if not stepped:
        raise PenaltyError(
            "the optimizer steps none of the model's weights: create it after the model was wrapped or sharded"
        )
    strangers = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    missed = [n for held in names.values() for n in held if n in fundamental.info.shapes and n not in stepped]
    if strangers and missed:
        log.warning(
            "the optimizer steps %d tensors that are not the model's, and not %s: was it created before sharding, or "
            "under FSDP2 after a forward without backward?",
            strangers,
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
    for what, value, known in (("level", level, get_args(Level)), ("where", where, get_args(Where))):
        if value not in known:
            raise PenaltyError(f"{what} must be one of {', '.join(known)}, not {value!r}{did_you_mean(value, known)}")
    chosen, reason = _auto_level(optimizer) if level == "auto" else (level, "asked for")
    log.info("penalty level %s: %s", chosen, reason)
    if optimizer is None and (chosen == "update" or where == "after"):
        raise PenaltyError("level='update' and where='after' work around optimizer.step: pass the optimizer")
    if level == "gradient" and optimizer is not None and not isinstance(optimizer, torch.optim.SGD):
        log.warning(CANCELLED, type(optimizer).__name__)
    return "update" if chosen == "update" else "gradient"


CANCELLED = (
    "%s may cancel a gradient penalty: at factor 0.1 the penalised weights moved, relative to no penalty, 0.10 under SGD "
    "but 1.00 under Adam, AdamW, NAdam, Adamax, RMSprop and Adagrad; use level='update'"
)


def _auto_level(optimizer: Optimizer | None) -> tuple[str, str]:
    if optimizer is None:
        return "gradient", "no optimizer was given, so only the gradient can be reached"
    if not isinstance(optimizer, torch.optim.SGD):
        return "update", f"{type(optimizer).__name__} is not SGD and may cancel a gradient penalty by its own scaling"
    if any(group["weight_decay"] for group in optimizer.param_groups):
        return "update", "SGD with weight decay: a gradient penalty would leave the decay at full strength"
    return "gradient", "SGD without weight decay steps in proportion to the gradient"


def names_stepped(optimizer: Optimizer, names: dict[int, list[str]]) -> list[str]:
    return [n for group in optimizer.param_groups for p in group["params"] for n in names.get(id(p), ())]
