"""What is done to the blocks of a model before an engine wraps them: activations are not kept, or elsewhere; compilation.

Neither changes the structure of the model or the names of its weights. Every engine takes such blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..compat.pytorch import local_values, storage_of, version_of
from ..errors import EngineError

Checkpointing = Literal["none", "blocks", "selective"]


Contexts = Callable[[], tuple[Any, Any]]  # makes the contexts of a forward and of the second one, in the backward


# Operations of which the selective variant keeps the results: those that take long.
_KEPT = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


# A cache of keys and values, as decoders of transformers keep one, would get them a second time in the backward.
_WITHOUT_CACHE = {"past_key_values": None, "past_key_value": None, "layer_past": None, "use_cache": False}


def checkpoint_activations(blocks: Iterable[nn.Module], how: Checkpointing, on_host: bool = False) -> None:
    """Lets blocks forget their activations after the forward and compute them again, or fetch them, in the backward.

    The forward of each block is replaced; its hooks, among them those of an engine, run as before and only once. Dropout
    repeats its random numbers, and what the forward adds to buffers (BatchNorm) counts once. This is
    `torch.utils.checkpoint` without reentrance, and autograd's hooks for saved tensors.

    Args:
        blocks: the blocks. Each keeps its input only.
        how: `none`: nothing is computed again. `blocks`: everything is. `selective`: all but the results of matrix
            products, convolutions and attention, which are kept.
        on_host: whether what a block keeps waits in host memory; not its weights, nor what `selective` keeps. On a GPU the
            copies are pinned, and their order on the stream is that of the computation.

    Raises:
        EngineError: there are no blocks.
    """
    if how == "none" and not on_host:
        return
    if not (found := list(blocks)):
        raise EngineError("activation checkpointing needs the blocks of the model: name them in model.blocks")
    for block in found:
        if "forward" in vars(block):
            raise EngineError(f"the forward of a {type(block).__name__} is replaced already, so it cannot be checkpointed")
        block.forward = MethodType(partial(_forward, how, on_host), block)  # a copy of the block has its own


def _forward(how: Checkpointing, on_host: bool, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    with _OnHost(block) if on_host else nullcontext():
        if how == "none":
            return plain(*args, **kwargs)
        contexts = partial(create_selective_checkpoint_contexts, _kept()) if how == "selective" else None
        if next(block.buffers(), None) is not None:
            contexts = partial(_undoing, block, contexts)
        without_cache = {name: _WITHOUT_CACHE.get(name, value) for name, value in kwargs.items()}
        options: dict[str, Any] = {"context_fn": contexts} if contexts is not None else {}
        return checkpoint(plain, *args, use_reentrant=False, **options, **without_cache)


class HostCopies:
    """Copies activations into host memory, and back. `dcft plan` puts another one in its place, which counts."""

    def put(self, tensor: Tensor) -> Any:
        """Begins to copy a tensor into host memory."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, copy.copy_(tensor, non_blocking=True)

    def get(self, kept: Any) -> Tensor:
        """Begins to copy back what `put` returned."""
        device, copy = kept
        return copy.to(device, non_blocking=True) if device.type != "cpu" else copy  # type: ignore[no-any-return]


HOST = [HostCopies()]


class _OnHost(torch.autograd.graph.saved_tensors_hooks):
    """Inside, tensors that autograd saves wait in host memory, but for weights and buffers of a block."""

    def __init__(self, block: nn.Module) -> None:
        own, host = (*block.parameters(), *block.buffers()), HOST[-1]

        def pack(tensor: Tensor) -> tuple[Any, Any]:
            if storage_of(tensor) in map(storage_of, own):  # now: ZeRO-3 gathers them inside of the block
                return version_of(tensor), tensor
            if isinstance(tensor, DTensor):
                layout = (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
                return layout, host.put(local_values(tensor))
            return None, host.put(tensor)

        def unpack(packed: tuple[Any, Any]) -> Tensor:
            about, kept = packed
            if isinstance(about, int):
                if version_of(kept) != about:  # autograd looks at tensors that it keeps itself, not at what a hook returns
                    raise EngineError("a weight or buffer that the backward needs was changed in place after the forward")
                return kept  # type: ignore[no-any-return]
            values = host.get(kept)
            if about is None:
                return values
            mesh, placements, shape, stride = about
            return DTensor.from_local(values, mesh, placements, run_check=False, shape=shape, stride=stride)

        super().__init__(pack, unpack)


def _undoing(block: nn.Module, contexts: Contexts | None) -> tuple[Any, Any]:
    """Contexts of the forward and of the second one, which leaves the buffers as they were."""
    first, second = contexts() if contexts is not None else (nullcontext(), nullcontext())
    return first, _without_trace(block, second)


@contextmanager
def _without_trace(block: nn.Module, inner: Any) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        with inner:
            yield
    finally:
        for buffer, values in before:
            buffer.data.copy_(values)  # `data`: for autograd, nothing has changed


@cache
def _kept() -> list[Any]:
    found = [getattr(torch.ops.aten, name, None) for name in _KEPT]
    return [packet.default for packet in found if packet is not None]


def compile_blocks(blocks: Iterable[nn.Module], backend: str) -> None:
    """Compiles each block in place by `torch.compile`. Equal blocks share their code.

    Args:
        blocks: the blocks.
        backend: name of a backend, such as `inductor`.

    Raises:
        EngineError: there are no blocks, or the backend is unknown.
    """
    if not (found := list(blocks)):
        raise EngineError("compilation needs the blocks of the model: name them in model.blocks")
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise EngineError(f"torch.compile has no backend {backend!r}: use one of {', '.join(sorted(known))}")
    for block in found:
        block.compile(backend=backend)
