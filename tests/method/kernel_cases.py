"""The kernels against the torch code, on any device. With `TRITON_INTERPRET=1` they run on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet, Scores, attach_penalty, select_fundamental
from dcft_dist.engines.box import Box
from dcft_dist.errors import ScoreError
from dcft_dist.method import address_table, kernels, multipliers, ranking, shard_table
from dcft_dist.method.multipliers import Multipliers, Plane
from dcft_dist.method.scores import ScoreShard

CPU = torch.device("cpu")


def plane(numel: int, device: torch.device) -> Plane:
    octets = np.random.default_rng(numel).integers(0, 256, -(-numel // 8), dtype=np.uint8)
    return Plane(torch.from_numpy(octets).to(device), "factor", "rest")


def bits_of(plane: Plane, numel: int) -> Tensor:
    assert isinstance(plane.octets, Tensor)
    return multipliers.unpacked(plane.octets)[:numel]


def one_tensor(device: torch.device = CPU, sizes: tuple[int, ...] = (1, 7, 4096, 10_001)) -> None:
    """One flat tensor, at an odd place in memory, in several types."""
    torch.manual_seed(0)
    for numel in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for factor, rest in ((0.1, 1.0), (0.0, 0.7), (1.0, 0.0)):
                chosen, m = plane(numel, device), Multipliers(factor, rest, 1.0)
                gradient, old, new = (torch.randn(numel + 1).to(device, dtype)[1:] for _ in range(3))
                expected, found = torch.empty_like(gradient), torch.empty_like(gradient)
                m._by_chunks(gradient, chosen, chosen.octets, expected, None)  # type: ignore[arg-type]
                m._launch(gradient, chosen, chosen.octets, found, None)  # type: ignore[arg-type]
                torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.float32 else 1e-2, atol=0)
                if dtype == torch.bfloat16:
                    continue  # weights are kept in float32
                expected, found = new.clone(), new.clone()
                m._by_chunks(expected, chosen, chosen.octets, expected, old)  # type: ignore[arg-type]
                m._launch(found, chosen, chosen.octets, found, old)  # type: ignore[arg-type]
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
                bits = bits_of(chosen, numel)
                for value, cells in ((factor, bits), (rest, ~bits)):
                    if value in (0.0, 1.0):  # exact at both ends
                        assert torch.equal(found[cells], (old if value == 0.0 else new)[cells])


class Odd(nn.Module):
    """Weights of odd sizes, one larger than a block, one without an eligible cell, one that no backward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 1001), nn.Linear(1001, 7)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def trained(kernels_used: bool, level: str, device: torch.device, **options: Any) -> tuple[dict[str, Tensor], float, Any]:
    """Weights after some steps, the ratio measured, and the proposal; with kernels or without."""
    torch.manual_seed(0)
    model = Odd().to(device)
    masks = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.1
        for n, p in model.named_parameters()
        if p.ndim > 1
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    usable, is_capturing = address_table.usable, shard_table.is_capturing  # type: ignore[attr-defined]
    shard_table.usable = (lambda tensors: bool(tensors)) if kernels_used else (lambda tensors: False)  # type: ignore[attr-defined]
    try:
        chosen = FundamentalSet.from_masks(masks, head=("down.bias",))
        watch, keep = options.pop("watch", False), options.pop("keep_proposal", False)
        captured_from = options.pop("captured_from", 99)
        penalty = attach_penalty(model, chosen, optimizer=optimizer, level=level, where="after", **options)  # type: ignore[arg-type]
        penalty.watch, penalty.keep_proposal = watch, keep
        for step in range(4):
            for module in (shard_table, address_table):
                module.is_capturing = lambda step=step: step >= captured_from  # type: ignore[attr-defined]
            penalty.set_factor(0.25 * step)
            optimizer.zero_grad()
            model(torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(device)).square().sum().backward()
            optimizer.step()
        ratio = penalty.in_force()
        return {n: p.detach().clone() for n, p in model.named_parameters()}, ratio, dict(penalty.proposal)
    finally:
        shard_table.usable = usable  # type: ignore[attr-defined]
        shard_table.is_capturing = address_table.is_capturing = is_capturing  # type: ignore[attr-defined]


def tables(device: torch.device = CPU) -> None:
    """Tables of shards: every choice that changes what is saved and read."""
    launched = dict.fromkeys(("scale_many", "save_many", "shorten_many"), 0)
    plain = {name: getattr(kernels, name) for name in launched}

    def counted(name: str) -> Any:
        def call(*args: Any) -> None:
            launched[name] += 1
            plain[name](*args)

        return call

    for name in launched:
        setattr(kernels, name, counted(name))
    options: list[dict[str, Any]] = [{}, {"watch": True}, {"rest_factor": 0.5}, {"unscored_factor": 0.0, "rest_factor": 0.5}]
    options += [{"unscored_factor": 0.5}, {"keep_proposal": True}, {"watch": True, "rest_factor": 0.5}]
    for level in ("gradient", "update"):
        for case in options:
            launched.update(dict.fromkeys(launched, 0))
            fast, ratio, proposal = trained(True, level, device, **case)
            slow, expected, wanted = trained(False, level, device, **case)
            for name, value in slow.items():
                torch.testing.assert_close(fast[name], value, rtol=1e-6, atol=1e-7)
            assert ratio == expected or abs(ratio - expected) < 1e-6 or (ratio != ratio and expected != expected)
            assert proposal.keys() == wanted.keys() and all(torch.equal(proposal[n], wanted[n]) for n in wanted)
            if not case:  # four steps, one launch each
                steps = {"gradient": (4, 0, 0), "update": (0, 4, 4)}[level]
                assert tuple(launched.values()) == steps, (level, launched)
    for name, function in plain.items():
        setattr(kernels, name, function)


def captured(device: torch.device = CPU) -> None:
    """While a CUDA graph is captured, no addresses are copied to the device."""
    table, lengths = address_table.AddressTable, list[int]()
    on_device = table._on_device

    def counted(self: Any, numbers: list[int]) -> Tensor:
        lengths.append(len(numbers))
        return on_device(self, numbers)

    table._on_device = counted  # type: ignore[method-assign]
    try:
        for level, at_most in (("gradient", 4), ("update", 3)):  # places of weights, bits and sizes; of gradients at step 0
            plain, _, _ = trained(True, level, device)
            lengths.clear()
            found, _, _ = trained(True, level, device, captured_from=1)
            assert len(lengths) == at_most, lengths
            assert all(torch.equal(found[name], plain[name]) for name in plain)
    finally:
        table._on_device = on_device  # type: ignore[method-assign]


def scores_of(sizes: tuple[int, ...], device: torch.device) -> Scores:
    """Scores with ties, both zeros, denormal and negative numbers, in several weights."""
    generator, shards = torch.Generator().manual_seed(0), {}
    for i, size in enumerate(sizes):
        x = torch.randn(size, generator=generator)
        x[::3] = x[::3].round() * (-0.0 if i % 2 else 1.0)
        x[1::5] *= 1e-40
        shards[f"w{i}"] = ScoreShard(Box.flat(size, 0, size), x.to(device))
    return Scores("given", {n: (s.values.numel(),) for n, s in shards.items()}, shards)


def selection(device: torch.device = CPU, sizes: tuple[int, ...] = (9_001, 1, 0, 4096, 7)) -> None:
    """The radix selection against the one on a CPU: thresholds, ties, bits, and what is not finite."""
    for fraction in (0.0, 0.001, 0.1, 0.5, 0.93, 1.0):
        ranking.by_kernels = lambda scores: False  # type: ignore[attr-defined]
        slow = select_fundamental(scores_of(sizes, CPU), fraction)
        fast = select_fundamental(by_radix(scores_of(sizes, device)), fraction)
        assert fast.info.counts == slow.info.counts and fast.info.threshold == slow.info.threshold, fraction
        assert all(torch.equal(fast.mask(n), slow.mask(n)) for n in slow.names), fraction
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores = scores_of(sizes, device)
        scores.shards["w3"].values[77] = bad
        with pytest.raises(ScoreError, match=r"w3 \(1\)"):
            select_fundamental(by_radix(scores), 0.1)


def by_radix(scores: Scores) -> Scores:
    """From now on scores are selected by kernels, also on a CPU."""
    ranking.by_kernels = bool  # type: ignore[attr-defined]
    return scores
