"""A wrapped model with its optimizer, and one way to train it under every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Weight = tuple[str, nn.Parameter, bool]  # name, parameter, whether it is a matrix (or has more dimensions)
MakeOptimizer = Callable[[list[Weight]], torch.optim.Optimizer]


@dataclass(frozen=True)
class WrapOptions:
    """How the trainer wraps a model.

    Attributes:
        engine: name of a built-in engine, or the import path of an `Engine` (`package.module:Class`).
        device: where this rank's weights live.
        blocks: modules that are sharded one by one.
        bf16: compute in bfloat16; weights, or their masters, and the reduction stay in float32.
        replicas: number of groups of ranks that each hold all shards (hybrid sharding).
        offload: keep shards or optimizer partitions in CPU memory.
        zero_stage: ZeRO stage of DeepSpeed.
        micro_batch, accumulation: samples of a forward on one rank, forwards of a step.
        clip_grad_norm: largest gradient norm; None: no clipping.
        import_roots: folders that an engine's import path is searched in first.
    """

    engine: str
    device: torch.device
    blocks: Sequence[nn.Module]
    bf16: bool = False
    replicas: int = 1
    offload: bool = False
    zero_stage: int = 2
    micro_batch: int = 1
    accumulation: int = 1
    clip_grad_norm: float | None = None
    import_roots: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """A wrapped model and the torch optimizer that steps its weights. Here are the ways of a plain module."""

    options: WrapOptions
    model: Any
    optimizer: torch.optim.Optimizer

    def computing(self) -> Any:
        """The context of a forward. Nothing is to be done where the engine casts by itself."""
        return nullcontext()

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are reduced over ranks with the last one only."""
        yield

    def backward(self, loss: Tensor) -> None:
        """`loss` is already divided by the number of micro-batches."""
        loss.backward()

    def clip(self) -> None:
        """Clips gradients to the norm that the options give, if they give one."""
        if self.options.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad_norm)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
