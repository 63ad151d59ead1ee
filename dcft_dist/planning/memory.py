"""Forecasts the memory and traffic of a model on N GPUs, without GPUs. The code runs as rank 0 of N on fake tensors.

Fake tensors have shapes but no memory, and torch's fake process group replaces the other ranks. Wrapping, scoring, attaching
the penalty and training steps run unchanged. Only the selection does not run, because it reads values. A set of every
tenth weight takes its place. The other memory of a selection does not depend on the number of weights
(`kth_highest`).
"""

from __future__ import annotations

import math
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
from ..compat.pytorch import fake_ranks, fake_tensors, local_values, look_at_memory, memory_tracker
from ..engines.blocks import HOST, HostCopies
from ..engines.find import find_engine
from ..engines.meta import Materialiser
from ..engines.prepared import Prepared, WrapOptions, reduces_each
from ..engines.wrap import prepare
from ..errors import ConfigError
from ..method.bits import STEP, num_bytes
from ..method.fundamental_set import FundamentalSet, SetInfo
from ..method.importance import score_importance
from ..method.levels import Levels
from ..method.penalty import attach_penalty
from ..method.pull import PullToStart
from ..method.scores import Scores, ScoreShard
from ..weights.averages import AveragedWeights
from .planned_models import Planned, Request, planned

GIB = 2**30


# Names of torch's memory tracker for what `sharding.offload` keeps in host memory.
ON_HOST = {"Sharded Param": "parameters", "Sharded Grad": "gradients", "OptState": "optimizer"}


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
        pull: memory of the pull to the start: a copy of the weights, and levels.
        averages: memory of the average of the weights.
        host: host memory of a rank by kind, in a step with the penalty: what is offloaded, activations that wait there, and
            the copy of a checkpoint that is written in the background. Python and the libraries come on top.
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
    pull: int = 0
    averages: int = 0
    host: dict[str, int] = field(default_factory=dict)
    sent_plain: dict[str, int] = field(default_factory=dict)
    sent_dcft: dict[str, int] = field(default_factory=dict)
    sent_score: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The forecast as JSON types, with the peaks and whether the model fits."""
        peaks = {"plain_peak": self.plain_peak, "dcft_peak": self.dcft_peak, "peak": self.peak, "fits": self.fits}
        peaks["host_peak"] = self.host_peak
        return {**asdict(self), **peaks}

    @property
    def plain_peak(self) -> int:
        """Peak memory of a step without the penalty, in bytes."""
        return sum(self.plain_step.values())

    @property
    def dcft_peak(self) -> int:
        """Peak memory of a step with the penalty, in bytes."""
        return sum(self.dcft_step.values()) + sum(size for kind, size in self.kept.items() if kind not in self.host)

    @property
    def kept(self) -> dict[str, int]:
        """What is kept between steps for mask, pull and averages, in bytes."""
        more = {"pull to the start": self.pull, "average of the weights": self.averages}
        return {"mask": self.bits} | {kind: size for kind, size in more.items() if size}

    @property
    def peak(self) -> int:
        """Peak memory of scoring or of a step with the penalty, in bytes. Steps begin after the scores are deleted."""
        return max(self.score_peak, self.dcft_peak)

    @property
    def host_peak(self) -> int:
        """Host memory of a rank, in bytes."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        """Whether the peak fits into a GPU, and host memory of all ranks of a node into that of the node, if it is known."""
        request, node = self.request, self.host_peak * min(self.request.gpus_per_node, self.request.ranks)
        return self.peak <= request.memory_gib * GIB and node <= (request.host_memory_gib or math.inf) * GIB


def forecast(request: Request) -> Forecast:
    """Forecasts memory and traffic on fake tensors. Needs a process without a process group.

    Args:
        request: model, ranks, engine and sizes.

    Raises:
        ConfigError: a size is below 1, `replicas` are requested under ZeRO-3, or the model is unknown or cannot be planned.
        EngineError: the replicas do not divide the ranks.
    """
    for key in ("ranks", "gpus_per_node", "micro_batch", "accumulation", "length", "replicas", "tensor_parallel"):
        if getattr(request, key) < 1:
            raise ConfigError(f"{key} must be at least 1, not {getattr(request, key)}")
    zero3 = request.engine == "zero3"
    if zero3 and request.replicas > 1:
        raise ConfigError("replicas are for FSDP2, not for ZeRO-3")
    if zero3 and request.tensor_parallel > 1:
        raise ConfigError("tensor parallelism is for FSDP2, not for ZeRO-3")
    if zero3 and request.offload:
        raise ConfigError("sharding.offload can be planned under FSDP2, not under ZeRO-3")
    with fake_ranks(request.ranks), _as_on_a_gpu(), zero3_alone() if zero3 else nullcontext():
        return measure(request, partial(fake_tensors, numbers=zero3 or request.custom_optimizer))


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
        + (f", {request.tensor_parallel} ranks together" if request.tensor_parallel > 1 else "")
        + (f", {request.where}" if request.level == "gradient" else "")
        + (f", {request.accumulation} micro-batches in a step" if request.accumulation > 1 else "")
        + (f", checkpointing: {request.activation_checkpointing}" if request.activation_checkpointing != "none" else "")
        + (", activations on the host" if request.activations_on_host else "")
        + (", weights and optimizer on the host" if request.offload else ""),
        "",
        f"{'GiB on a rank':<28}{'plain step':>12}{'with DCFT':>12}",
    ]
    rows = [(kind, found.plain_step[kind], found.dcft_step[kind]) for kind in found.plain_step]
    rows += [(kind, 0, 0 if kind in found.host else size) for kind, size in found.kept.items()]
    rows += [("peak of a step", found.plain_peak, found.dcft_peak)]
    rows += [("peak of scoring", 0, found.score_peak), ("  scores", 0, found.scores)]
    lines += [f"{name:<28}{a / GIB:>12.3f}{b / GIB:>12.3f}" for name, a, b in rows]
    lines += ["", f"{'GiB sent or gathered':<28}{'plain step':>12}{'with DCFT':>12}{'score batch':>12}"]
    for name in sorted({*found.sent_plain, *found.sent_dcft, *found.sent_score}):
        sizes = [sent.get(name, 0) / GIB for sent in (found.sent_plain, found.sent_dcft, found.sent_score)]
        lines.append(f"{name:<28}" + "".join(f"{size:>12.3f}" for size in sizes))
    share = 100 * (found.peak / found.plain_peak - 1)
    node, given = found.host_peak * min(request.gpus_per_node, request.ranks) / GIB, request.host_memory_gib
    if found.host:
        lines += ["", f"{'GiB of host memory on a rank':<40}{'with DCFT':>12}"]
        lines += [f"{kind:<40}{size / GIB:>12.3f}" for kind, size in found.host.items()]
        told = "" if given is None else f": {'fits' if node <= given else 'does not fit'} into {given:g} GiB"
        lines += [f"{'together, on a node':<40}{node:>12.3f}{told}"]
    verdict = "fits into" if found.peak <= request.memory_gib * GIB else "does not fit into"
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

    with mode, _counted_copies() as copies:
        batch = planned_model.make_batch()
        if planned_model.uses_set:
            with _measured(prepared) as scoring:
                scores = score_importance(prepared.model, [batch], loss_of, head=head, eligible=planned_model.eligible)
            result.scores = sum(4 * s.values.numel() for s in scores.shards.values())
            result.score_peak = sum(scoring.peak.values()) - (result.scores if request.offload else 0)
            result.sent_score = scoring.sent
            result.eligible, chosen = scores.num_eligible, _some_set(scores)
            del scores
        step()
        with _measured(prepared) as plain:
            step(plain.goes_on)
        result.plain_step, result.sent_plain = plain.peak, plain.sent
        dcft = plain
        if planned_model.uses_set:
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
            with _measured(prepared) as dcft:
                step(dcft.goes_on)
            penalty.remove()
        result.pull = _pull_bytes(prepared, planned_model, request) if request.pull_to_start else 0
        if request.ema:
            result.averages = _size(list(AveragedWeights(prepared.model, request.ema).values.values()))
    result.dcft_step, result.sent_dcft, result.host = dcft.peak, dcft.sent, dcft.host
    if request.offload and (request.level == "update" or request.where == "after"):
        result.host["mask"] = result.bits
    if request.offload:
        result.host |= {kind: size for kind, size in result.kept.items() if kind != "mask"}
    if request.activations_on_host:
        result.host["activations"] = copies.most
    if request.checkpoint_copies:
        states = dcft.host.get("optimizer", dcft.peak.get("optimizer", 0)) / request.replicas
        result.host["copy of a checkpoint"] = int(4 * result.weights / request.ranks + states)
    return result


def _pull_bytes(prepared: Prepared, planned_model: Planned, request: Request) -> int:
    """What a pull to the start keeps. Its levels are all alike here."""
    head, levels = planned_model.head, None
    if request.pull_by_importance:
        eligible = planned_model.eligible
        scores = score_importance(prepared.model, None, None, head=head, criterion="random", eligible=eligible)
        shards = {n: ScoreShard(s.box, s.values.to(torch.uint8)) for n, s in scores.shards.items()}
        levels = Levels(scores.shapes, shards)
    pull = PullToStart(
        prepared.model,
        head,
        request.pull_to_start,
        prepared.optimizer,
        by_importance=request.pull_by_importance,
        levels=levels,
    )
    pull.remove()
    return pull.num_bytes


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
        request.tensor_parallel,
        zero_stage=3,
        micro_batch=request.micro_batch,
        accumulation=min(request.accumulation, 2),
        checkpointing=request.activation_checkpointing,
        activations_on_host=request.activations_on_host,
        offload=request.offload,
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


@dataclass
class _Measured:
    """What a block needs, in bytes. Filled when the block ends.

    Attributes:
        goes_on: is called before each forward, with how often the traffic from there on counts.
        peak: memory by kind at its peak.
        host: offloaded memory by kind.
        sent: traffic by collective.
    """

    goes_on: Callable[[int], None]
    peak: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


@contextmanager
def _measured(prepared: Prepared) -> Iterator[_Measured]:
    """Measures a block."""
    offloaded = prepared.options.offload
    (tracker, by_name), sent = memory_tracker(prepared.model, prepared.optimizer, ON_HOST if offloaded else ()), _Sent()

    def goes_on(times: int) -> None:
        tracker.reset_mod_stats()  # else torch's tracker refuses a second forward; it keeps the peak
        sent.times = times

    found = _Measured(goes_on)
    with tracker, sent:
        look_at_memory(tracker)
        yield found
    if offloaded:
        found.host = {kind: by_name.pop(name, 0) for name, kind in ON_HOST.items()}
        by_name["Reduce Scatter"] = by_name.get("Reduce Scatter", 0) + _between_host_and_gpu(prepared)
    total = sum(by_name.values())
    if prepared.options.engine == "deepspeed":
        states = [value for state in prepared.optimizer.state.values() for value in _tensors(list(state.values()))]
        by_kind = {"parameters": _size(zero3_weights(prepared.model)), "optimizer": _size(states)}
    else:
        by_kind = {kind: sum(by_name.get(name, 0) for name in names) for kind, names in KINDS.items()}
    found.peak = {**by_kind, "other": total - sum(by_kind.values())}
    found.sent = dict(sent.bytes)


def _between_host_and_gpu(prepared: Prepared) -> int:
    """Bytes of a block's shards on their way: to the GPU for this block and the next, and of gradients back to the host."""
    blocks = prepared.options.blocks or [prepared.model]
    largest: int = max(sum(local_values(p).numel() for p in block.parameters()) for block in blocks)
    return 3 * 4 * largest


class _CountedCopies(HostCopies):
    """Counts what goes into host memory, and copies nothing.

    Attributes:
        most: largest number of bytes there at one time.
    """

    def __init__(self) -> None:
        self.most = self._now = 0

    def put(self, tensor: Tensor) -> Any:
        self._now += _size([tensor])
        self.most = max(self.most, self._now)
        return tensor.shape, tensor.dtype

    def get(self, kept: Any) -> Tensor:
        shape, dtype = kept
        tensor = torch.zeros(shape, dtype=dtype)
        self._now -= _size([tensor])
        return tensor


@contextmanager
def _counted_copies() -> Iterator[_CountedCopies]:
    HOST.append(copies := _CountedCopies())
    try:
        yield copies
    finally:
        HOST.pop()


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
        if space in ("c10d", "_c10d_functional") and not name.strip("_").startswith(("wait", "wrap")):  # these send nothing
            self.bytes[name.strip("_")] += self.times * max((_size([t]) for t in _tensors(args)), default=0)
        return func(*args, **(kwargs or {}))


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, list | tuple):
        return [t for item in nested for t in _tensors(item)]
    return [nested] if isinstance(nested, Tensor) else []


def _size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
