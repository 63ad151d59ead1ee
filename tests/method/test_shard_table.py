"""The table of shards: an index of fundamental cells does bit for bit what a pass over all cells does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import FundamentalSet, attach_penalty, score_importance
from dcft_dist.errors import PenaltyError
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


class Reordering(Swapping):
    """Puts tensors of another order in memory there."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data.t().contiguous().t() if p.ndim == 2 and p.is_contiguous() else p.data.contiguous()


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
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: Swapping(p, lr=1e-2), lambda p: Reordering(p, lr=1e-2)],
    ids=["adamw", "swapping", "reordering"],
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


def moved(change: Any, level: str, where: str) -> tuple[Tensor, Tensor]:
    """A weight with a frozen first row, before and after a step that follows a change of its memory."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0] = True
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach_penalty(layer, FundamentalSet.from_masks({"weight": mask}), 0.0, optimizer=optimizer, level=level, where=where)  # type: ignore[arg-type]
    for number in range(2):
        if number:
            layer.weight.data = change(layer.weight.data)
            before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer.weight.square().sum().backward()
        optimizer.step()
    return before, layer.weight.detach()


WAYS = [("gradient", "before"), ("gradient", "after"), ("update", "before")]


@pytest.mark.parametrize(("level", "where"), WAYS)
@pytest.mark.parametrize("change", [lambda w: w[:, :3], lambda w: w[:4]], ids=["columns", "rows"])
def test_a_weight_of_another_shape_at_the_same_place_is_an_error(change: Any, level: str, where: str) -> None:
    with pytest.raises(PenaltyError, match=r"attach it after sharding|changed after the penalty"):
        moved(change, level, where)


def test_a_transposed_weight_at_the_same_place() -> None:
    with pytest.raises(PenaltyError, match="changed after the penalty"):
        moved(torch.t, "update", "before")
    before, after = moved(torch.t, "gradient", "after")
    assert torch.equal(before[0], after[0]) and not (before[1:] == after[1:]).all(1).any()


class Overlapping(nn.Module):
    """The gradient of `b` is a part of the memory of the gradient of `c`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.b, self.c = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.f, self.b]) + self.c.view(5, 4)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * x).square().sum()


def test_gradients_that_share_memory_are_multiplied_once() -> None:
    model = Overlapping()
    masks = {"b": torch.ones(2, 4, dtype=torch.bool), "c": torch.ones(5, 4, dtype=torch.bool)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach_penalty(model, FundamentalSet.from_masks(masks), 0.1, optimizer=optimizer, level="gradient", where="after")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model, torch.ones(5, 4)).backward()
    whole = torch.cat([before["f"], before["b"]]) + before["c"]
    optimizer.step()
    torch.testing.assert_close(model.c.detach(), before["c"] - 0.001 * 2 * whole)
    torch.testing.assert_close(model.b.detach(), before["b"] - 0.001 * 2 * whole[3:])


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "taylor_squared", "removal"])
def test_gradients_that_share_memory_are_scored(criterion: Any) -> None:
    model, xs = Overlapping(), [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def counted(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return loss_of(model, x), 3

    scores = score_importance(model, xs, counted, head=(), criterion=criterion, eligible=["b", "c"])
    terms: dict[str, list[Tensor]] = {"b": [], "c": []}
    for x in xs:
        g = (2 * model(x) * x * x / 3).detach()
        for name, part, w in (("b", g[3:], model.b.detach()), ("c", g, model.c.detach())):
            term = {"fisher": part**2, "taylor": part, "taylor_squared": (part * w) ** 2}
            terms[name].append(term.get(criterion, (part * w) ** 2 / 2 - part * w))
    for name, found in terms.items():
        mean = torch.stack(found).mean(0)
        expected = (mean * model.get_parameter(name).detach()).abs() if criterion == "taylor" else mean
        torch.testing.assert_close(scores.shards[name].values, expected.view(-1))
