"""Importance scores: estimates of how much the downstream loss rises if a weight is removed, computed on shards.

`score_importance` lists the criteria. The empirical Fisher matrix is not the Hessian, and squared gradients depend on the
size of the score batch. All criteria are therefore heuristics, and the size of the score batch is part of the criterion.
Scores take 4 bytes per weight that a rank owns, and nothing else of that size is allocated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.box import Box
from ..engines.checksum import checksum
from ..engines.current import Current
from ..engines.find import find_engine
from ..engines.names import Patterns, as_patterns, is_adapter, matrix_names, table_names
from ..errors import PenaltyError, ScoreError, did_you_mean, listing
from ..seeds import seed_of
from .bits import CHUNK
from .brain_surgeon import score_blocks
from .penalty_checks import check_precision
from .score_batches import Losses, LossFn, backward_batch, score_batches, undisturbed
from .scores import Scores, ScoreShard
from .term_sums import TermSums

log = logging.getLogger(__name__)

_MANY = 0.05  # share of the weights that are warned of if they are not scored


Criterion = Literal["taylor", "taylor_squared", "removal", "fisher", "obs", "magnitude", "random"]


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
    """Scores every eligible weight: how much would the downstream loss rise if the weight were removed? Collective.

    The model runs in eval mode. Its modes, buffers, gradients and random states are restored at the end. Warm up the head
    first (`warm_up_head`): a random head makes the scores meaningless.

    A pattern is the name of a module or parameter ("classifier"), or a glob over whole parameter names
    ("blocks.*.mlp.*"). Names are those of the unwrapped model. Pass one pattern or a list of them.

    Args:
        model: a plain module (with the same weights on every rank), a DistributedDataParallel, an FSDP2-sharded module, a
            FullyShardedDataParallel, or a DeepSpeedEngine.
        batches: this rank's items. Every rank needs the same number, a multiple of `accumulation`. None for "magnitude"
            and "random"; a list for "obs", which may need several passes over it.
        loss_fn: `loss_fn(model, batch)` returns the mean loss over the batch's samples as a scalar tensor, or
            `(sum, count)`: the sum of the losses and the number of samples. Use the latter if ranks have unequal numbers of
            samples. Under DDP it receives the unwrapped module. None for "magnitude" and "random".
        head: patterns of the new task head, which is never scored; `()` if the model has none.
        criterion: how a weight w is scored. g_b is the gradient of the mean loss of score batch b over all ranks. mean_b is
            the mean over the score batches.

            - "fisher" (default): mean_b(g_b^2). The diagonal of the empirical Fisher matrix, as in FISH mask (Sung et al.
              2021). Of the criteria tried, penalising its set worked best (docs/results/evidence.md).
            - "taylor": |mean_b(g_b) w|. The first-order Taylor term of the removal (Molchanov et al. 2017, 2019).
            - "taylor_squared": mean_b((g_b w)^2). With batches of one sample, this is the second-order term with the
              diagonal of the empirical Fisher matrix as the Hessian (Theis et al. 2018).
            - "removal": -mean_b(g_b) w + 1/2 mean_b(g_b^2) w^2. Both Taylor terms, with that diagonal as the Hessian.
              Signed: a negative score means that removal should lower the loss.
            - "obs": w^2 / (2 [F^-1]_ii), F being the empirical Fisher matrix in blocks plus `damping` on its diagonal.
              Optimal brain surgeon (Hassibi and Stork 1993; Kurtic et al. 2022).
            - "magnitude": |w|. A control: uses no data.
            - "random": hash(seed, name, flat index), uniform in [0, 1). A control: uses no data.
        eligible: patterns of the weights to score. None: the weights of all linear and convolution layers. Weights of the
            head and frozen weights are never scored.
        accumulation: items per score batch on each rank. A score batch is `accumulation` consecutive items of all ranks.
        seed: seed of "random".
        block: for "obs": number of consecutive weights in a block of the Fisher matrix.
        damping: for "obs": added to the diagonal of the Fisher matrix, above 0.
        limit_bytes: for "obs": memory for gradients on each rank, in bytes. If it is too small for all weights at once,
            the weights are scored in several passes over `batches`.

    Returns:
        The scores (`Scores`): 4 bytes for each weight that this rank owns.

    Raises:
        ScoreError: an unknown criterion, no eligible weights, no batches, or a loss that is not a finite scalar. Also if
            the ranks have unequal numbers of items, or if a penalty is attached, or if a plain module has other weights on
            another rank.
        PatternError: a pattern matches nothing.
        EngineError: the model is wrapped in an unsupported way, or "obs" has blocks that are split between ranks.
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
        raise ScoreError(f"criterion {criterion!r} needs batches and loss_fn")
    if criterion == "obs":
        return _score_obs(engine, scores, batches, loss_fn, accumulation, block, damping, limit_bytes)
    return _score_gradients(engine, scores, batches, loss_fn, accumulation)


def _check_arguments(criterion: str, accumulation: int, engine: Engine) -> None:
    known = get_args(Criterion)
    if criterion not in known:
        raise ScoreError(f"unknown criterion {criterion!r}{did_you_mean(criterion, known)}; use one of {', '.join(known)}")
    if accumulation < 1:
        raise ScoreError(f"accumulation must be at least 1, not {accumulation}")
    if engine.penalty is not None:
        raise ScoreError("the penalty attached to this model would scale the gradients: remove it before scoring")
    if engine.name == "single" and collectives.world_size() > 1:
        _check_replicas(engine)


def _check_replicas(engine: Engine) -> None:
    """A plain module must have the same weights on every rank. DDP ensures that itself.

    Raises:
        ScoreError: some weights differ between ranks.
    """
    sums = torch.stack([checksum(shard.local, shard.box).cpu() for shard in engine.shards()])
    extremes = collectives.all_reduce(torch.cat([sums, ~sums]), "max", what="comparison of the replicas")
    highest, lowest = extremes[: len(sums)], ~extremes[len(sums) :]
    differing = [s.name for s, high, low in zip(engine.shards(), highest, lowest, strict=True) if high != low]
    if differing:
        raise ScoreError(f"the ranks have different values in {listing(differing)}: start from the same weights, or use DDP")


def _empty_scores(engine: Engine, head: Patterns, eligible: Patterns | None, criterion: str) -> Scores:
    """Divides the weights into head, frozen, eligible and unscored, and allocates the scores of the eligible ones."""
    names = engine.names
    head_patterns = as_patterns(head, what="head")
    head_names = set(names.match(head_patterns, what="head"))
    requested = matrix_names(engine.module, names) if eligible is None else names.match(eligible, what="eligible")
    frozen = tuple(n for n, p in names.parameters.items() if not p.requires_grad)
    scored = [n for n in requested if n not in head_names and n not in frozen and not is_adapter(n)]
    if not scored:
        raise ScoreError(
            "no eligible weights: none of the matched weights is trainable and outside the head "
            f"(matched {listing(requested) or 'nothing'}; head {listing(head_patterns) or 'none'}; {len(frozen)} frozen)"
        )
    shapes = engine.full_shapes()
    if eligible is None:
        _warn_of_unscored(engine, {*scored, *head_names, *frozen}, shapes)
    if criterion not in ("magnitude", "random"):
        _warn_of_half_precision(engine)
    local = {s.name: s for s in engine.shards()}
    return Scores(
        criterion=criterion,
        shapes={n: shapes[n] for n in scored},
        shards={
            n: ScoreShard(local[n].owned_box, torch.zeros(local[n].owned_box.numel, device=local[n].local.device))
            for n in scored
        },
        head=head_patterns,
        unscored=tuple(n for n in names.parameters if n not in head_names and n not in scored),
        frozen=frozen,
        num_weights=sum(prod(shape) for shape in shapes.values()),
    )


def _warn_of_unscored(engine: Engine, known: set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Warns of matrices that are scored only if they are named, if they are many: weight-normed layers, LSTMs, own classes.

    Args:
        engine: the engine of the model.
        known: weights that are scored, frozen, or the head's.
        shapes: shape of every weight.
    """
    tables = table_names(engine.module, engine.names)
    others = {name: prod(shapes[name]) for name in engine.names.parameters if name not in known and name not in tables}
    matrices = [name for name in others if len(shapes[name]) > 1]
    total = sum(others.values()) + sum(prod(shapes[name]) for name in known)
    if (number := sum(others[name] for name in matrices)) > _MANY * total:
        log.warning(
            "%d weights in matrices outside linear and convolution layers are not scored, and move as usual: %s; name them "
            "in `eligible` to score them, or remove their parametrization (weight norm) first",
            number,
            listing(matrices, 4),
        )


def _warn_of_half_precision(engine: Engine) -> None:
    try:
        check_precision(engine)
    except PenaltyError as error:
        log.warning("these scores will not do for a penalty on this model: %s", error)


def _owned(engine: Engine, scores: Scores) -> Iterator[tuple[str, Shard]]:
    """Name and shard of every scored weight, in model order."""
    for shard in engine.shards():
        if shard.name in scores.shards:
            yield shard.name, shard


def _score_gradients(engine: Engine, scores: Scores, batches: Iterable[Any], loss_fn: LossFn, accumulation: int) -> Scores:
    losses, current = Losses(), Current(engine)
    sums = TermSums(scores.criterion, {name: shard.values for name, shard in scores.shards.items()})
    with undisturbed(engine):
        for items in score_batches(batches, accumulation):
            divisor = backward_batch(engine, items, loss_fn, losses)
            current.refresh()
            sums.add(current, divisor)
            engine.clear_gradients()
        if losses.num_batches == 0:
            raise ScoreError("there are no batches to score on")
        means = losses.means()
        for name, shard in _owned(engine, scores):
            values = scores.shards[name].values.div_(len(means))
            if scores.criterion == "taylor":
                values.mul_(shard.local.reshape(-1)[slice(*shard.owned)]).abs_()
    return Scores(**{**scores.__dict__, "loss": sum(means) / len(means), "num_batches": len(means)})


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
        raise ScoreError("criterion 'obs' needs its batches as a list with at least one score batch")
    if block < 1 or damping <= 0:
        raise ScoreError(f"criterion 'obs' needs block >= 1 and damping > 0, not {block} and {damping}")
    losses = Losses()

    def gradients() -> Iterator[dict[str, Tensor]]:
        nonlocal losses
        losses = Losses()  # of this pass
        for items in score_batches(batches, accumulation):
            divisor = backward_batch(engine, items, loss_fn, losses)
            yield {n: s.gradient.reshape(-1) / divisor for n, s in _owned(engine, scores) if s.gradient is not None}
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
        means = losses.means()
    return Scores(**{**scores.__dict__, "loss": sum(means) / len(means), "num_batches": len(means)})


def _fill_random(values: Tensor, box: Box, name: str, seed: int) -> None:
    """Uniform values in [0, 1) with 24 bits, by a SplitMix64 counter hash of (seed, name, flat index)."""
    key = seed_of(seed, name, bits=64)
    key -= (key >> 63) << 64  # as a signed integer
    for begin in range(0, box.numel, CHUNK):
        end = min(begin + CHUNK, box.numel)
        x = box.flat_index(begin, end, values.device) * -7046029254386353131 + key
        x = (x ^ _shift(x, 30)) * -4658895280553007687
        x = (x ^ _shift(x, 27)) * -7723592293110705685
        values[begin:end] = _shift(x ^ _shift(x, 31), 40).to(torch.float32) / (1 << 24)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's `>>` keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
