"""A handler for DCFT in MONAI's own trainer, alone or under DDP.

SupervisedTrainer(..., train_handlers=[DCFTHandler(head="model.2")]).run()
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..distributed import collectives
from ..engines.names import Patterns
from ..errors import EngineError
from ..files import write_atomic
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from .recipe import SET_FILE, Recipe


class DCFTHandler:
    """Scores weights, selects the fundamental set and attaches the penalty when training starts.

    Scores use the trainer's own loss on batches of its own loader. Pass the handler to MONAI's `CheckpointSaver` and
    `CheckpointLoader` beside the network, and a training that goes on uses the set of its checkpoint. Warm up a new head
    before training (`warm_up_head`).

    Attributes:
        fundamental: the set of the last training; None before training starts, unless you passed one.
        penalty: the attached penalty; None outside training.
    """

    def __init__(
        self,
        head: Patterns,
        fraction: float = 0.10,
        factor: float = 0.1,
        num_batches: int = 32,
        fundamental: FundamentalSet | None = None,
        file: str | Path = SET_FILE,
        every: int = 50,
        **options: Any,
    ) -> None:
        """
        Args:
            head: names or patterns of the new task head, which is never scored.
            fraction: fraction of the eligible weights that become fundamental, in [0, 1].
            factor: multiplier of fundamental weights, in [0, 1]: 0 freezes them, 1 means no penalty.
            num_batches: batches to score on, per rank.
            fundamental: a set to use; the handler then scores nothing.
            file: where the set is saved.
            every: iterations between two checks that the penalty is in force.
            options: `score`, `select` and `penalty`: dictionaries of further arguments of `score_importance`,
                `select_fundamental` and `attach_penalty`.
        """
        self.recipe = Recipe(head, fraction, factor, num_batches, **options)
        self.fundamental = fundamental
        self.penalty: Penalty | None = None
        self._given, self._file, self._every = fundamental, Path(file), every
        self._restored: torch.Tensor | None = None

    def attach(self, engine: Any) -> None:
        """Adds the handler to a trainer; MONAI calls it.

        Args:
            engine: a `SupervisedTrainer`, or another trainer with `network`, `optimizer` and `loss_function`. Whether it
                has them is seen when it runs: MONAI sets them after its handlers.
        """
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self._every), self._check)
        for event in (Events.COMPLETED, Events.TERMINATE, Events.EXCEPTION_RAISED):
            engine.add_event_handler(event, self._end)

    def state_dict(self) -> dict[str, Any]:
        """The bytes of the set's file, for a checkpoint."""
        if not self._file.exists():
            return {}
        return {"fundamental": torch.frombuffer(bytearray(self._file.read_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the set from a checkpoint."""
        self._restored = state_dict.get("fundamental")

    def _start(self, engine: Any) -> None:
        if missing := [name for name in ("network", "optimizer", "loss_function") if not hasattr(engine, name)]:
            raise EngineError(f"{type(engine).__name__} has no {', '.join(missing)}: the handler is for a SupervisedTrainer")
        if self._restored is not None:
            found = self._set_of_checkpoint(self._restored)
        elif self._given is not None:
            found = self._given
            found.save(self._file)
        else:
            found = self._make_set(engine)
        self.fundamental, self._restored = found, None
        self.penalty = self.recipe.attach(engine.network, found, engine.optimizer)

    def _set_of_checkpoint(self, content: torch.Tensor) -> FundamentalSet:
        with collectives.agreed("fundamental set of the checkpoint"):
            if collectives.rank() == 0:
                write_atomic(self._file, content.cpu().numpy().tobytes())
        with collectives.agreed("fundamental set of the checkpoint"):
            return FundamentalSet.load(self._file)

    def _make_set(self, engine: Any) -> FundamentalSet:
        def loss_fn(model: Any, batch: Any) -> torch.Tensor:
            prepared = engine.prepare_batch(batch, engine.state.device, engine.non_blocking, **engine.to_kwargs)
            inputs, targets, args, kwargs = prepared if len(prepared) == 4 else (*prepared, (), {})
            with torch.autocast("cuda", **engine.amp_kwargs) if engine.amp and engine.scaler else nullcontext():
                loss: torch.Tensor = engine.loss_function(engine.inferer(inputs, model, *args, **kwargs), targets).mean()
            return loss

        return self.recipe.make_set(engine.network, lambda: engine.data_loader, loss_fn, self._file)

    def _check(self, engine: Any) -> None:
        if self.penalty is not None:
            self.penalty.in_force()

    def _end(self, engine: Any, *error: Any) -> None:
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None
        if error:
            raise error[0]
