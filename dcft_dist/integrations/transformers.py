"""A callback for DCFT in the Trainer of transformers.

trainer = Trainer(model, args, train_dataset=data)
trainer.add_callback(DCFTCallback(trainer, head="classifier"))
trainer.train()
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..compat.transformers import trainer_folder, trainer_inputs
from ..distributed import collectives
from ..engines.find import torch_optimizer
from ..engines.names import Patterns
from ..errors import EngineError, FundamentalSetError
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from .recipe import SET_FILE, Recipe

log = logging.getLogger(__name__)


class DCFTCallback(TrainerCallback):
    """Scores weights, selects the fundamental set and attaches the penalty when training begins, under any engine.

    The set is saved as `fundamental.safetensors` in the folder of the Trainer and in that of each checkpoint. Each
    `trainer.train()` begins with a set of its own, also in cross-validation and in a hyperparameter search. Training that
    resumes from a checkpoint uses the set it finds there and scores nothing. Each Trainer needs its own callback. Warm up a
    new head before training (`warm_up_head`).

    Attributes:
        fundamental: the set of the last training; None before training begins, unless you passed one.
        penalty: the attached penalty; None outside training.
    """

    def __init__(
        self,
        trainer: Trainer,
        head: Patterns,
        fraction: float = 0.10,
        factor: float = 0.1,
        num_batches: int = 32,
        fundamental: FundamentalSet | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            trainer: the Trainer that you add this callback to. Scoring uses its data, its wrapped model and the loss of
                `trainer.compute_loss`.
            head: names or patterns of the new task head, which is never scored.
            fraction: fraction of the eligible weights that become fundamental, in [0, 1].
            factor: multiplier of fundamental weights, in [0, 1]: 0 freezes them, 1 means no penalty.
            num_batches: batches to score on, per rank, of `per_device_train_batch_size` samples each.
            fundamental: a set to use; the callback then scores nothing.
            options: `score`, `select` and `penalty`: dictionaries of further arguments of `score_importance`,
                `select_fundamental` and `attach_penalty`.
        """
        self.trainer = trainer
        self.recipe = Recipe(head, fraction, factor, num_batches, **options)
        self.fundamental = self._given = fundamental
        self.penalty: Penalty | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finds the set and attaches the penalty.

        Raises:
            EngineError: the callback was made for another Trainer.
            FundamentalSetError: training resumes from a checkpoint, and there is no set beside it.
            ScoreError: some rank has fewer than `num_batches` batches.
        """
        self.on_train_end(args, state, control)  # an earlier train() may have ended in an exception
        if state is not self.trainer.state:
            raise EngineError("this DCFTCallback was made for another Trainer: make one for each Trainer")
        model = self.trainer.model_wrapped
        if self._given is not None:
            self.fundamental = self._given
            if not state.global_step:
                self.fundamental.save(self._folder / SET_FILE)
        else:
            self.fundamental = self._load_set(state) if state.global_step else self._make_set(model)
        self.penalty = self.recipe.attach(model, self.fundamental, torch_optimizer(self.trainer.optimizer))
        log.info("%s, %s", self.fundamental, self.penalty)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Checks that the penalty is in force. Not at the end, when the Trainer may have loaded its best checkpoint.

        Raises:
            PenaltyError: see `Penalty.in_force`.
        """
        if self.penalty is not None and state.global_step < state.max_steps:
            self.penalty.in_force()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves the set beside the checkpoint."""
        if self.fundamental is not None:
            self.fundamental.save(self._checkpoint(state) / SET_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Removes the penalty."""
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None

    @property
    def _folder(self) -> Path:
        return Path(trainer_folder(self.trainer))

    def _checkpoint(self, state: TrainerState) -> Path:
        return self._folder / f"checkpoint-{state.global_step}"

    def _make_set(self, model: nn.Module) -> FundamentalSet:
        loader: Any = self.trainer.get_train_dataloader()

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            with self.trainer.compute_loss_context_manager():
                return cast(Tensor, self.trainer.compute_loss(model, dict(trainer_inputs(self.trainer, batch))))

        try:
            return self.recipe.make_set(model, lambda: loader, loss_fn, self._folder / SET_FILE)
        finally:
            loader.end()  # otherwise Accelerate believes that the loader is still in use

    def _load_set(self, state: TrainerState) -> FundamentalSet:
        folder = self._checkpoint(state)
        files = [folder / SET_FILE, self._folder / SET_FILE]
        with collectives.agreed("find the fundamental set"):
            for file in files if folder.is_dir() else ():  # without the folder, the checkpoint is in another directory
                if file.exists():
                    return FundamentalSet.load(file)
            raise FundamentalSetError(
                f"training resumes at step {state.global_step}, but there is no fundamental set at {files[0]} or at "
                f"{files[1]}: pass the set of the checkpoint as fundamental=FundamentalSet.load(...)"
            )
