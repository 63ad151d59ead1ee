"""A callback for DCFT in Lightning's Trainer, with the strategies DDP and FSDP2 (`ModelParallelStrategy`).

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

try:  # Lightning is published as two packages
    _lightning: Any = importlib.import_module("lightning.pytorch")
except ImportError:
    _lightning = importlib.import_module("pytorch_lightning")


class DCFTCallback(_lightning.Callback):  # type: ignore[misc]
    """Scores weights, selects the fundamental set and attaches the penalty when training starts.

    The callback saves the set to `default_root_dir/fundamental.safetensors`, and the bytes of this file in each
    checkpoint. Each `fit` that begins at step 0 has a set of its own, as in cross-validation. Training that resumes from a
    checkpoint uses the set of the checkpoint. Warm up a new head before training (`warm_up_head`).

    Attributes:
        fundamental: the set of the last training; None before training starts, unless you passed one.
        penalty: the attached penalty; None outside training.
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
            loss_fn: `loss_fn(pl_module, batch)` -> mean loss of a batch that is on the module's device. Do not pass
                `training_step`, because it logs.
            head: names or patterns of the new task head, which is never scored.
            fraction: fraction of the eligible weights that become fundamental, in [0, 1].
            factor: multiplier of fundamental weights, in [0, 1]: 0 freezes them, 1 means no penalty.
            num_batches: batches to score on, per rank.
            fundamental: a set to use; the callback then scores nothing.
            options: `score`, `select` and `penalty`: dictionaries of further arguments of `score_importance`,
                `select_fundamental` and `attach_penalty`.
        """
        super().__init__()
        self.loss_fn = loss_fn
        self.recipe = Recipe(head, fraction, factor, num_batches, **options)
        self.fundamental = self._given = fundamental
        self.penalty: Penalty | None = None
        self._file: Path | None = None
        self._restored: torch.Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the set and attaches the penalty.

        Raises:
            EngineError: the module has no optimizer, or several.
            ScoreError: the training data is not a single DataLoader, or some rank has fewer than `num_batches` batches.
        """
        if len(trainer.optimizers) != 1:
            raise EngineError(f"the module has {len(trainer.optimizers)} optimizers: the callback needs exactly one")
        self._file = Path(trainer.default_root_dir) / SET_FILE
        model = trainer.strategy.model
        if self._restored is not None:
            with collectives.agreed("fundamental set of the checkpoint"):
                if collectives.rank() == 0:
                    write_atomic(self._file, self._restored.numpy().tobytes())
            with collectives.agreed("fundamental set of the checkpoint"):
                self.fundamental = FundamentalSet.load(self._file)
            self._restored = None  # a later fit() is another training
        elif self._given is not None:
            self.fundamental = self._given
            self.fundamental.save(self._file)
        elif self.fundamental is None or not trainer.global_step:
            self.fundamental = self._make_set(trainer, pl_module, model)
        self.penalty = self.recipe.attach(model, self.fundamental, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Checks that the penalty is in force, every `log_every_n_steps` steps.

        Raises:
            PenaltyError: see `Penalty.in_force`.
        """
        if self.penalty is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            self.penalty.in_force()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Removes the penalty."""
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Removes the penalty."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The bytes of the set's file, for a checkpoint."""
        if self._file is None:
            return {}
        return {"fundamental": torch.frombuffer(bytearray(self._file.read_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the set from a checkpoint."""
        self._restored = state_dict.get("fundamental")

    def _make_set(self, trainer: Any, pl_module: Any, model: Any) -> FundamentalSet:
        loader = trainer.train_dataloader
        if not hasattr(loader, "__iter__"):
            raise ScoreError(
                "the training data is not a single DataLoader: make a set with score_importance and select_fundamental, "
                "and pass it as fundamental="
            )

        def batches() -> Any:
            return (trainer.strategy.batch_to_device(batch) for batch in loader)

        def loss_fn(_model: Any, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return self.loss_fn(pl_module, batch)

        return self.recipe.make_set(model, batches, loss_fn, self._file or SET_FILE)
