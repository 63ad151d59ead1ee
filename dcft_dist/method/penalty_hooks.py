"""Hooks by which a penalty follows forwards and the steps of all optimizers, and whether they are still in place."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Optimizer = torch.optim.Optimizer


class Watcher(Protocol):
    """What the hooks tell of steps and forwards: a `Penalty`, or a `PullToStart`.

    Attributes:
        after_penalties: whether it is told of a step only after all penalties.
    """

    after_penalties: bool

    def on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Called before a step of any optimizer; returns new arguments for the step, or None."""

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Called after a step of any optimizer."""

    def on_finished(self, optimizer: Optimizer) -> None:
        """Called when all watchers have followed a step."""

    def sees_forward_of(self, module: torch.nn.Module) -> bool:
        """Whether it follows this module."""

    def on_forward(self) -> None:
        """Called before a forward in training."""


# Watchers in the order in which they were attached. It must be the same on every rank, since they call collectives.
_watching: dict[int, weakref.ref[Watcher]] = {}


_numbers = itertools.count()


_handles: list[Any] = []  # of the hooks on all optimizers


def watch_optimizers(penalty: Watcher) -> int:
    """Tells the penalty of all steps from now on. Returns a number for `unwatch`.

    Two hooks per process serve all penalties. A hook per penalty could be removed together with its penalty while torch
    iterates over its hooks.
    """
    if not all(map(is_in_place, _handles)) or not _handles:
        _handles[:] = [register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)]
    number = next(_numbers)
    _watching[number] = weakref.ref(penalty, lambda _: unwatch(number))
    return number


def unwatch(number: int) -> None:
    """Ends what `watch_optimizers` began; may be called more than once."""
    _watching.pop(number, None)


def is_watched(penalty: Watcher) -> bool:
    """Whether the penalty is told of steps: it has not ended, and nobody has cleared torch's hooks on optimizers."""
    return any(watcher() is penalty for watcher in _watching.values()) and all(map(is_in_place, _handles))


def is_in_place(handle: Any) -> bool:
    """Whether a hook is still where it was registered.

    Args:
        handle: a `RemovableHandle` of torch.
    """
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


@contextmanager
def unseen() -> Iterator[None]:
    """Steps in the block are not told to any penalty."""
    watching = dict(_watching)
    _watching.clear()
    try:
        yield
    finally:
        _watching.update(watching)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    changed = None
    for watcher in _in_turns():
        new_arguments = watcher.on_step(optimizer, args, kwargs)
        if new_arguments is not None:
            changed = args, kwargs = new_arguments
    return changed


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    watchers = _in_turns()
    for watcher in watchers:
        watcher.on_stepped(optimizer)
    for watcher in watchers:
        watcher.on_finished(optimizer)


def _in_turns() -> list[Watcher]:
    """Penalties first, then pulls."""
    watchers = [found for watcher in _watching.values() if (found := watcher()) is not None]
    return sorted(watchers, key=attrgetter("after_penalties"))


class ForwardHook:
    """Notifies the penalty when a forward in training begins. A copy or a pickle of the hook does nothing."""

    def __init__(self, penalty: Watcher) -> None:
        """
        Args:
            penalty: whom to notify; the hook does not keep it alive.
        """
        self._penalty = weakref.ref(penalty)

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        penalty = self._penalty()
        if penalty is not None and penalty.sees_forward_of(module) and module.training and torch.is_grad_enabled():
            penalty.on_forward()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_inert_hook, ())


def _inert_hook() -> Callable[[torch.nn.Module, Any], None]:
    return _ignore


def _ignore(module: torch.nn.Module, args: Any) -> None:
    return None
