"""Importance scores: how much the downstream loss would rise if a weight were removed, estimated on shards.

With g the gradient of the mean loss of one score batch (averaged over ranks) and w the weight, over score batches b:

    taylor          |mean_b(g_b) w|                         first-order Taylor (Molchanov et al. 2017, 2019)
    taylor_squared  mean_b((g_b w)^2)                       with batches of one sample, the diagonal empirical-Fisher form of
                                                            the second-order term (Theis et al. 2018)
    removal         -mean_b(g_b) w + 1/2 mean_b(g_b^2) w^2  signed: both Taylor terms, the Hessian by the Fisher
    fisher          mean_b(g_b^2)                           the default: of those tried, the best set to hold
                                                            (docs/results/evidence.md); FISH mask (Sung et al. 2021)
    obs             w^2 / (2 [F^-1]_ii)                     optimal brain surgeon, blockwise Fisher (see `obs`)
    magnitude       |w|                                     control
    random          hash(seed, name, flat index)            control

The empirical Fisher is not the Hessian, and squares depend on the score batch: all these are heuristics, and the size of
the score batch is part of the criterion. Scores take 4 bytes for each weight that a rank owns, nothing else of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.box import Box
from ..engines.find import find_engine
from ..engines.names import Patterns, as_patterns, matrix_names
from ..errors import ScoreError, did_you_mean, listing
from ..seeds import seed_of
from .bits import CHUNK, step_of
from .brain_surgeon import score_blocks
from .score_batches import LossFn, backward_batch, score_batches, undisturbed
from .scores import Scores, ScoreShard

Criterion = Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"]


# Per score batch: (g, w) -> what is averaged over the batches.
_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda g, w: g,
    "taylor_squared": lambda g, w: (g * w).square_(),
    "removal": lambda g, w: (g * w).square_().mul_(0.5).sub_(g * w),
    "fisher": lambda g, w: g.square(),
}


def score_importance(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    head: Patterns,
    criterion: Criterion = "fisher",
    eligible: Patterns | None = None,
    accumulation: int = 1,
    seed: int = 0,
    block: int = 192,
    damping: float = 1e-2,
    limit_bytes: int = 2 << 30,
) -> Scores:
    """Scores every eligible weight of `model` on the downstream loss. Collective.

    Args:
        model: a plain module (the same on every rank), a DistributedDataParallel, an FSDP2-sharded module, a
            FullyShardedDataParallel, or a DeepSpeedEngine.
        batches: this rank's items, as many on every rank; `accumulation` consecutive items on all ranks are one score
            batch. `magnitude` and `random` need none (None).
        loss_fn: `loss_fn(model, batch)` -> the mean loss over the batch's samples (equal sample counts on every rank),
            or `(sum, count)`. The model it is given is in eval mode (under DDP it is the wrapped module).
        head: patterns of the new task head, which is never scored; `()` says that there is none.
        criterion: see the module's text.
        eligible: patterns of the weights to score; None for the weights of linear and convolution layers outside
            `head`. Frozen weights are never scored.
        accumulation: items per score batch and rank.
        seed: seed of `random`.
        block, damping: of `obs`: consecutive weights of a block; what is added to the diagonal of the Fisher matrix.
        limit_bytes: of `obs`: memory for gradients; with less, `batches` (then a list) are gone through more often.

    Returns:
        The scores, 4 bytes for each weight this rank owns. Modes, buffers, gradients and random states are left as found.

    Raises:
        ScoreError: no eligible weights, no batches, ranks with unequal numbers of items, a loss that is no finite scalar.
        PatternError: a pattern matches nothing.
        EngineError: the model is wrapped in an unsupported way.
    """
    engine = find_engine(model)
    _check_arguments(criterion, accumulation, engine)
    scores = _empty_scores(engine, head, eligible, criterion)
    if criterion in ("magnitude", "random"):
        for name, shard in _owned(engine, scores):
            weight, values = shard.local.reshape(-1)[slice(*shard.owned)], scores.shards[name].values
            values.copy_(weight.abs()) if criterion == "magnitude" else _fill_random(values, shard.owned_box, name, seed)
        return scores
    if batches is None or loss_fn is None:
        raise ScoreError(f"criterion {criterion!r} needs batches and a loss function")
    if criterion == "obs":
        return _score_obs(engine, scores, batches, loss_fn, accumulation, block, damping, limit_bytes)
    return _score_gradients(engine, scores, batches, loss_fn, accumulation)


def _check_arguments(criterion: str, accumulation: int, engine: Engine) -> None:
    known = get_args(Criterion)
    if criterion not in known:
        raise ScoreError(f"unknown criterion {criterion!r}{did_you_mean(criterion, known)}; there are {', '.join(known)}")
    if accumulation < 1:
        raise ScoreError(f"accumulation must be at least 1, not {accumulation}")
    if engine.penalty is not None:
        raise ScoreError("a penalty is attached to this model and would scale the gradients: remove it before scoring")
    if engine.name == "single" and collectives.world_size() > 1:
        _check_replicas(engine)


def _check_replicas(engine: Engine) -> None:
    """A plain module on several ranks must be the same on each; DDP has seen to that itself."""
    sums = torch.stack([p.detach().double().sum().cpu() for p in engine.names.parameters.values()])
    both = collectives.all_reduce(torch.cat([sums, -sums]), "max", what="comparison of the replicas")
    differ = [n for n, d in zip(engine.names.parameters, both[: len(sums)] + both[len(sums) :], strict=True) if d != 0]
    if differ:
        raise ScoreError(f"the ranks have different values in {listing(differ)}: start from the same weights, or use DDP")


def _empty_scores(engine: Engine, head: Patterns, eligible: Patterns | None, criterion: str) -> Scores:
    """Sorts the weights into head, frozen, eligible and unscored, and makes room for the scores of the eligible ones."""
    names = engine.names
    head_patterns = as_patterns(head, what="head")
    heads = set(names.match(head_patterns, what="head"))
    wanted = matrix_names(engine.module, names) if eligible is None else names.match(eligible, what="eligible")
    frozen = tuple(n for n, p in names.parameters.items() if not p.requires_grad)
    chosen = [n for n in wanted if n not in heads and n not in frozen]
    if not chosen:
        raise ScoreError(
            "no eligible weights: none of the matched weights is trainable and outside the head "
            f"(matched {listing(wanted) or 'nothing'}; head {listing(head_patterns) or 'none'}; {len(frozen)} frozen)"
        )
    shapes = engine.full_shapes()
    local = {s.name: s for s in engine.shards()}
    return Scores(
        criterion=criterion,
        shapes={n: shapes[n] for n in chosen},
        shards={
            n: ScoreShard(local[n].owned_box, torch.zeros(local[n].owned_box.numel, device=local[n].local.device))
            for n in chosen
        },
        head=head_patterns,
        unscored=tuple(n for n in names.parameters if n not in heads and n not in chosen),
        frozen=frozen,
        num_weights=sum(prod(shape) for shape in shapes.values()),
    )


def _owned(engine: Engine, scores: Scores) -> Iterator[tuple[str, Shard]]:
    for shard in engine.shards():
        if shard.name in scores.shards:
            yield shard.name, shard


def _score_gradients(engine: Engine, scores: Scores, batches: Iterable[Any], loss_fn: LossFn, accumulation: int) -> Scores:
    term = _TERMS[scores.criterion]
    total_loss, num_batches = 0.0, 0
    with undisturbed(engine):
        for items in score_batches(batches, accumulation):
            loss, scale = backward_batch(engine, items, loss_fn)
            total_loss += loss
            num_batches += 1
            for name, shard in _owned(engine, scores):
                gradient = shard.gradient
                if gradient is None:  # no path from this weight to the loss
                    continue
                values, span = scores.shards[name].values, slice(*shard.owned)
                _add_term(values, gradient.reshape(-1)[span], shard.local.reshape(-1)[span], scale, term)
            engine.clear_gradients()
        if num_batches == 0:
            raise ScoreError("there are no batches to score on")
        for name, shard in _owned(engine, scores):
            values = scores.shards[name].values.div_(num_batches)
            if scores.criterion == "taylor":
                values.mul_(shard.local.reshape(-1)[slice(*shard.owned)]).abs_()
    return Scores(**{**scores.__dict__, "loss": total_loss / num_batches, "num_batches": num_batches})


def _score_obs(
    engine: Engine,
    scores: Scores,
    batches: Iterable[Any],
    loss_fn: LossFn,
    accumulation: int,
    block: int,
    damping: float,
    limit_bytes: int,
) -> Scores:
    if not isinstance(batches, Sequence) or len(batches) < accumulation:
        raise ScoreError("criterion 'obs' needs its batches as a list, with at least one score batch")
    if block < 1 or damping <= 0:
        raise ScoreError(f"obs needs block >= 1 and damping > 0, not {block} and {damping}")
    losses: list[float] = []

    def gradients() -> Iterator[dict[str, Tensor]]:
        losses.clear()
        for items in score_batches(batches, accumulation):
            loss, scale = backward_batch(engine, items, loss_fn)
            losses.append(loss)
            yield {n: s.gradient.reshape(-1) * scale for n, s in _owned(engine, scores) if s.gradient is not None}
            engine.clear_gradients()

    with undisturbed(engine):
        score_blocks(
            dict(_owned(engine, scores)),
            {name: shard.values for name, shard in scores.shards.items()},
            gradients,
            len(batches) // accumulation,
            block=block,
            damping=damping,
            limit_bytes=limit_bytes,
            num_passes=lambda n: max(row[0] for row in collectives.all_gather_ints([n], what="count of passes")),
        )
    return Scores(**{**scores.__dict__, "loss": sum(losses) / len(losses), "num_batches": len(losses)})


def _add_term(
    values: Tensor, gradient: Tensor, weight: Tensor, scale: float, term: Callable[[Tensor, Tensor], Tensor]
) -> None:
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    step = step_of(values.device)
    for begin in range(0, len(values), step):
        part = slice(begin, begin + step)
        values[part] += term(gradient[part].to(wide) * scale, weight[part].detach().to(wide))


def _fill_random(values: Tensor, box: Box, name: str, seed: int) -> None:
    """Uniform values in [0, 1) with 24 bits, a function of (seed, name, flat index) alone: a SplitMix64 counter hash."""
    key = seed_of(seed, name, bits=64)
    key -= (key >> 63) << 64  # as a signed integer
    for begin in range(0, box.numel, CHUNK):
        end = min(begin + CHUNK, box.numel)
        x = box.flat_index(begin, end, values.device) * -7046029254386353131 + key
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        values[begin:end] = _shift(x ^ _shift(x, 31), 40).to(torch.float32) / (1 << 24)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
