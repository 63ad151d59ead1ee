"""DCFT in Lightning's Trainer, with its DDP and FSDP2 (`ModelParallelStrategy`) strategies:

Trainer(strategy="ddp", callbacks=[DCFTCallback(loss_fn, head="classifier")]).fit(module, loader)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from ..distributed import collectives
from ..engines.names import Patterns
from ..errors import EngineError, ScoreError
from ..files import write_atomic
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from ..method.score_batches import LossFn
from .recipe import SET_FILE, Recipe

try:  # Lightning is published under two names
    _lightning: Any = importlib.import_module("lightning.pytorch")
except ImportError:
    _lightning = importlib.import_module("pytorch_lightning")


class DCFTCallback(_lightning.Callback):  # type: ignore[misc]
    """Scores, selects and puts the penalty in force when training starts.

    The set lies in `default_root_dir/fundamental.safetensors` and within each checkpoint (as the bytes of that file);
    training that goes on from a checkpoint takes the set from there. Warm up a new head before (`warm_up_head`).

    Attributes:
        fundamental, penalty: from the start of training on.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        head: Patterns,
        fraction: float = 0.10,
        factor: float = 0.1,
        num_batches: int = 32,
        fundamental: FundamentalSet | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            loss_fn: `loss_fn(pl_module, batch)` -> mean loss of a batch that is on the module's device. Not
                `training_step`, which logs.
            fundamental: a set to use; nothing is scored.
            head, fraction, factor, num_batches, options (`score`, `select`, `penalty`): see `Recipe`.
        """
        super().__init__()
        self.loss_fn = loss_fn
        self.recipe = Recipe(head, fraction, factor, num_batches, **options)
        self.fundamental = fundamental
        self.penalty: Penalty | None = None
        self._file: Path | None = None
        self._restored: torch.Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises:
        EngineError: the module has no optimizer, or several.
        """
        if len(trainer.optimizers) != 1:
            raise EngineError(f"the module has {len(trainer.optimizers)} optimizers: the callback needs one")
        self._file = Path(trainer.default_root_dir) / SET_FILE
        model = trainer.strategy.model
        if self._restored is not None:
            with collectives.agreed("fundamental set of the checkpoint"):
                if collectives.rank() == 0:
                    write_atomic(self._file, self._restored.numpy().tobytes())
            with collectives.agreed("fundamental set of the checkpoint"):
                self.fundamental = FundamentalSet.load(self._file)
        elif self.fundamental is not None:
            self.fundamental.save(self._file)
        else:
            self.fundamental = self._make(trainer, pl_module, model)
        self.penalty = self.recipe.attach(model, self.fundamental, trainer.optimizers[0])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        return {"fundamental": torch.frombuffer(bytearray(self._file.read_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("fundamental")

    def _make(self, trainer: Any, pl_module: Any, model: Any) -> FundamentalSet:
        loader = trainer.train_dataloader
        if not hasattr(loader, "__iter__"):
            raise ScoreError("the training data are no single loader: pass fundamental=, a set made with score_importance")

        def batches() -> Any:
            return (trainer.strategy.batch_to_device(batch) for batch in loader)

        def loss_fn(given: Any, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return self.loss_fn(pl_module, batch)

        return self.recipe.make_set(model, batches, loss_fn, self._file or SET_FILE)
