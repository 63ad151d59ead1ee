"""Parity: under every engine and number of ranks the run equals a plain single-process loop that multiplies by the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet, attach_penalty

from .nets import HEAD, full_gradients, full_state, loss_fn, make_batches, make_net, make_optimizer, my_part, wrap
from .ranks import run_ranks

STEPS, GLOBAL_BATCH = 10, 8
FACTOR, REST, UNSCORED = 0.1, 0.7, 0.4


def make_masks(dtype: torch.dtype) -> dict[str, Tensor]:
    """About a third of every linear and convolution weight outside the head, the frozen and the unused one included."""
    g = torch.Generator().manual_seed(3)
    net = make_net(dtype)
    names = [n for n, p in net.named_parameters() if p.ndim > 1 and not n.startswith(HEAD)]
    return {n: torch.rand(net.get_parameter(n).shape, generator=g) < 0.3 for n in names}


def multiplier(name: str, parameter: Tensor, masks: dict[str, Tensor], multipliers: tuple[float, float, float]) -> Tensor:
    factor, rest, unscored = multipliers
    if name.startswith(HEAD):
        return torch.ones_like(parameter)
    if name not in masks:
        return torch.full_like(parameter, unscored)
    return torch.where(masks[name], torch.full_like(parameter, factor), torch.full_like(parameter, rest))


def reference(optimizer_name: str, level: str, accumulation: int, dtype: torch.dtype, multipliers: Any) -> Any:
    """The plain loop: one process, the whole batch, the mask multiplied by hand."""
    net, masks = make_net(dtype), make_masks(dtype)
    optimizer = make_optimizer(optimizer_name, net.parameters())
    gradients: list[dict[str, Tensor | None]] = []
    batches = make_batches(STEPS * accumulation, GLOBAL_BATCH, dtype)
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            (loss_fn(net, batch) / accumulation).backward()
        m = {n: multiplier(n, p, masks, multipliers) for n, p in net.named_parameters()}
        old = {n: p.detach().clone() for n, p in net.named_parameters()}
        if level == "gradient":
            for n, p in net.named_parameters():
                if p.grad is not None:
                    p.grad.mul_(m[n])
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})
        optimizer.step()
        if level == "update":
            with torch.no_grad():
                for n, p in net.named_parameters():
                    p.copy_(old[n] + m[n] * (p - old[n]))
    return {n: p.detach() for n, p in net.named_parameters()}, gradients


def train(
    engine: str, optimizer_name: str, level: str, where: str, accumulation: int, dtype: torch.dtype, to_none: bool,
    multipliers: Any = (FACTOR, REST, UNSCORED),
) -> Any:  # fmt: skip
    """The same training under an engine, on this rank's part of each batch."""
    model = wrap(make_net(dtype), engine)
    optimizer = make_optimizer(optimizer_name, model.parameters())
    fundamental = FundamentalSet.from_masks(make_masks(dtype), head=HEAD)
    factor, rest, unscored = multipliers
    penalty = attach_penalty(
        model, fundamental, factor, optimizer=optimizer, level=level, where=where, rest_factor=rest, unscored_factor=unscored
    )  # type: ignore[arg-type]
    gradients = []
    batches = make_batches(STEPS * accumulation, GLOBAL_BATCH, dtype)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=to_none)
        micro_batches = batches[step * accumulation : (step + 1) * accumulation]
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            backward(model, engine, loss_fn(model, my_part(batch)) / accumulation, last)
        penalty.apply()
        gradients.append(full_gradients(model))
        optimizer.step()
    return full_state(model), gradients, dict(penalty.calls), penalty.frozen


def backward(model: nn.Module, engine: str, loss: Tensor, last: bool) -> None:
    """FSDP2 reduces on the last micro-batch only; DDP on every one (no_sync would have to span the forward)."""
    if engine == "fsdp2":
        model.set_requires_gradient_sync(last)
    loss.backward()


def differences(run: Any, expected: Any) -> tuple[float, float]:
    (state, gradients), (state0, gradients0) = run[:2], expected
    weights = max(float((state[n] - state0[n]).abs().max()) for n in state0)
    worst = 0.0
    for step, step0 in zip(gradients, gradients0, strict=True):
        for n, g0 in step0.items():
            g = step[n]
            if g0 is None:
                assert g is None or not g.any(), n
            else:
                worst = max(worst, float((g - g0).abs().max()))
    return weights, worst


CASES = [
    (level, where, accumulation, optimizer)
    for level, where in (("gradient", "before"), ("gradient", "after"), ("update", "before"))
    for accumulation in (1, 3)
    for optimizer in ("sgd", "momentum", "adamw")
]


def all_cases(engine: str) -> list[Any]:
    """Every case under one engine in one process group: [(case, weight difference, gradient difference, calls)]."""
    out = []
    for i, (level, where, accumulation, optimizer) in enumerate(CASES):
        dtype = torch.float64 if optimizer == "adamw" else torch.float32
        run = train(engine, optimizer, level, where, accumulation, dtype, to_none=i % 2 == 0)
        expected = reference(optimizer, level, accumulation, dtype, (FACTOR, REST, UNSCORED))
        out.append((CASES[i], *differences(run, expected), run[2], run[3]))
    return out


PLACES = [("single", 1), *((engine, ranks) for engine in ("ddp", "fsdp2") for ranks in (1, 2, 4))]


@pytest.mark.parametrize(("engine", "world_size"), PLACES)
def test_equals_single_process(engine: str, world_size: int) -> None:
    for results in run_ranks(world_size, all_cases, engine):
        for case, weights, gradients, calls, frozen in results:
            level, where, accumulation, optimizer = case
            limit = 1e-10 if optimizer == "adamw" else 1e-6
            assert weights <= limit and gradients <= limit, (case, weights, gradients)
            hooks = STEPS * accumulation if (level, where) == ("gradient", "before") else STEPS
            assert calls["blocks.0.up.weight"] == hooks, (case, calls)
            assert "unused.weight" not in calls, (case, calls)
            assert frozen == ("frozen.weight", "frozen.bias")
