"""Head warm-up trains the head alone, stops on validation loss, and keeps the best head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcft_dist import warm_up_head
from dcft_dist.errors import EngineError, PatternError, ScoreError
from dcft_dist.method.head_warmup import is_spent

from ..nets import HEAD, full_state, loss_fn, make_batches, make_net, my_part, wrap
from ..ranks import run_ranks


def learnable(num: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Labels that another head on the same body gives, some of them wrong: something to learn, something to memorise."""
    teacher = make_net(torch.float64).eval()
    torch.manual_seed(5)
    nn.init.normal_(teacher.head.weight, std=3.0)
    batches = make_batches(num, size, torch.float64, seed)
    middle = teacher(torch.cat([x for x, _ in make_batches(8, 8, torch.float64, 7)])).mean(0)
    return [(x, torch.where(torch.arange(size) % 5 == 0, y, (teacher(x) - middle).argmax(1))) for x, y in batches]


def test_only_the_head_moves_and_the_best_is_kept() -> None:
    net = make_net(torch.float64)
    net.train()
    before, validation = full_state(net), learnable(1, 32, seed=9)
    done = warm_up_head(net, learnable(4, 16, seed=1), loss_fn, head=HEAD, validation=validation, lr=0.05, patience=4)
    after = full_state(net)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"head.weight", "head.bias"}
    assert done.best_epoch == min(range(len(done.validation_losses)), key=lambda e: done.validation_losses[e])
    assert done.best_epoch > 0
    assert len(done.train_losses) == done.best_epoch + 4  # stopped by patience: memorising does not help
    net.eval()
    assert loss_fn(net, validation[0]).item() == pytest.approx(done.validation_losses[done.best_epoch], abs=1e-12)
    assert net.train() is net and all(p.grad is None for p in net.parameters())
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["frozen.weight", "frozen.bias"]


def test_one_step_an_epoch_needs_more_patience() -> None:
    """With few data an epoch is one step: the first ones may raise the loss, and the head would stay near chance."""
    net, (batch,) = make_net(torch.float64), learnable(1, 32, seed=1)
    validation = learnable(1, 32, seed=9)
    done = warm_up_head(net, [batch], loss_fn, head=HEAD, validation=validation, lr=1e-9, patience=2)
    assert len(done.train_losses) == 100, "each epoch is a little better"
    worse = [(x, (y + 1) % 3) for x, y in [batch]]
    done = warm_up_head(net, [batch], loss_fn, head=HEAD, validation=worse, lr=0.05, patience=2)
    assert len(done.train_losses) == done.best_epoch + 10
    done = warm_up_head(net, [batch] * 10, loss_fn, head=HEAD, validation=worse, lr=0.05, patience=2)
    assert len(done.train_losses) == done.best_epoch + 2
    assert [is_spent(5, epochs, 2) for epochs in (4, 5)] == [False, True]


def test_a_head_weight_that_the_loss_does_not_reach_stays() -> None:
    net, batches = make_net(), make_batches(2, 8, torch.float32)
    before = full_state(net)
    warm_up_head(net, batches, loss_fn, head=["head", "unused"], validation=batches, max_epochs=3)
    after = full_state(net)
    assert torch.equal(before["unused.weight"], after["unused.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def sums(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def warm_up_here() -> Any:
    net = make_net(torch.float64)
    batches = [my_part(b) for b in make_batches(3, 8, torch.float64)]
    validation = [my_part(b) for b in make_batches(1, 8, torch.float64, seed=9)]
    done = warm_up_head(net, batches, sums, head=HEAD, validation=validation, max_epochs=5)
    return net.head.weight.detach(), done.validation_losses


def test_same_head_for_every_number_of_ranks() -> None:
    one = run_ranks(1, warm_up_here)[0]
    for weight, losses in run_ranks(2, warm_up_here):
        torch.testing.assert_close(weight, one[0], rtol=0, atol=1e-12)
        assert losses == pytest.approx(one[1], abs=1e-12)


def stopped_here() -> Any:
    net, (batch,) = make_net(torch.float64), learnable(1, 32, seed=1)
    worse = my_part((batch[0], (batch[1] + 1) % 3))
    done = warm_up_head(net, [my_part(batch)], sums, head=HEAD, validation=[worse], lr=0.05, patience=2)
    return net.head.weight.detach(), done.validation_losses


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_warm_up_of_one_step_an_epoch_stops_alike(ranks: int) -> None:
    """With the same number of steps on every number of ranks, and the same head."""
    one = run_ranks(1, stopped_here)[0]
    assert 10 < len(one[1]) < 100, "it stops by patience"
    for weight, losses in run_ranks(ranks, stopped_here):
        torch.testing.assert_close(weight, one[0], rtol=0, atol=1e-12)
        assert losses == pytest.approx(one[1], abs=1e-12)


def refused() -> tuple[str, str]:
    model = wrap(make_net(), "fsdp2")
    batches = make_batches(1, 4, torch.float32)
    with pytest.raises(EngineError) as error:
        warm_up_head(model, batches, loss_fn, head=HEAD, validation=batches)
    rank = torch.distributed.get_rank()
    with pytest.raises(ScoreError) as uneven:
        warm_up_head(make_net(), batches * (1 + rank), loss_fn, head=HEAD, validation=batches)
    return str(error.value), str(uneven.value)


def test_refusals() -> None:
    for wrapped, uneven in run_ranks(2, refused):
        assert "before wrapping" in wrapped and "the ranks have [[1, 1], [2, 1]]" in uneven
    batches = make_batches(1, 4, torch.float32)
    with pytest.raises(PatternError, match="did you mean 'head'"):
        warm_up_head(make_net(), batches, loss_fn, head="heads", validation=batches)
    with pytest.raises(ScoreError, match="at least one"):
        warm_up_head(make_net(), [], loss_fn, head=HEAD, validation=batches)
