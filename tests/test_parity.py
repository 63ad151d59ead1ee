"""Parity: under every engine and number of ranks the run equals a plain single-process loop that multiplies by the mask.

One body for all: axes are the engine, the ranks, where the penalty acts, accumulation, clipping, optimizer, precision. Each
engine meets the full product of the other axes at 2 ranks; at 1 and 4 ranks, a covering of all pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dcft_dist import FundamentalSet, attach_penalty

from .nets import DEVICE, HEAD, loss_fn, make_batches, make_net, make_optimizer, my_part
from .prepared import DDP, ENGINES, FSDP1, FSDP2, ZERO, prepare
from .ranks import run_ranks

GLOBAL_BATCH, CLIP_NORM = 8, 0.2
FACTOR, REST, UNSCORED = 0.1, 0.7, 0.4

# (level, where, what clipping sees). DeepSpeed clips by itself inside its step: `after` comes after it there.
PLACES = [
    ("gradient", "before", None),
    ("gradient", "before", "after_penalty"),
    ("gradient", "after", None),
    ("gradient", "after", "before_penalty"),
    ("gradient", "after", "after_penalty"),
    ("update", "before", None),
    ("update", "before", "before_penalty"),
]


@dataclass(frozen=True)
class Case:
    level: str
    where: str
    clip: str | None
    accumulation: int
    optimizer: str
    precision: str = "full"  # float32 for SGD, float64 for AdamW; or bf16 compute
    steps: int = 3  # the first, the second that uses its traces and state, one like all others

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.optimizer == "adamw" and self.precision == "full" else torch.float32


ALL = [Case(*place, a, o) for place, a, o in itertools.product(PLACES, (1, 2), ("sgd", "momentum", "adamw"))]
FULL = [case for case in ALL if case.optimizer != "momentum"]
BF16 = [Case(*place, a, o, "bf16") for place, a, o in itertools.product(PLACES, (1, 2), ("momentum", "adamw_smooth"))]


def pairs(cases: list[Case]) -> list[Case]:
    """A small part of the cases in which all pairs of two axes' values occur that occur in all of them: greedy."""
    left = {p for c in cases for p in _pairs_of(c)}
    chosen = []
    while left:
        best = max(cases, key=lambda c: len(left & _pairs_of(c)))
        chosen.append(best)
        left -= _pairs_of(best)
    return chosen


def _pairs_of(case: Case) -> set[Any]:
    place = ("place", case.level, case.where)
    return set(itertools.combinations([place, ("clip", case.clip), ("acc", case.accumulation), ("opt", case.optimizer)], 2))


# -- the reference: one process, plain tensors --------------------------------------------------------------------------


def make_masks(dtype: torch.dtype, rank: int = 0) -> dict[str, Tensor]:
    """About a third of every linear and convolution weight outside the head, the frozen and the unused one included."""
    g = torch.Generator().manual_seed(3 + rank)
    net = make_net(dtype)
    names = [n for n, p in net.named_parameters() if p.ndim > 1 and not n.startswith(HEAD)]
    return {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}


def multiplier(name: str, parameter: Tensor, masks: dict[str, Tensor]) -> Tensor:
    if name.startswith(HEAD):
        return torch.ones_like(parameter)
    if name not in masks:
        return torch.full_like(parameter, UNSCORED)
    return torch.where(masks[name].to(DEVICE), torch.full_like(parameter, FACTOR), torch.full_like(parameter, REST))


@cache
def reference(case: Case, unused_are_zero: bool, parts: int = 1, masks_by_rank: bool = False) -> dict[str, Tensor]:
    """`parts` > 1: the gradient is the mean over parts of the batch, each multiplied by the mask of its own rank."""
    net = make_net(case.dtype)
    optimizer = make_optimizer(case.optimizer, net.parameters())
    batches = make_batches(case.steps * case.accumulation, GLOBAL_BATCH, case.dtype)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    m = [
        {n: multiplier(n, p, make_masks(case.dtype, r if masks_by_rank else 0)) for n, p in named.items()}
        for r in range(parts)
    ]
    for step in range(case.steps):
        optimizer.zero_grad()
        for x, y in batches[step * case.accumulation : (step + 1) * case.accumulation]:
            for r, part in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                loss = loss_fn(net, part) / (case.accumulation * parts)
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for (n, p), g in zip(named.items(), gradients, strict=True):
                    if g is None and unused_are_zero:
                        g = torch.zeros_like(p)
                    if g is not None:
                        g = g * m[r][n] if case.level == "gradient" and case.clip != "before_penalty" else g
                        p.grad = g if p.grad is None else p.grad + g
        if case.clip:
            torch.nn.utils.clip_grad_norm_(named.values(), CLIP_NORM)
        if case.level == "gradient" and case.clip == "before_penalty":
            for n, p in named.items():
                if p.grad is not None:
                    p.grad.mul_(m[0][n])
        old = {n: p.detach().clone() for n, p in named.items()}
        optimizer.step()
        if case.level == "update":
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(old[n] + m[0][n] * (p - old[n]))
    return {n: p.detach().cpu() for n, p in net.named_parameters()}


@cache
def bf16_reference(case: Case, engine: str, ranks: int) -> dict[str, Tensor]:
    """Compute in bfloat16 emulated: each rank's part of the batch, weights and gradients rounded, summed in float32; or
    each part under autocast."""
    autocast = engine in ("single", "ddp")
    net = make_net(torch.float32)
    if engine.startswith("zero"):  # DeepSpeed's float32 weights are copies of the rounded ones
        net.to(torch.bfloat16).to(torch.float32)
    optimizer = make_optimizer(case.optimizer, net.parameters())
    if engine == "zero0":  # there it begins with a step on zeros, which AdamW counts
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    batches = make_batches(case.steps * case.accumulation, GLOBAL_BATCH, torch.float32)
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    m = {n: multiplier(n, p, make_masks(torch.float32)) for n, p in named.items()}
    for step in range(case.steps):
        total = {n: torch.zeros_like(p) for n, p in named.items() if gives_zeros(engine) or not n.startswith("unused")}
        for x, y in batches[step * case.accumulation : (step + 1) * case.accumulation]:
            for part in zip(x.chunk(ranks), y.chunk(ranks), strict=True):
                if autocast:
                    loss = autocast_loss(net, part) / case.accumulation
                    for n, g in zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True), strict=True):
                        if g is not None:
                            total[n] += g / ranks
                    continue
                low = make_net(torch.float32)
                low.load_state_dict(net.state_dict())
                low.to(torch.bfloat16)
                (half_loss(low, part) / case.accumulation).backward()
                for n, p in low.named_parameters():
                    if p.grad is not None:
                        total[n] += p.grad.float() / ranks
        for n, whole in total.items():
            named[n].grad = whole * m[n] if case.level == "gradient" and case.clip != "before_penalty" else whole
        if case.clip:
            torch.nn.utils.clip_grad_norm_(named.values(), CLIP_NORM)
        if case.level == "gradient" and case.clip == "before_penalty":
            for n in total:
                named[n].grad *= m[n]
        old = {n: p.detach().clone() for n, p in named.items()}
        optimizer.step()
        if case.level == "update":
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(old[n] + m[n] * (p - old[n]))
    return {n: p.detach().cpu() for n, p in net.named_parameters()}


def autocast_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return loss_fn(model, batch)


def half_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x.to(torch.bfloat16)).float(), y)


# -- the same under an engine -------------------------------------------------------------------------------------------


def train(engine: str, case: Case, to_none: bool, masks_by_rank: bool = False, placement: Any = "replicated") -> Any:
    """The same training under an engine, on this rank's part of each batch: (whole weights, calls, frozen)."""
    rank = dist.get_rank() if masks_by_rank else 0
    prepared = prepare(
        lambda: make_net(case.dtype),
        engine,
        lambda p: make_optimizer(case.optimizer, p),
        bf16=case.precision == "bf16",
        accumulation=case.accumulation,
        micro_batch=GLOBAL_BATCH // dist.get_world_size(),
        clip_norm=CLIP_NORM if case.clip else None,
    )
    penalty = attach_penalty(
        prepared.model,
        FundamentalSet.from_masks(make_masks(case.dtype, rank), head=HEAD),
        FACTOR,
        optimizer=prepared.optimizer,
        level=case.level,
        where=case.where,
        rest_factor=REST,
        unscored_factor=UNSCORED,
        mask_placement=placement,
    )  # type: ignore[arg-type]
    half = autocast_loss if engine.startswith(("single", "ddp")) else half_loss
    loss = half if case.precision == "bf16" else loss_fn
    batches = make_batches(case.steps * case.accumulation, GLOBAL_BATCH, case.dtype)
    for step in range(case.steps):
        prepared.zero_grad(to_none)
        micro_batches = batches[step * case.accumulation : (step + 1) * case.accumulation]
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with prepared.accumulating(last):
                prepared.backward(loss(prepared.model, my_part(batch)) / case.accumulation, last)
        if case.clip == "after_penalty" and case.where == "after":
            penalty.apply()
        prepared.clip()
        prepared.step()
    return {n: w.cpu() for n, w in prepared.state().items()}, dict(penalty.calls), penalty.frozen


def gives_zeros(engine: str) -> bool:
    """Engines with flat buffers give a weight that no backward reached a gradient of zeros, and step it."""
    return engine.startswith(("fsdp1", "zero"))


def limit(engine: str, case: Case) -> float:
    """In bfloat16 what a few roundings the other way make, far below what leaving out the penalty would. Without `sum32`
    DeepSpeed adds up and reduces in bfloat16 too, which is not emulated."""
    if case.precision == "bf16":
        return 1e-3 if engine.startswith("zero") and not engine.endswith("sum32") else 5e-4
    return 1e-10 if case.dtype == torch.float64 else 1e-6


def cases_for(engine: str, cases: list[Case]) -> list[Case]:
    """The cases as the engine can have them.

    DeepSpeed's partitions are float32 whatever the weights are, and FSDP1 clips in float32: there AdamW runs in float32 with
    a large epsilon (with its usual one it divides rounding errors by small numbers).
    """
    zero = engine.startswith("zero")
    if zero:  # it clips inside its step, and refuses to clip after a penalty that comes after the reduction
        cases = [c for c in cases if (c.where, c.clip) != ("after", "after_penalty")]
    single = [c.optimizer == "adamw" and (zero or (engine.startswith("fsdp1") and c.clip is not None)) for c in cases]
    return [replace(c, optimizer="adamw_smooth") if s else c for c, s in zip(cases, single, strict=True)]


def there(*engines: str) -> list[str]:
    """Those that this torch has."""
    return [engine for engine in engines if engine in ENGINES]


def run_cases(work: dict[str, list[Case]]) -> list[Any]:
    """Cases under some engines, all in one process group: [(whole weights, calls, frozen)]."""
    every = [(engine, case) for engine, cases in work.items() for case in cases]
    return [train(engine, case, to_none=i % 2 == 0) for i, (engine, case) in enumerate(every)]


def check(world_size: int, work: dict[str, list[Case]]) -> None:
    work = {engine: cases_for(engine, cases) for engine, cases in work.items()}
    every = [(engine, case) for engine, cases in work.items() for case in cases]
    for results in run_ranks(world_size, run_cases, work, deadline_s=500):
        for (engine, case), (state, calls, frozen) in zip(every, results, strict=True):
            kind = engine if engine == "zero0" else "zero" if engine.startswith("zero") else engine.split("-")[0]
            half = case.precision == "bf16"
            expected = bf16_reference(case, kind, world_size) if half else reference(case, gives_zeros(engine))
            difference = max(float((state[n].view_as(e) - e).abs().max()) for n, e in expected.items())
            assert difference <= limit(engine, case), (engine, case, difference)
            in_leaves = (case.level, case.where) == ("gradient", "before") and not in_buffer(engine, world_size)
            hooks = case.steps * (case.accumulation if in_leaves else 1)
            assert calls.get("blocks.0.up.weight", hooks) == hooks, (engine, case, calls)
            if not gives_zeros(engine):
                assert "unused.weight" not in calls, (engine, case, calls)
            assert frozen == ("frozen.weight", "frozen.bias")


def in_buffer(engine: str, ranks: int) -> bool:
    """Whether the penalty multiplies FSDP2's buffer, which holds the sum of the micro-batches. It hooks the leaves where
    only replicas communicate."""
    replicas_alone = (engine == "fsdp2-hybrid" and ranks == 2) or (engine == "fsdp2-groups" and ranks > 1)
    return engine.startswith("fsdp2") and not replicas_alone


ON_GPU = DEVICE.type == "cuda"
MAIN = ["single", "ddp", "fsdp2", "fsdp1-full-flat", "fsdp1-full-orig", *ZERO[:4]]
FAMILIES = {"fsdp2": [*DDP, *FSDP2], "fsdp1": FSDP1, "zero": ZERO}


@pytest.mark.parametrize("engine", MAIN)
def test_equals_one_process(engine: str) -> None:
    """The full product of level, place, clipping, accumulation and optimizer, in full precision and in bfloat16."""
    check(1 if engine == "single" or ON_GPU else 2, {engine: FULL + BF16})


@pytest.mark.parametrize(("family", "world_size"), list(itertools.product(FAMILIES, [1, 2, 4])))
def test_equals_one_process_in_every_variant(family: str, world_size: int) -> None:
    """Five steps of every variant on every number of ranks; together the three meet all pairs of the other axes' values."""
    turn = (1, 2, 4).index(world_size)
    if ON_GPU and family == "fsdp2" and world_size > 1:
        pytest.skip("gloo dies of FSDP2's collectives on CUDA tensors, and NCCL wants a GPU for each rank")
    cases = [replace(case, steps=5) for case in pairs(ALL)]
    check(world_size, {e: cases[(ENGINES.index(e) + turn) % 3 :: 3] for e in FAMILIES[family]})


HALF = [*there("ddp-nosync", "fsdp2-hybrid", "fsdp2-groups", "fsdp1-hybrid-orig"), *(f"zero{s}-sum32" for s in (1, 2, 3))]


def test_bf16_in_variants() -> None:
    check(2, {engine: pairs(BF16) for engine in HALF})


@pytest.mark.parametrize("world_size", [1, 4])
def test_bf16_on_other_numbers_of_ranks(world_size: int) -> None:
    turn = (1, 4).index(world_size)
    check(world_size, {engine: pairs(BF16)[(i + turn) % 2 :: 2] for i, engine in enumerate(MAIN[1:])})


def by_rank(engines: list[str]) -> dict[tuple[str, int], float]:
    out = {}
    for engine, accumulation in itertools.product(engines, (1, 3)):
        case = Case("gradient", "before", None, accumulation, "sgd")
        state, _, _ = train(engine, case, to_none=True, masks_by_rank=True)
        expected = reference(case, gives_zeros(engine), parts=dist.get_world_size(), masks_by_rank=True)
        out[engine, accumulation] = max(float((state[n].view_as(e) - e).abs().max()) for n, e in expected.items())
    return out


HYBRID = [*there("fsdp2-groups"), *(engine for engine in ENGINES if "hybrid" in engine)]


@pytest.mark.parametrize(("engines", "world_size"), [*((e, 2) for e in FAMILIES.values()), (HYBRID, 4)])
def test_before_is_before_the_reduction(engines: list[str], world_size: int) -> None:
    """With another mask on each rank, the result is that of masks applied to each rank's own gradient."""
    for differences in run_ranks(world_size, by_rank, engines):
        assert max(differences.values()) <= 1e-6, differences


def both_placements(engines: list[str], accumulation: int) -> list[str]:
    """Engines whose weights differ in any bit."""
    differ = []
    for engine in engines:
        case = Case("gradient", "before", None, accumulation, "sgd")
        (whole, *calls), (parts, *same) = (train(engine, case, True, placement=p) for p in ("replicated", "sharded"))
        if calls != same or any(not torch.equal(w, parts[n]) for n, w in whole.items()):
            differ.append(engine)
    return differ


SHARED = there("ddp", "fsdp2", "fsdp2-checkpoint", "fsdp2-groups", "fsdp1-full-flat", "fsdp1-full-orig", *ZERO[1:4])


@pytest.mark.parametrize(
    ("engines", "world_size", "accumulation"),
    [(SHARED, 2, 1), (["ddp-nosync", "fsdp2"], 2, 3), (["fsdp2-hybrid", "fsdp1-hybrid-flat", "zero3"], 4, 1)],
)
def test_sharded_bits_do_what_replicated_ones_do(engines: list[str], world_size: int, accumulation: int) -> None:
    assert run_ranks(world_size, both_placements, engines, accumulation, deadline_s=300) == [[]] * world_size
