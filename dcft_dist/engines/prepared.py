"""A wrapped model with its optimizer, and one interface to train it under every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import Checkpointing

Weight = tuple[str, nn.Parameter, bool]  # name, parameter, whether the weight has two or more dimensions
MakeOptimizer = Callable[[list[Weight]], torch.optim.Optimizer]


@dataclass(frozen=True)
class WrapOptions:
    """How the trainer wraps a model.

    Attributes:
        engine: name of a built-in engine, or the import path of an `Engine` (`package.module:Class`).
        device: device on which this rank computes.
        blocks: modules that FSDP shards one by one, each as its own unit.
        bf16: compute in bfloat16. Weights (or their master copies) and the reduction of gradients stay in float32.
        replicas: number of groups of ranks that each store all shards (hybrid sharding).
        tensor_parallel: ranks that share the layers of one model and compute a batch together; neighbours. FSDP2 shards over
            the others.
        offload: keep shards (FSDP) or optimizer partitions (DeepSpeed) in CPU memory.
        zero_stage: ZeRO stage of DeepSpeed, 0 to 3.
        micro_batch: samples in one forward on one rank.
        accumulation: forwards in one optimizer step.
        clip_grad_norm: largest gradient norm; None: no clipping.
        checkpointing: which activations of a block are computed again in the backward; see `checkpoint_activations`.
        activations_on_host: what a block keeps for the backward waits in host memory.
        compiler: backend of torch.compile for the blocks; None: they are not compiled.
        reduce_each: reduce the gradients over ranks after each micro-batch. Otherwise a rank keeps those of the whole model
            until the last micro-batch. DDP always does, and DeepSpeed decides by itself.
        prefetch: blocks of which FSDP2 gathers the weights in advance; 0: it decides by itself.
        import_roots: folders in which an engine's import path is searched first.
    """

    engine: str
    device: torch.device
    blocks: Sequence[nn.Module]
    bf16: bool = False
    replicas: int = 1
    tensor_parallel: int = 1
    offload: bool = False
    zero_stage: int = 2
    micro_batch: int = 1
    accumulation: int = 1
    clip_grad_norm: float | None = None
    checkpointing: Checkpointing = "none"
    activations_on_host: bool = False
    compiler: str | None = None
    reduce_each: bool = False
    prefetch: int = 0
    import_roots: Sequence[str] = ()


def reduces_each(how: Literal["auto", "last", "each"], accumulation: int, weights: int, memory: float) -> bool:
    """Whether gradients are reduced over ranks after each micro-batch, and not only after the last one.

    Args:
        how: `auto` decides by memory.
        accumulation: micro-batches in one step.
        weights: number of weights of the whole model. Until the last micro-batch a rank keeps 4 bytes of each.
        memory: bytes of the rank's GPU; infinite without one.
    """
    return accumulation > 1 and (how == "each" or (how == "auto" and 4 * weights > memory / 4))


@dataclass(frozen=True)
class Prepared:
    """A wrapped model, the torch optimizer that steps its weights, and the parts of a training step.

    The methods fit a plain module. An engine with another training step has a subclass.

    Attributes:
        options: the options that the model was wrapped with.
        model: the wrapped model.
        optimizer: the torch optimizer.
    """

    options: WrapOptions
    model: Any
    optimizer: torch.optim.Optimizer

    def computing(self) -> Any:
        """Context for a forward. Does nothing here; a subclass may cast to bfloat16."""
        return nullcontext()

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Context for forward and backward of one micro-batch.

        Gradients are reduced over ranks only if `last`, or with the option `reduce_each`.

        Args:
            last: whether this is the last micro-batch of the optimizer step.
        """
        yield

    def backward(self, loss: Tensor) -> None:
        """Runs the backward of a scalar loss that is already divided by the number of micro-batches."""
        loss.backward()

    def clip(self) -> None:
        """Clips gradients to the norm `options.clip_grad_norm`, if it is set."""
        if self.options.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad_norm)

    def step(self) -> None:
        """Steps the optimizer."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad()
