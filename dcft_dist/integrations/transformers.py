"""DCFT in the Trainer of transformers:

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

from ..compat.transformers import trainer_inputs
from ..distributed import collectives
from ..engines.find import torch_optimizer
from ..engines.names import Patterns
from ..errors import FundamentalSetError
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty
from .recipe import SET_FILE, Recipe

log = logging.getLogger(__name__)


class DCFTCallback(TrainerCallback):
    """Scores, selects and puts the penalty in force when training begins, under whatever engine the Trainer runs.

    The set lies in `output_dir/fundamental.safetensors` and in each checkpoint's folder. Training that goes on from a
    checkpoint takes the set it finds there, and scores nothing. Warm up a new head before (`warm_up_head`).

    Attributes:
        fundamental, penalty: from the beginning of training on.
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
            trainer: the one this callback is added to; its data, loss and wrapped model are used.
            fundamental: a set to use; nothing is scored.
            head, fraction, factor, num_batches, options (`score`, `select`, `penalty`): see `Recipe`. A batch is
                `per_device_train_batch_size` samples of a rank; its loss is that of `trainer.compute_loss`.
        """
        self.trainer = trainer
        self.recipe = Recipe(head, fraction, factor, num_batches, **options)
        self.fundamental = fundamental
        self.penalty: Penalty | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises:
        FundamentalSetError: training goes on from a checkpoint, and there is no set beside it.
        """
        self.on_train_end(args, state, control)  # an earlier train() may have ended in an exception
        model = self.trainer.model_wrapped
        if self.fundamental is None:
            self.fundamental = self._find(args, state) if state.global_step else self._make(model, args)
        elif not state.global_step:
            self.fundamental.save(_output(args) / SET_FILE)
        self.penalty = self.recipe.attach(model, self.fundamental, torch_optimizer(self.trainer.optimizer))
        log.info("%s, %s", self.fundamental, self.penalty)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.fundamental is not None:
            self.fundamental.save(_checkpoint(args, state) / SET_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.penalty is not None:
            self.penalty.remove()
            self.penalty = None

    def _make(self, model: nn.Module, args: TrainingArguments) -> FundamentalSet:
        loader: Any = self.trainer.get_train_dataloader()

        def loss_fn(model: nn.Module, batch: Any) -> Tensor:
            with self.trainer.compute_loss_context_manager():
                return cast(Tensor, self.trainer.compute_loss(model, dict(trainer_inputs(self.trainer, batch))))

        try:
            return self.recipe.make_set(model, lambda: loader, loss_fn, _output(args) / SET_FILE)
        finally:
            loader.end()  # Accelerate would go on thinking that this loader is being read

    @staticmethod
    def _find(args: TrainingArguments, state: TrainerState) -> FundamentalSet:
        folder = _checkpoint(args, state)
        places = [folder / SET_FILE, _output(args) / SET_FILE]
        with collectives.agreed("find the fundamental set"):
            for place in places if folder.is_dir() else ():  # else it goes on from a checkpoint of another directory
                if place.exists():
                    return FundamentalSet.load(place)
            raise FundamentalSetError(
                f"training goes on at step {state.global_step}, but there is no fundamental set at {places[0]} (nor at "
                f"{places[1]}): pass the one of the checkpoint as fundamental=FundamentalSet.load(...)"
            )


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return _output(args) / f"checkpoint-{state.global_step}"
