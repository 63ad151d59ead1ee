"""DCFT in a training loop with Accelerate: one program, whatever engine its configuration names.

accelerate launch --config_file configs/accelerate/fsdp2.yaml docs/examples/accelerate_loop.py
ACCELERATE_USE_CPU=1 torchrun --standalone --nproc-per-node 2 docs/examples/accelerate_loop.py  # DDP without a GPU
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dcft_dist import attach_penalty, score_importance, select_fundamental, warm_up_head

if not torch.cuda.is_available():
    from dcft_dist.compat.deepspeed import import_deepspeed

    import_deepspeed()  # before Accelerate does: without a GPU it would compile an extension

Batch = list[Tensor]


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
    tokens, labels = batch
    return nn.functional.cross_entropy(model(tokens), labels)


def main() -> None:
    nccl = torch.cuda.is_available()
    group = InitProcessGroupKwargs(backend="nccl" if nccl else "gloo", timeout=timedelta(minutes=10))
    accelerator = Accelerator(gradient_accumulation_steps=2, kwargs_handlers=[group])
    torch.manual_seed(0)  # the same weights on every rank; a real model would be loaded here
    model = Classifier().to(accelerator.device)
    tokens = torch.randint(0, 100, (256, 12))
    data = DataLoader(TensorDataset(tokens, tokens.sum(1) % 5), batch_size=8)

    batches = list(accelerator.prepare_data_loader(data))  # this rank's
    warm_up_head(model, batches, loss_fn, head="classifier", validation=batches, max_epochs=5)  # before wrapping
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data)

    scores = score_importance(model, batches[:8], loss_fn, head="classifier")
    fundamental = select_fundamental(scores, fraction=0.10)
    fundamental.save("fundamental.safetensors")
    penalty = attach_penalty(model, fundamental, factor=0.1, optimizer=optimizer)
    penalty.watch = True
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    in_force = penalty.in_force()  # on every rank
    accelerator.print(f"{accelerator.distributed_type.value} on {accelerator.num_processes} ranks\n{fundamental}\n{penalty}")
    accelerator.print(f"applied over proposed step: {in_force:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
