"""Interpolation by set: after a training, the weights of a set go back part of their way, and all others another part.

w = start + share (end - start), with one share for the weights of a set and one for the rest of the body. The head stays as
it is at the end. With two equal shares this is WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903); (1, 1) is the end itself,
(0, 0) the start under the trained head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.find import find_engine
from ..engines.names import Patterns
from ..errors import EngineError
from ..method.fundamental_set import FundamentalSet


class Way:
    """The way of a training, from its start to its end, on sharded weights in place. Takes 8 bytes x weights / ranks.

    Make it before the training, call `ended` after it, and then `go` as often as you like:

        way = Way(model, head="classifier")
        ...                                   # your training
        way.ended()
        way.go(fundamental, on_set=0.25, on_rest=1.0)
    """

    def __init__(self, model: nn.Module, head: Patterns) -> None:
        """Stores the weights at the start.

        Args:
            model: the model, prepared for training under any engine.
            head: patterns of the head, which stays as trained; `()` for none.

        Raises:
            PatternError: a head pattern matches nothing.
        """
        self._model = model
        engine = find_engine(model)
        self._head = set(engine.names.match(head, what="head"))
        self._start = {s.name: s.local.detach().clone() for s in self._body(engine)}
        self._end: dict[str, Tensor] = {}

    def _body(self, engine: Engine) -> list[Shard]:
        return [shard for shard in engine.shards() if shard.name not in self._head]

    @torch.no_grad()
    def ended(self) -> None:
        """Stores the weights at the end; a later call stores those of then."""
        self._end = {s.name: s.local.detach().clone() for s in self._body(find_engine(self._model))}

    @torch.no_grad()
    def go(self, chosen: FundamentalSet | None, on_set: float, on_rest: float) -> None:
        """Puts the model at a place between start and end. Collective. Buffers, such as BatchNorm's, are not touched.

        Args:
            chosen: the set; None: all weights of the body go `on_rest` of their way.
            on_set: share of the way for the weights of the set.
            on_rest: share for all others of the body, scored or not.

        Raises:
            EngineError: `ended` was not called, or the model is sharded in another way since.
            FundamentalSetError: the set has other shapes than the model.
        """
        engine = find_engine(self._model)
        if not self._end:
            raise EngineError("the way has no end: call ended() after the training")
        for shard in self._body(engine):
            start, end = self._start.get(shard.name), self._end.get(shard.name)
            if start is None or end is None or start.shape != shard.local.shape:
                raise EngineError(f"{shard.name} is sharded in another way than when the training began")
            shard.local.copy_(_between(start, end, on_rest))
            if chosen is not None and on_set != on_rest and shard.name in chosen.info.shapes:
                mask = chosen.mask_in(shard.name, shard.box).to(shard.local.device).view(shard.local.shape)
                shard.local.copy_(torch.where(mask, _between(start, end, on_set), shard.local))
        engine.publish()

    def length(self) -> float:
        """Euclidean distance of this model's body from its start, where it is now. Collective."""
        squares = [0.0]
        for shard in self._body(find_engine(self._model)):
            way = shard.local.detach().double() - self._start[shard.name].double()
            squares.append(float(way.reshape(-1)[slice(*shard.owned)].square().sum()))
        return math.sqrt(collectives.reduce_numbers([sum(squares)], what="length of the way")[0])

    def back(self) -> None:
        """Puts the model at the end of its way, to the bit. Collective."""
        self.go(None, 1.0, 1.0)


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Exact at both ends."""
    if share in (0.0, 1.0):
        return end if share else start
    return start + share * (end - start)
