"""MONAI's own trainer with the handler: the same set and weights as a plain loop, alone and on two ranks of DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dcft_dist import FundamentalSet, score_importance, select_fundamental
from dcft_dist.errors import EngineError
from dcft_dist.integrations.monai import DCFTHandler

from ..ranks import run_ranks

STEPS = 5


def make_net() -> nn.Module:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    return UNet(2, 1, 2, [4, 8], [2], norm=None, dropout=0.0)


def batches(rank: int = 0, ranks: int = 1) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 1, 8, 8, generator=draw) for _ in range(STEPS)]
    return [{"image": image[rank::ranks], "label": (image[rank::ranks] > 0).long()} for image in images]


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels[:, 0])


def reference() -> tuple[FundamentalSet, dict[str, Tensor]]:
    """One process; the update of the selected weights is shortened by hand."""
    model = make_net()
    scores = score_importance(model, batches()[:2], lambda m, b: loss(m(b["image"]), b["label"]), head="model.2")
    chosen = select_fundamental(scores, 0.2)
    masks = {name: chosen.mask(name) for name in chosen.names}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches():
        optimizer.zero_grad()
        loss(model(batch["image"]), batch["label"]).backward()
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            if name in masks:
                p.data.copy_(torch.where(masks[name], old[name] + 0.1 * (p.data - old[name]), p.data))
    return chosen, {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer_of(handler: DCFTHandler, rank: int, ranks: int, **options: Any) -> Any:
    from monai.engines import SupervisedTrainer

    net = make_net()
    network = DistributedDataParallel(net) if ranks > 1 else net
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=batches(rank, ranks),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-2),
        loss_function=loss,
        train_handlers=[handler],
        decollate=False,
        **options,
    )
    trainer.logger.disabled = True
    return trainer, net


def in_ranks(folder: str, ranks: int) -> tuple[int, bool, dict[str, Tensor]]:
    import torch.distributed as dist

    handler = DCFTHandler(head="model.2", fraction=0.2, num_batches=2, file=Path(folder) / "set.safetensors", every=1)
    trainer, net = trainer_of(handler, dist.get_rank(), ranks)
    trainer.run()
    chosen = handler.fundamental
    assert chosen is not None
    return chosen.num_selected, handler.penalty is None, {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_supervised_trainer(ranks: int, tmp_path: Path) -> None:
    chosen, expected = reference()
    for selected, removed, found in run_ranks(ranks, in_ranks, str(tmp_path), ranks):
        assert selected == chosen.num_selected and removed
        assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < 1e-5
    assert FundamentalSet.load(tmp_path / "set.safetensors").jaccard(chosen) == 1.0


def test_a_checkpoint_keeps_the_set(tmp_path: Path) -> None:
    """The handler is saved beside the network; the next training scores nothing."""
    chosen, _ = reference()
    first = DCFTHandler(head="model.2", fundamental=chosen, file=tmp_path / "set.safetensors")
    trainer_of(first, 0, 1)[0].run()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = DCFTHandler(head="model.2", fraction=0.5, num_batches=2, file=tmp_path / "again.safetensors")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer_of(second, 0, 1)[0].run()
    assert second.fundamental is not None and second.fundamental.jaccard(chosen) == 1.0
    assert DCFTHandler(head=(), file=tmp_path / "none").state_dict() == {}


def test_an_error_in_the_loop_takes_the_penalty_off(tmp_path: Path) -> None:
    handler = DCFTHandler(head="model.2", num_batches=1, file=tmp_path / "set.safetensors")
    trainer, _ = trainer_of(handler, 0, 1)
    calls = []

    def failing(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError("in the loss")
        return loss(outputs, labels)

    trainer.loss_function = failing
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert handler.penalty is None


def test_another_engine_is_refused() -> None:
    from ignite.engine import Engine

    with pytest.raises(EngineError, match="Engine has no network, optimizer, loss_function"):
        engine = Engine(lambda engine, batch: None)
        DCFTHandler(head=()).attach(engine)
        engine.run([1])
