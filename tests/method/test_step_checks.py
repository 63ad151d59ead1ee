"""At the update level the penalty acts wherever the optimizer puts the weights, or the optimizer is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizers

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.distributed import collectives
from dcft_dist.errors import PenaltyError
from dcft_dist.method import step_checks
from dcft_dist.method.trial_step import distance_left

Make = Callable[[nn.Module], torch.optim.Optimizer]
X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()


MASKS = {name: torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3 for name, shape in
         {"0.weight": (16, 6), "2.weight": (16, 16), "2.bias": (16,)}.items()}  # fmt: skip


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(X[step % 4 :: 4].double()), Y[step % 4 :: 4]).backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(make: Make, steps: int, factor: float) -> dict[str, Tensor]:
    """A plain loop that shortens each step of the set."""
    model = net()
    optimizer = make(model)
    for step in range(steps):
        old = weights(model)
        backward(model, step)
        optimizer.step()
        with torch.no_grad():
            for name, mask in MASKS.items():
                p = model.get_parameter(name)
                p.copy_(torch.where(mask, old[name] + factor * (p - old[name]), p))
    return weights(model)


def trained(make: Make, steps: int, factor: float = 0.1, ask: bool = True) -> dict[str, Tensor]:
    model = net()
    optimizer = make(model)
    penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), factor, optimizer=optimizer, level="update")
    for step in range(steps):
        penalty.watch = step % 5 == 4
        backward(model, step)
        optimizer.step()
        if penalty.watch and ask:
            assert penalty.in_force() == pytest.approx(factor, rel=1e-6)
    return weights(model)


# -- where the penalty acts ----------------------------------------------------------------------------------------------


class Assigns(torch.optim.SGD):
    """Puts a new tensor into the parameter, as many published optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


GOOD: dict[str, Make] = {
    "assigns": lambda m: Assigns(m.parameters(), lr=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.5),
    "adamw, tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1),
    "adam, coupled decay": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, weight_decay=1.0),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=1e-2),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-2),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "groups": lambda m: torch.optim.AdamW(
        [{"params": [p], "lr": 1e-2 / (i + 1)} for i, p in enumerate(m.parameters())], amsgrad=True
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_penalty_is_that_of_a_plain_loop(name: str) -> None:
    wanted, found = by_hand(GOOD[name], 17, 0.1), trained(GOOD[name], 17)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-9, atol=1e-12)


def test_trials_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, state of the optimizer and random numbers have the same bits as without a trial."""

    class Noisy(torch.optim.Optimizer):
        """Uses random numbers, counts its steps in many places, and is watched by hooks."""

        shared: dict[str, int]
        ticks: Tensor

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.counted = getattr(self, "counted", 0) + 1
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                self.shared["sum"] += 1
                self.ticks += 1
                self.state["global"].append(random.random() + float(np.random.rand()))
                for p in (p for p in group["params"] if p.grad is not None):
                    p.grad += 0.01 * torch.randn_like(p.grad) * group["k"]
                    p -= group["lr"] * self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)

    def end() -> tuple[Any, ...]:
        model, seen = net(), []
        optimizer = Noisy(model.parameters(), {"lr": 1e-2})
        optimizer.shared, optimizer.ticks = {"sum": 0}, torch.zeros(2)
        optimizer.param_groups[0]["shared"], optimizer.state["global"] = optimizer.shared, []
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer, level="update")
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        for step in range(9):
            penalty.watch = step == 4
            backward(model, step)
            optimizer.step()
            penalty.in_force()
        parts = [p.detach() for p in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict())
        assert optimizer.param_groups[0]["shared"] is optimizer.shared and optimizer.shared == {"sum": 9}
        others = optimizer.counted, len(seen), len(optimizer.state), optimizer.ticks.clone(), list(optimizer.state["global"])
        return parts, state, torch.rand(3), random.random(), *others

    with_trials = end()
    monkeypatch.setattr(step_checks.StepChecks, "before", lambda *_: None)
    torch.testing.assert_close(with_trials, end(), rtol=0, atol=0)


def test_other_steps_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first 20 steps these are checked: 1 to 6, 8, 16, and the ones after `in_force`."""
    trials, sums, now = [], [], 0

    def trial(*arguments: Any, real: Any = step_checks.distance_left) -> float:
        trials.append(now)
        return float(real(*arguments))

    def samples(checks: Any, real: Any = step_checks.StepChecks._samples) -> dict[str, Tensor]:
        sums.append(now)
        return real(checks)  # type: ignore[no-any-return]

    monkeypatch.setattr(step_checks, "distance_left", trial)
    monkeypatch.setattr(step_checks.StepChecks, "_samples", samples)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer)
    for now in range(1, 21):
        backward(model, now)
        optimizer.step()
        if now == 10:
            penalty.in_force()
    assert trials == [1, 2, 3, 4, 5, 6, 8, 11, 16] and set(sums) == {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 17}


# -- what is refused -----------------------------------------------------------------------------------------------------


class Masters(torch.optim.Optimizer):
    """Keeps a copy of every weight from the beginning."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        self.master = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.inner = torch.optim.AdamW(list(self.master.values()), lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, master in self.master.items():
            master.grad = p.grad.clone()
        self.inner.step()
        for p, master in self.master.items():
            p.copy_(master)


class LateMasters(torch.optim.Optimizer):
    """Keeps the copy in its state, from the first step on, and goes through its groups."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                master = self.state[p].setdefault("master", p.clone())
                master -= group["lr"] * p.grad
                p.copy_(master)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): the parameter is y, the state has z, and x is what counts in the end."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z, beta = self.state[p].setdefault("z", p.clone()), group["beta"]
                x = (p - (1 - beta) * z) / beta
                z -= group["lr"] * p.grad
                x.lerp_(z, 1 / group["k"])
                p.copy_((1 - beta) * z + beta * x)


class Offloads(torch.optim.AdamW):
    """Steps large weights by optimizers of their own on copies elsewhere, as CPU offloading does; small ones itself."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        self.large = [(p, p.detach().clone()) for p in params if p.numel() > 100]
        self.others = [torch.optim.AdamW([copied], lr=1e-2) for _, copied in self.large]
        super().__init__([p for p in params if p.numel() <= 100], lr=1e-2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for (p, copied), optimizer in zip(self.large, self.others, strict=True):
            copied.grad = p.grad
            optimizer.step()
            p.copy_(copied)


class Keyed(torch.optim.SGD):
    """Knows the weights that it was made with, and no other tensor."""

    def step(self, closure: Any = None) -> None:
        known = self.__dict__.setdefault("known", {p: 1.0 for group in self.param_groups for p in group["params"]})
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data -= 0.01 * known[p] * p.grad


class WithPhase(torch.optim.Optimizer):
    """Masters that begin after six steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            if state["step"] <= 6:
                p -= 0.01 * p.grad
            else:
                master = state.setdefault("master", p.clone())
                master -= 0.01 * p.grad
                p.copy_(master)


BAD: dict[str, tuple[Make, str]] = {
    "masters": (lambda m: Masters(m.parameters()), "Masters keeps weights of its own: without being given 0.weight"),
    "late": (lambda m: LateMasters(m.parameters()), "LateMasters keeps weights of its own: of a change .* leaves 0%"),
    "free": (lambda m: ScheduleFree(m.parameters()), "ScheduleFree keeps weights of its own: of a change .* leaves 50%"),
    "offload": (lambda m: Offloads(m.parameters()), r"(Offloads keeps weights of its own|2.weight changed after)"),
    "keyed": (lambda m: Keyed(m.parameters(), lr=0.1), "Keyed cannot be tried on a copy of 2.bias"),
    "phase": (lambda m: WithPhase(m.parameters()), "WithPhase keeps weights of its own"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_optimizer_with_weights_of_its_own_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(PenaltyError, match=message):
        trained(make, 20, ask=False)


def test_a_rank_that_is_lost_during_the_trial_is_no_fault_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may communicate. Its time limit must not end a run for good."""

    def lost(*_: Any) -> float:
        raise RuntimeError(
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"
        )

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    attach_penalty(model, FundamentalSet.from_masks(MASKS), 0.1, optimizer=optimizer)
    backward(model, 0)
    monkeypatch.setattr(step_checks, "distance_left", lost)
    two_ranks = SimpleNamespace(world_size=lambda: 2, rank=lambda: 0, is_communication=collectives.is_communication)
    monkeypatch.setattr(step_checks, "collectives", two_ranks)
    with pytest.raises(RuntimeError, match="Timed out"):
        optimizer.step()


def test_what_changes_weights_between_steps_is_found() -> None:
    """At the next step, if the last was checked; and by whoever asks."""
    for asks in (True, False):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer)
        backward(model, 0)
        optimizer.step()
        with torch.no_grad():
            model.get_parameter("2.weight").clamp_(-0.1, 0.1)
        with pytest.raises(PenaltyError, match=r"2.weight changed after the penalty had shortened the last step"):
            if asks:
                penalty.in_force()
            backward(model, 1)
            optimizer.step()


def test_ordinary_loops_are_no_false_alarm() -> None:
    """Weights that are changed and put back up to rounding, a diverging run, a large factored state."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer)
    for step in range(12):  # sharpness-aware minimisation, written by hand
        backward(model, step)
        noise = [1e-3 * torch.randn_like(p) for p in model.parameters()]
        for sign in (1, -1):
            with torch.no_grad():
                for p, e in zip(model.parameters(), noise, strict=True):
                    p.add_(sign * e)
        optimizer.step()
        penalty.in_force()
    huge = nn.Parameter(torch.ones(8))
    huge.grad = torch.full((8,), 1e10)  # a step so large that float32 cannot tell the two tensors of a trial apart
    assert distance_left(torch.optim.SGD([huge], lr=1.0), huge) == 1.0
    large = nn.Linear(1024, 1536)
    factored = torch.optim.Adafactor(large.parameters())
    attach_penalty(large, FundamentalSet.from_masks({"weight": torch.ones(1536, 1024).bool()}), optimizer=factored)
    for _ in range(2):
        large(torch.ones(2, 1024)).square().mean().backward()
        factored.step()


@pytest.mark.parametrize("name", ["adamw", "late"])
def test_a_step_with_a_closure_is_checked_too(name: str) -> None:
    """As Lightning calls it."""
    model = net()
    optimizer = (GOOD[name] if name in GOOD else BAD[name][0])(model)
    penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer, level="update")
    told = ""
    for step in range(20):
        try:
            optimizer.step(lambda step=step: backward(model, step))  # type: ignore[misc, arg-type]
            if step % 5 == 4:
                penalty.in_force()
        except PenaltyError as error:
            told = f"{step}: {error}"
            break
    assert told == "" if name in GOOD else told.startswith("1: rank 0: LateMasters keeps weights of its own"), told


# -- in_force ------------------------------------------------------------------------------------------------------------


def test_in_force_never_confirms_a_penalty_that_is_off() -> None:
    for take_off in ("remove", "update hooks", "forward hook"):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters())
        penalty = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer)
        backward(model, 0)
        optimizer.step()
        assert penalty.in_force() != penalty.in_force(), "watch is off: NaN"
        if take_off == "remove":
            penalty.remove()
        elif take_off == "update hooks":
            torch_optimizers._global_optimizer_post_hooks.clear()
        else:
            model._forward_pre_hooks.clear()
        with pytest.raises(PenaltyError, match=r"was removed from the model|a hook of the penalty was taken off"):
            penalty.in_force()
        penalty.remove()
        again = attach_penalty(model, FundamentalSet.from_masks(MASKS), optimizer=optimizer)  # and it can be put back
        backward(model, 1)
        optimizer.step()
        again.in_force()
        again.remove()
