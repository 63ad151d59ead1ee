"""Forecasts the memory and traffic of a model on N GPUs, without GPUs. The code runs as rank 0 of N on fake tensors.

Fake tensors have shapes but no memory, and torch's fake process group replaces the other ranks. Wrapping, scoring, attaching
the penalty and training steps run unchanged. Only the selection does not run, because it reads values. A set of every
tenth weight takes its place. The other memory of a selection does not depend on the number of weights
(`kth_highest`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..compat.deepspeed import zero3_alone, zero3_weights
from ..compat.pytorch import fake_ranks, fake_tensors, memory_tracker
from ..engines.find import find_engine
from ..engines.meta import Materialiser
from ..engines.prepared import Prepared, WrapOptions, reduces_each
from ..engines.wrap import prepare
from ..errors import ConfigError
from ..method.bits import STEP, num_bytes
from ..method.fundamental_set import FundamentalSet, SetInfo
from ..method.importance import score_importance
from ..method.penalty import attach_penalty
from ..method.scores import Scores
from .planned_models import Planned, Request, planned

GIB = 2**30


# Kind of memory in a forecast -> names of torch's memory tracker.
KINDS = {
    "parameters": ("Sharded Param", "Unsharded Param", "Buffer"),
    "gradients": ("Sharded Grad", "Unsharded Grad"),
    "optimizer": ("OptState",),
    "communication": ("All Gather", "Reduce Scatter"),
    "activations": ("Activation", "Temp", "Inputs"),
}


@dataclass
class Forecast:
    """Memory and traffic of rank 0, which has the largest shards. All sizes are in bytes.

    Attributes:
        request: what was planned.
        weights: number of weights of the whole model.
        eligible: number of eligible weights of the whole model.
        plain_step, dcft_step: memory by kind at the peak of a training step, without and with the penalty. Kinds: those of
            `KINDS`, and `other`. Under ZeRO-3 only `parameters`, `optimizer` and `other` are told apart.
        score_peak: peak memory of scoring.
        scores: memory of the scores.
        bits: memory of the penalty's mask.
        sent_plain, sent_dcft, sent_score: traffic by collective of a step without the penalty, of a step with it, and of
            scoring one batch.
    """

    request: Request
    weights: int = 0
    eligible: int = 0
    plain_step: dict[str, int] = field(default_factory=dict)
    dcft_step: dict[str, int] = field(default_factory=dict)
    score_peak: int = 0
    scores: int = 0
    bits: int = 0
    sent_plain: dict[str, int] = field(default_factory=dict)
    sent_dcft: dict[str, int] = field(default_factory=dict)
    sent_score: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON types, with the peaks and whether the model fits."""
        peaks = {"plain_peak": self.plain_peak, "dcft_peak": self.dcft_peak, "peak": self.peak, "fits": self.fits}
        return {**asdict(self), **peaks}

    @property
    def plain_peak(self) -> int:
        """Peak memory of a step without the penalty, in bytes."""
        return sum(self.plain_step.values())

    @property
    def dcft_peak(self) -> int:
        """Peak memory of a step with the penalty, in bytes."""
        return sum(self.dcft_step.values()) + self.bits

    @property
    def peak(self) -> int:
        """Peak memory of scoring or of a step with the penalty, in bytes. Steps begin after the scores are deleted."""
        return max(self.score_peak, self.dcft_peak)

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the memory of one GPU."""
        return self.peak <= self.request.memory_gib * GIB


def forecast(request: Request) -> Forecast:
    """Forecasts memory and traffic on fake tensors. Needs a process without a process group.

    Args:
        request: model, ranks, engine and sizes.

    Raises:
        ConfigError: a size is below 1, `replicas` are requested under ZeRO-3, or the model is unknown or cannot be planned.
        EngineError: the replicas do not divide the ranks.
    """
    for key in ("ranks", "gpus_per_node", "micro_batch", "accumulation", "length", "replicas"):
        if getattr(request, key) < 1:
            raise ConfigError(f"{key} must be at least 1, not {getattr(request, key)}")
    zero3 = request.engine == "zero3"
    if zero3 and request.replicas > 1:
        raise ConfigError("replicas are for FSDP2, not for ZeRO-3")
    with fake_ranks(request.ranks), _as_on_a_gpu(), zero3_alone() if zero3 else nullcontext():
        return measure(request, partial(fake_tensors, numbers=zero3))


def table(found: Forecast) -> str:
    """The forecast as text, the output of `dcft plan`.

    Args:
        found: the forecast.
    """
    request = found.request
    lines = [
        f"{request.model}: {found.weights:,} weights, {found.eligible:,} eligible; {request.engine} on "
        f"{request.ranks} ranks ({ceil(request.ranks / request.gpus_per_node)} nodes), {request.replicas} replicas, "
        f"{'bf16' if request.bf16 else 'fp32'}, micro-batch {request.micro_batch}, penalty on the {request.level}"
        + (f", {request.where}" if request.level == "gradient" else "")
        + (f", {request.accumulation} micro-batches in a step" if request.accumulation > 1 else "")
        + (f", checkpointing: {request.activation_checkpointing}" if request.activation_checkpointing != "none" else ""),
        "",
        f"{'GiB on a rank':<28}{'plain step':>12}{'with DCFT':>12}",
    ]
    rows = [(kind, found.plain_step[kind], found.dcft_step[kind]) for kind in found.plain_step]
    rows += [("mask", 0, found.bits), ("peak of a step", found.plain_peak, found.dcft_peak)]
    rows += [("peak of scoring", 0, found.score_peak), ("  scores", 0, found.scores)]
    lines += [f"{name:<28}{a / GIB:>12.3f}{b / GIB:>12.3f}" for name, a, b in rows]
    lines += ["", f"{'GiB sent or gathered':<28}{'plain step':>12}{'with DCFT':>12}{'score batch':>12}"]
    for name in sorted({*found.sent_plain, *found.sent_dcft, *found.sent_score}):
        sizes = [sent.get(name, 0) / GIB for sent in (found.sent_plain, found.sent_dcft, found.sent_score)]
        lines.append(f"{name:<28}" + "".join(f"{size:>12.3f}" for size in sizes))
    share = 100 * (found.peak / found.plain_peak - 1)
    verdict = "fits into" if found.fits else "does not fit into"
    lines += ["", f"needs {found.peak / GIB:.2f} GiB, {share:+.1f} % for DCFT: {verdict} {request.memory_gib:g} GiB"]
    return "\n".join(lines)


def measure(request: Request, memory: Callable[[], Any]) -> Forecast:
    """Measures memory and traffic on the ranks of the existing process group. Collective.

    Args:
        request: model, ranks, engine and sizes.
        memory: makes the context in which tensors are created: fake tensors, or `nullcontext` for real ones.

    Raises:
        ConfigError, EngineError: as `forecast`.
    """
    mode, result, planned_model = memory(), Forecast(request), planned(request)
    prepared, head, loss_of = _prepared(planned_model, request, mode), planned_model.head, planned_model.loss
    result.weights = sum(prod(shape) for shape in find_engine(prepared.model).full_shapes().values())

    def step(goes_on: Callable[[int], None] = lambda times: None) -> None:
        """Two micro-batches stand for all: the others are like the first one."""
        prepared.zero_grad()
        shown = min(request.accumulation, 2)
        for i in range(shown):
            goes_on(1 if i == shown - 1 else request.accumulation - 1)
            with prepared.accumulating(last=i == shown - 1):
                prepared.backward(loss_of(prepared.model, batch) / shown)
        prepared.step()

    with mode:
        batch = planned_model.make_batch()
        with _measured(prepared) as (peak, result.sent_score, _):
            scores = score_importance(prepared.model, [batch], loss_of, head=head, eligible=planned_model.eligible)
        result.score_peak = sum(peak.values())
        result.scores = sum(4 * s.values.numel() for s in scores.shards.values())
        result.eligible, chosen = scores.num_eligible, _some_set(scores)
        del scores
        step()
        with _measured(prepared) as (result.plain_step, result.sent_plain, goes_on):
            step(goes_on)
        penalty = attach_penalty(
            prepared.model,
            chosen,
            optimizer=prepared.optimizer,
            level=request.level,
            where=request.where,
            mask_placement=request.mask_placement,
        )
        result.bits = penalty.mask_bytes
        step()
        with _measured(prepared) as (result.dcft_step, result.sent_dcft, goes_on):
            step(goes_on)
        penalty.remove()
    return result


def _prepared(planned_model: Planned, request: Request, mode: Any) -> Prepared:
    """The model wrapped by the engine. Weights with memory are filled with a number."""
    device, zero3 = torch.device("cpu"), request.engine == "zero3"  # fake CPU tensors have the sizes of GPU tensors
    weights = sum(p.numel() for p in planned_model.model.parameters())
    options = WrapOptions(
        "deepspeed" if zero3 else "fsdp2",
        device,
        planned_model.blocks,
        request.bf16,
        request.replicas,
        zero_stage=3,
        micro_batch=request.micro_batch,
        accumulation=min(request.accumulation, 2),
        checkpointing=request.activation_checkpointing,
        reduce_each=reduces_each(request.reduce, request.accumulation, weights, request.memory_gib * GIB),
    )
    if not zero3:  # `prepare` then runs outside `mode`: FSDP2 makes a mesh of ranks, which needs real values
        with mode:
            Materialiser(device)(planned_model.model)
    with mode if zero3 else nullcontext():
        prepared = prepare(planned_model.model, options, planned_model.make_optimizer)
    engine = find_engine(prepared.model)
    with torch.no_grad(), mode:
        for shard in engine.shards():
            shard.local.detach().fill_(0.01)
        engine.publish()
    return prepared


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Fake tensors count as CPU tensors. In this block they are processed in pieces of the size used on a GPU."""
    step = STEP["cpu"]
    STEP["cpu"] = STEP["cuda"]
    try:
        yield
    finally:
        STEP["cpu"] = step


def _some_set(scores: Scores) -> FundamentalSet:
    """A fundamental set of a tenth of the eligible weights: the first bit of four of five bytes."""
    info = SetInfo(shapes=scores.shapes, counts=dict.fromkeys(scores.shapes, 0), fraction=0.1, head=scores.head)
    return FundamentalSet(info, lambda name: (np.arange(num_bytes(prod(info.shapes[name]))) % 5 > 0).astype(np.uint8))


@contextmanager
def _measured(prepared: Prepared) -> Iterator[tuple[dict[str, int], dict[str, int], Callable[[int], None]]]:
    """Measures a block: memory by kind at its peak, and traffic by collective, in bytes. Filled when the block ends.

    The third value is called before each forward of the block, with how often the traffic from there on counts.
    """
    tracker, sent = memory_tracker(prepared.model, prepared.optimizer), _Sent()
    peak: dict[str, int] = {}
    traffic: dict[str, int] = {}

    def goes_on(times: int) -> None:
        tracker.reset_mod_stats()  # else torch's tracker refuses a second forward; it keeps the peak
        sent.times = times

    with tracker, sent:
        yield peak, traffic, goes_on
    snapshot = next(iter(tracker.get_tracker_snapshot("peak").values()))
    by_name = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}
    total = by_name.pop("Total")
    if prepared.options.engine == "deepspeed":
        states = [value for state in prepared.optimizer.state.values() for value in _tensors(list(state.values()))]
        by_kind = {"parameters": _size(zero3_weights(prepared.model)), "optimizer": _size(states)}
    else:
        by_kind = {kind: sum(by_name.get(name, 0) for name in names) for kind, names in KINDS.items()}
    peak.update(by_kind, other=total - sum(by_kind.values()))
    traffic.update(sent.bytes)


class _Sent(TorchDispatchMode):
    """Counts the bytes of each collective: those of its largest tensor.

    Attributes:
        bytes: by name of the collective.
        times: how often everything that comes counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.times = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func.name()).partition("::")
        if space in ("c10d", "_c10d_functional"):
            self.bytes[name.strip("_")] += self.times * max((_size([t]) for t in _tensors(args)), default=0)
        return func(*args, **(kwargs or {}))


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, list | tuple):
        return [t for item in nested for t in _tensors(item)]
    return [nested] if isinstance(nested, Tensor) else []


def _size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
