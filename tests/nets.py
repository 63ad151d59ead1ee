"""A small net with everything that goes wrong: odd sizes, tied, frozen and unused weights, a convolution, a norm, a head."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

HEAD = "head"
DEVICE = torch.device(os.environ.get("DCFT_TEST_DEVICE", "cpu"))  # `cuda`: the parity tests on a GPU (docs/results/gpu.md)
torch.backends.cudnn.allow_tf32 = False  # its default would round convolutions to 10 bits


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class OddNet(nn.Module):
    """[batch, 3, 5] -> [batch, 3] logits; `decode` is tied to `encode`, `frozen` is not trained, `unused` not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 7, 3)
        self.encode = nn.Linear(7, 13)
        self.blocks = nn.ModuleList([Block(13, 11), Block(13, 4)])  # the even size can be sharded along any dimension
        self.frozen = nn.Linear(13, 13)
        self.unused = nn.Linear(13, 3)
        self.decode = nn.Linear(7, 13, bias=False)
        self.decode.weight = self.encode.weight
        self.mix = nn.Linear(13, 7)
        self.head = nn.Linear(13, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(torch.tanh(self.conv(x)).mean(-1))
        for block in self.blocks:
            x = block(x)
        x = torch.tanh(self.frozen(x))
        x = x + self.decode(torch.tanh(self.mix(x)))
        if self.training:
            self.steps += 1
        return self.head(x)


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> OddNet:
    torch.manual_seed(seed)
    return OddNet().to(DEVICE, dtype)


class PlainReduceScatter:
    """A communication of FSDP2's such as a user may have; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.calls += 1
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def make_batches(num: int, size: int, dtype: torch.dtype, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Global batches: [size, 3, 5] inputs and [size] labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 5, generator=g, dtype=torch.float64).to(DEVICE, dtype),
            torch.randint(0, 3, (size,), generator=g).to(DEVICE),
        )
        for _ in range(num)
    ]


def my_part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = batch
    n = len(x) // ranks
    return x[rank * n : (rank + 1) * n], y[rank * n : (rank + 1) * n]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def wrap(net: OddNet, engine: str, bf16: bool = False) -> nn.Module:
    if engine == "single":
        return net
    if engine == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True)
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    return net


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {n: full(p.detach()).clone() for n, p in bare.named_parameters()}


def full_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {n: None if p.grad is None else full(p.grad).clone() for n, p in bare.named_parameters()}


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        "adamw_smooth": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    }
    return kinds[name]([p for p in parameters if p.requires_grad])
