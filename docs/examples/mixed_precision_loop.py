"""DCFT in a training loop with autocast and GradScaler (float16), under DDP. Runs anywhere:

torchrun --standalone --nproc-per-node 2 docs/examples/mixed_precision_loop.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dcft_dist import attach_penalty, score_importance, select_fundamental, warm_up_head

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Scoring needs no scaler: it runs in float32 here. In float16 small gradients would be lost."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)  # the same weights on every rank; a real model would be loaded here
    model: nn.Module = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)).to(device)
    g = torch.Generator().manual_seed(dist.get_rank())
    inputs = [torch.randn(8, 20, generator=g) for _ in range(10)]
    train: list[Batch] = [(x.to(device), x[:, :5].argmax(1).to(device)) for x in inputs]
    train[3][0][0, 0] = 1e6  # overflows in float16: the scaler skips this step, and nothing moves

    warm_up_head(model, train[:3], loss_fn, head="4", validation=train[4:6], max_epochs=5)
    model = DistributedDataParallel(model)
    scores = score_importance(model, train[4:], loss_fn, head="4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    penalty = attach_penalty(model, select_fundamental(scores, fraction=0.10), factor=0.1, optimizer=optimizer)
    penalty.watch = True
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for batch in train:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = loss_fn(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # penalised at the gradient level, plain at the update level
        scaler.step(optimizer)
        scaler.update()
    in_force = penalty.in_force()  # on every rank
    if dist.get_rank() == 0:
        print(f"{penalty}\nlast loss scale: {scaler.get_scale():g}\napplied over proposed step: {in_force:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
