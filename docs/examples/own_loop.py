"""DCFT in your own training loop, under FSDP2. Runs anywhere:

torchrun --standalone --nproc-per-node 2 docs/examples/own_loop.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dcft_dist import FundamentalSet, attach_penalty, score_importance, select_fundamental, warm_up_head

Batch = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2)])
        self.classifier = nn.Linear(64, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(1))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of this rank's batch: batches have the same size on every rank."""
    tokens, labels = batch
    return nn.functional.cross_entropy(model(tokens), labels)


def make_batches(num: int, device: torch.device) -> list[Batch]:
    """This rank's micro-batches, as many on every rank. Here: made up."""
    g = torch.Generator().manual_seed(dist.get_rank())
    tokens = [torch.randint(0, 100, (8, 12), generator=g) for _ in range(num)]
    return [(t.to(device), (t.sum(1) % 5).to(device)) for t in tokens]


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights on every rank; a real model would be loaded here
    model = Classifier().to(device)
    train, validation = make_batches(8, device), make_batches(2, device)

    warm_up_head(model, train, loss_fn, head="classifier", validation=validation, max_epochs=5)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)

    scores = score_importance(model, train, loss_fn, head="classifier")
    select_fundamental(scores, fraction=0.10).save("fundamental.safetensors")  # on every rank; rank 0 writes
    fundamental = FundamentalSet.load("fundamental.safetensors")  # also in a later job, with other ranks

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding
    penalty = attach_penalty(model, fundamental, factor=0.1, optimizer=optimizer)
    penalty.watch = True
    for batch in train:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    in_force = penalty.in_force()  # on every rank
    if dist.get_rank() == 0:
        print(f"{fundamental}\n{penalty}\napplied over proposed step: {in_force:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
