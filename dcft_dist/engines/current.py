"""What an engine says about its model, asked again only if the model may have changed.

Asking costs Python for every weight. Between steps nothing changes, so a step compares identities and places instead.
"""

from __future__ import annotations

from operator import is_

from .base import Engine, Shard


class Current:
    """The shards of a model and the tensors that an optimizer may step, as they are at the last `refresh`.

    Attributes:
        shards: name -> this rank's shard, in model order.
        stepped: id of a tensor -> names of the weights in it (`Engine.stepped`).
        holds: whether the weights are stored as when the engine was created (`Engine.holds`).
        version: how often they were looked up.
    """

    def __init__(self, engine: Engine) -> None:
        """
        Args:
            engine: the engine of the model.
        """
        self._engine = engine
        self.version = 0
        self._look()

    def refresh(self) -> None:
        """Looks again if something has changed since."""
        things, places = self._engine.marks()
        if places != self._places or len(things) != len(self._things) or not all(map(is_, things, self._things)):
            self._look()

    def _look(self) -> None:
        self.version += 1
        self.shards: dict[str, Shard] = {s.name: s for s in self._engine.shards()}
        self.stepped, self.holds = self._engine.stepped(), self._engine.holds()
        self._things, self._places = self._engine.marks()  # kept, so that no other thing gets the same identity
