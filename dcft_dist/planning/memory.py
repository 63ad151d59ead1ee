"""What a model needs on each of N GPUs, found without any: the code runs as rank 0 of N on tensors without memory.

Wrapping, scoring, attaching and steps are the real ones, on torch's fake process group. Only the selection is not run,
since it looks at values: its bits are there (none set), and what it needs besides does not depend on the number of
weights (`threshold`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
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
from ..engines.prepared import Prepared, WrapOptions
from ..engines.wrap import prepare
from ..errors import ConfigError
from ..method.bits import STEP, num_bytes
from ..method.fundamental_set import FundamentalSet, SetInfo
from ..method.importance import score_importance
from ..method.penalty import attach_penalty
from ..method.scores import Scores
from .planned_models import Planned, Request, planned

GIB = 2**30


KINDS = {
    "parameters": ("Sharded Param", "Unsharded Param", "Buffer"),
    "gradients": ("Sharded Grad", "Unsharded Grad"),
    "optimizer": ("OptState",),
    "communication": ("All Gather", "Reduce Scatter"),
    "activations": ("Activation", "Temp", "Inputs"),
}


@dataclass
class Forecast:
    """Bytes of rank 0, which has the largest shards. `*_step`: by kind at the peak of a step (under ZeRO-3 "other" is all
    that is neither a weight nor an optimizer's state); `sent`: by collective."""

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
        peaks = {"plain_peak": self.plain_peak, "dcft_peak": self.dcft_peak, "peak": self.peak, "fits": self.fits}
        return {**asdict(self), **peaks}

    @property
    def plain_peak(self) -> int:
        return sum(self.plain_step.values())

    @property
    def dcft_peak(self) -> int:
        return sum(self.dcft_step.values()) + self.bits

    @property
    def peak(self) -> int:
        """Of scoring or of a step: scores are gone when steps begin."""
        return max(self.score_peak, self.dcft_peak)

    @property
    def fits(self) -> bool:
        return self.peak <= self.request.memory_gib * GIB


def forecast(request: Request) -> Forecast:
    """Runs the code as rank 0 of `request.ranks`, and tells what it needs. No process group may be there.

    Raises:
        ConfigError: a size below 1, an unknown model, or one whose loss is not known.
        EngineError: replicas that do not divide the ranks.
    """
    for key in ("ranks", "gpus_per_node", "micro_batch", "length", "replicas"):
        if getattr(request, key) < 1:
            raise ConfigError(f"{key} must be at least 1, not {getattr(request, key)}")
    zero3 = request.engine == "zero3"
    if zero3 and request.replicas > 1:
        raise ConfigError("replicas are for FSDP2, not for ZeRO-3")
    with fake_ranks(request.ranks), _as_on_a_gpu(), zero3_alone() if zero3 else nullcontext():
        return measure(request, partial(fake_tensors, numbers=zero3))


def table(found: Forecast) -> str:
    """The plan as text."""
    r = found.request
    lines = [
        f"{r.model}: {found.weights:,} weights, {found.eligible:,} eligible; {r.engine} on {r.ranks} ranks "
        f"({ceil(r.ranks / r.gpus_per_node)} nodes), {r.replicas} replicas, {'bf16' if r.bf16 else 'fp32'}, "
        f"micro-batch {r.micro_batch}, penalty on the {r.level}" + (f", {r.where}" if r.level == "gradient" else ""),
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
    lines += ["", f"needs {found.peak / GIB:.2f} GiB, {share:+.1f} % for DCFT: {verdict} {r.memory_gib:g} GiB"]
    return "\n".join(lines)


def measure(request: Request, memory: Callable[[], Any]) -> Forecast:
    """The same on the ranks that are there, on tensors made inside `memory()`."""
    mode, found, what = memory(), Forecast(request), planned(request)
    prepared, head, loss_of = _prepared(what, request, mode), what.head, what.loss
    found.weights = sum(prod(shape) for shape in find_engine(prepared.model).full_shapes().values())

    def steps(number: int) -> None:
        for _ in range(number):
            prepared.zero_grad()
            prepared.backward(loss_of(prepared.model, batch))
            prepared.step()

    with mode:
        batch = what.make_batch()
        with _measured(prepared) as (peak, found.sent_score):
            scores = score_importance(prepared.model, [batch], loss_of, head=head, eligible=what.eligible)
        found.score_peak = sum(peak.values())
        found.scores = sum(4 * s.values.numel() for s in scores.shards.values())
        found.eligible, chosen = scores.num_eligible, _empty_set(scores)
        del scores
        steps(1)
        with _measured(prepared) as (found.plain_step, found.sent_plain):
            steps(1)
        penalty = attach_penalty(
            prepared.model,
            chosen,
            optimizer=prepared.optimizer,
            level=request.level,
            where=request.where,
            mask_placement=request.mask_placement,
        )
        found.bits = penalty.mask_bytes
        steps(1)
        with _measured(prepared) as (found.dcft_step, found.sent_dcft):
            steps(1)
        penalty.remove()
    return found


def _prepared(what: Planned, request: Request, mode: Any) -> Prepared:
    """The model under the engine, its weights numbers where there is memory for them."""
    device, zero3 = torch.device("cpu"), request.engine == "zero3"  # a fake of one: sizes are the same
    how = WrapOptions("deepspeed" if zero3 else "fsdp2", device, what.blocks, request.bf16, request.replicas)
    how = replace(how, zero_stage=3, micro_batch=request.micro_batch)
    if not zero3:  # FSDP2 asks for a mesh of ranks, which has to have values
        with mode:
            Materialiser(device)(what.model)
    with mode if zero3 else nullcontext():
        prepared = prepare(what.model, how, what.make_optimizer)
    engine = find_engine(prepared.model)
    with torch.no_grad(), mode:
        for shard in engine.shards():
            shard.local.detach().fill_(0.01)
        engine.publish()
    return prepared


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Tensors without memory are the CPU's, to torch; a GPU's are handled in larger pieces."""
    step = STEP["cpu"]
    STEP["cpu"] = STEP["cuda"]
    try:
        yield
    finally:
        STEP["cpu"] = step


def _empty_set(scores: Scores) -> FundamentalSet:
    info = SetInfo(shapes=scores.shapes, counts=dict.fromkeys(scores.shapes, 0), fraction=0.1, head=scores.head)
    return FundamentalSet(info, lambda name: np.zeros(num_bytes(prod(info.shapes[name])), dtype=np.uint8))


@contextmanager
def _measured(prepared: Prepared) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Bytes by kind at the peak of the block, and bytes given to each kind of collective in it; filled at its end."""
    tracker, sent = memory_tracker(prepared.model, prepared.optimizer), _Sent()
    peak: dict[str, int] = {}
    traffic: dict[str, int] = {}
    with tracker, sent:
        yield peak, traffic
    seen = next(iter(tracker.get_tracker_snapshot("peak").values()))
    by_name = {str(getattr(kind, "value", kind)): size for kind, size in seen.items()}
    total = by_name.pop("Total")
    if prepared.options.engine == "deepspeed":
        states = [value for state in prepared.optimizer.state.values() for value in _tensors(list(state.values()))]
        by_kind = {"parameters": _size(zero3_weights(prepared.model)), "optimizer": _size(states)}
    else:
        by_kind = {kind: sum(by_name.get(name, 0) for name in names) for kind, names in KINDS.items()}
    peak.update(by_kind, other=total - sum(by_kind.values()))
    traffic.update(sent.bytes)


class _Sent(TorchDispatchMode):
    """Counts the bytes of the larger side of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func.name()).partition("::")
        if space in ("c10d", "_c10d_functional"):
            self.bytes[name.strip("_")] += max((_size([t]) for t in _tensors(args)), default=0)
        return func(*args, **(kwargs or {}))


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, list | tuple):
        return [t for part in given for t in _tensors(part)]
    return [given] if isinstance(given, Tensor) else []


def _size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
