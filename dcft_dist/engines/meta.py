"""Builds models with their weights on the meta device, and gives the weights memory later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def on_meta() -> Iterator[None]:
    """Puts the weights of modules that are built in the block on the meta device. Tied weights stay tied.

    Buffers keep memory and values. Some of them (rotary frequencies, position indices) are in no file, so they could not
    be loaded later. A weight has memory until its module registers it, so at most one weight is in memory at a time.
    Inside the block, `Module.to` changes the data type but not the device.
    """
    register, move = nn.Module.register_parameter, nn.Module.to
    on_meta_device = WeakTensorKeyDictionary()  # registered weight -> its meta parameter; does not keep the weight alive

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in on_meta_device:
                on_meta_device[parameter] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            parameter = on_meta_device[parameter]
        register(module, name, parameter)

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtypes = [getattr(a, "dtype", a) for a in (*args, *kwargs.values())]  # `to` also takes the dtype of a tensor
        return next((move(module, d) for d in dtypes if isinstance(d, torch.dtype)), module)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.to = register, move  # type: ignore[method-assign]


class Materialiser:
    """Gives weights on the meta device memory, without values. Moves other weights and buffers to the device.

    Tied weights stay tied. (`Module.to_empty` would untie them, and would overwrite the values of buffers.)
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: device of the weights and buffers."""
        self._device = device
        # id of a meta parameter -> (it, its replacement with memory); a stored parameter's id cannot be used again
        self._replacements: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def __call__(self, module: nn.Module) -> None:
        """Handles the weights and buffers of a module and of all its submodules."""
        for submodule in module.modules():
            self.one(submodule)

    @torch.no_grad()
    def one(self, module: nn.Module) -> None:
        """Handles the weights and buffers of one module, without its submodules."""
        for slot, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in self._replacements:
                    self._replacements[id(parameter)] = parameter, self._empty(parameter)
                setattr(module, slot, self._replacements[id(parameter)][1])
            elif parameter.device != self._device:
                parameter.data = parameter.data.to(self._device)
        self._move_own_buffers(module)

    def move_buffers(self, module: nn.Module) -> None:
        """Moves the buffers of a module and of all its submodules; leaves weights alone."""
        for submodule in module.modules():
            self._move_own_buffers(submodule)

    def _move_own_buffers(self, module: nn.Module) -> None:
        for slot, buffer in module.named_buffers(recurse=False):
            setattr(module, slot, buffer.to(self._device))

    def _empty(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, device=self._device), requires_grad=parameter.requires_grad)
