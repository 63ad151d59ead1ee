"""Models without memory: their weights on the meta device, everything else as it is made. And with it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules made in the block have their weights on the meta device; tied weights stay tied.

    Buffers keep their values: those that no file has (rotary frequencies, position indices) could not be read again. A
    weight is allocated, not yet written, when a module registers it, so at no time is there more than one in memory.
    Where a library then moves its module to a device, only the data type changes.
    """
    register, move = nn.Module.register_parameter, nn.Module.to
    known = WeakTensorKeyDictionary()  # weight that was registered -> what stands for it; does not keep it alive

    def register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in known:
                known[parameter] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            parameter = known[parameter]
        register(module, name, parameter)

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtypes = [getattr(a, "dtype", a) for a in (*args, *kwargs.values())]  # `to` also takes a tensor to be like
        return next((move(module, d) for d in dtypes if isinstance(d, torch.dtype)), module)

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign, assignment]
    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.to = register, move  # type: ignore[method-assign]


class Materialiser:
    """Gives weights on the meta device memory, without values; the others, and buffers, are moved. Ties are kept.

    (`Module.to_empty` unties weights, and wipes buffers that have their values.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # id -> the weight without memory, and with it

    def __call__(self, module: nn.Module) -> None:
        """For a module and all within it."""
        for part in module.modules():
            self.one(part)

    @torch.no_grad()
    def one(self, module: nn.Module) -> None:
        """For a module's own weights and buffers."""
        for slot, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in self._made:
                    self._made[id(parameter)] = parameter, self._empty(parameter)
                setattr(module, slot, self._made[id(parameter)][1])
            elif parameter.device != self._device:
                parameter.data = parameter.data.to(self._device)
        self._move_own_buffers(module)

    def move_buffers(self, module: nn.Module) -> None:
        """Buffers alone, of a module and all within it."""
        for part in module.modules():
            self._move_own_buffers(part)

    def _move_own_buffers(self, module: nn.Module) -> None:
        for slot, buffer in module.named_buffers(recurse=False):
            setattr(module, slot, buffer.to(self._device))

    def _empty(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, device=self._device), requires_grad=parameter.requires_grad)
