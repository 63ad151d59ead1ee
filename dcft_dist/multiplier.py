"""One multiplier per weight, kept as one bit: what the penalty does to gradients and to steps.

A byte of bits indexes a table of 256 x 8 multipliers, so a change of factor rebuilds 2,048 numbers and nothing else, and
a mask is unpacked one chunk at a time. The product is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .bits import Packed, num_bytes, step_of


class Multipliers:
    """Multipliers of some weights: `bits[name]` packed, or None for a weight that is wholly unscored.

    Attributes:
        proposed, applied: sums of squares over the fundamental cells, before and after multiplying, while `watch` is on.
    """

    def __init__(self, bits: Mapping[str, Packed | None], device: torch.device, rest: float, unscored: float) -> None:
        self.bits = {n: None if b is None else torch.from_numpy(b).to(device) for n, b in bits.items()}
        self.factor, self.rest, self.unscored = 1.0, rest, unscored
        self.watch = False
        self.proposed = self.applied = 0.0
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def set_factor(self, factor: float) -> None:
        self.factor = factor
        self._tables.clear()

    def scale(self, name: str, gradient: Tensor) -> None:
        """gradient <- m * gradient, in place."""
        with _as_flat(gradient) as flat:
            self.scale_into(name, flat, flat)

    def scale_into(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """out <- m * gradient; both flat, and `out` may be `gradient`."""
        parts = zip(out.split(step_of(out.device)), self._parts(name, gradient), strict=True)
        for target, (part, m, chosen) in parts:
            self._watched(part, None, chosen, "proposed")
            torch.mul(part, m, out=target)
            self._watched(target, None, chosen, "applied")

    def shorten(self, name: str, old: Tensor, new: Tensor) -> None:
        """new <- old + m * (new - old), in place: exactly `old` where m is 0 and exactly `new` where it is 1."""
        starts = old.contiguous().view(-1).split(step_of(old.device))
        with _as_flat(new) as flat:
            for start, (part, m, chosen) in zip(starts, self._parts(name, flat), strict=True):
                self._watched(part, start, chosen, "proposed")
                torch.lerp(start, part, m, out=part)
                self._watched(part, start, chosen, "applied")

    def chosen(self, name: str, begin: int, end: int) -> Tensor:
        """Boolean: which of the cells `begin:end` (begin a multiple of 8) are fundamental; all False if unscored."""
        octets = self.bits[name]
        if octets is None:
            return torch.zeros(end - begin, dtype=torch.bool)
        octets = octets[begin // 8 : num_bytes(end)]
        places = torch.arange(8, dtype=torch.uint8, device=octets.device)
        return ((octets.unsqueeze(1) >> places) & 1).view(-1)[: end - begin].bool()

    def _parts(self, name: str, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Pieces of a tensor with their multipliers, and which cells are fundamental if that is watched."""
        octets, end = self.bits[name], 0
        for part in flat.split(step_of(flat.device)):
            begin, end = end, end + part.numel()
            if octets is None:
                yield part, torch.full((), self.unscored, dtype=_wide(part), device=part.device), None
            else:
                rows = octets[begin // 8 : num_bytes(end)].to(part.device)
                m = _rows(self._table(_wide(part), part.device), rows).view(-1)[: part.numel()]
                yield part, m, self.chosen(name, begin, end).to(part.device) if self.watch else None

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (dtype, device) not in self._tables:
            octet = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
            values = torch.tensor([self.rest, self.factor], dtype=torch.float64)
            self._tables[dtype, device] = values[octet].to(device=device, dtype=dtype)
        return self._tables[dtype, device]

    def _watched(self, part: Tensor, start: Tensor | None, chosen: Tensor | None, what: str) -> None:
        if chosen is not None:
            moved = part[chosen].double() if start is None else part[chosen].double() - start[chosen].double()
            setattr(self, what, getattr(self, what) + float(moved.square().sum()))


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    if table.device.type == "cpu" and type(table) is Tensor:  # numpy copies short rows faster than torch
        return torch.from_numpy(table.numpy().take(rows.numpy(), axis=0, mode="clip"))
    return table.index_select(0, rows.int())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def _as_flat(tensor: Tensor) -> Iterator[Tensor]:
    """A flat row-major view to change in place; a copy that is written back where the memory is laid out otherwise."""
    flat = tensor.detach().contiguous().view(-1)
    yield flat
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))
