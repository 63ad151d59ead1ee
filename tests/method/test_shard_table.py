"""The table of shards: an index of fundamental cells does bit for bit what a pass over all cells does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet, attach_penalty
from dcft_dist.method import shard_table
from dcft_dist.method.penalty import Penalty


class Swapping(torch.optim.SGD):
    """Puts new tensors into the parameters, as some optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad
        return closure() if closure else None


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(40 * 36, 50), nn.Tanh(), nn.Linear(50, 3))
    return model.to(dtype).to(memory_format=torch.channels_last)  # the convolution's memory has another order


def trained(
    indexed: bool, dtype: torch.dtype, optimizer: Any, **options: Any
) -> tuple[dict[str, Tensor], Penalty, list[float]]:
    model = net(dtype)
    chosen = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.1
        for n, p in model.named_parameters()
        if p.ndim > 1
    }
    patch = pytest.MonkeyPatch()
    patch.setattr(shard_table, "_DENSE", 0.25 if indexed else -1.0)
    steps = optimizer(model.parameters())
    penalty = attach_penalty(model, FundamentalSet.from_masks(chosen), optimizer=steps, level="update", **options)
    patch.undo()
    penalty.watch = penalty.keep_proposal = True
    ratios = []
    for number in range(5):
        penalty.set_factor((0.1, 0.6, 0.0, 1.0, 0.3)[number])
        steps.zero_grad()
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(dtype)
        model(x).square().sum().backward()
        steps.step()
        ratios.append(penalty.in_force())
    return {n: p.detach().clone() for n, p in model.named_parameters()}, penalty, ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: Swapping(p, lr=1e-2)], ids=["adamw", "swapping"]
)
def test_an_index_does_what_a_pass_over_all_cells_does(dtype: torch.dtype, optimizer: Any) -> None:
    one, ours, ratios = trained(True, dtype, optimizer)
    other, theirs, expected = trained(False, dtype, optimizer)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert ours.calls == theirs.calls and ratios == pytest.approx(expected, rel=1e-9)
    for name, proposed in theirs.proposal.items():
        assert torch.equal(ours.proposal[name].reshape(-1), proposed.reshape(-1)), name
    indexed = [name for name, bits in ours._bits.items() if bits.index is not None]
    assert indexed == ["2.weight", "4.weight"], "not the convolution, which has another order in memory"
    assert all(bits.index is None for bits in theirs._bits.values())
    assert ours.mask_bytes > theirs.mask_bytes


def test_only_fundamental_cells_are_saved() -> None:
    """During the step: 4 bytes for each fundamental weight, instead of for each weight."""
    model = nn.Linear(1000, 100, bias=False)
    mask = torch.zeros(100, 1000, dtype=torch.bool)
    mask[:, ::10] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach_penalty(model, FundamentalSet.from_masks({"weight": mask}), optimizer=optimizer, level="update")
    saved: list[int] = []

    def look(*_: Any) -> None:
        table = penalty._stepping.table if penalty._stepping else None
        saved.extend(entry.old.nbytes for entry in (table.entries if table else []) if entry.old is not None)

    optimizer.register_step_post_hook(look)  # before the penalty's own, which are global
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 1000)).sum().backward()
        optimizer.step()
    assert saved == [4 * 10_000] * 3
