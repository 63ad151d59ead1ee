"""The head's warm-up in a run: on features that the frozen body computes once."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from . import collectives, schema
from .data import Examples, evaluation_batches, order
from .errors import CheckpointError
from .evaluate import EVALUATION_BATCH
from .files import write_atomic
from .models import Classifier
from .warmup import warm_up_head
from .world import World

log = logging.getLogger(__name__)
Features = tuple[Tensor, Tensor, int]  # [size, width] features, [size] labels, size


class Head:
    """Warms up the head of a model that is not wrapped yet; the linear probe is nothing else."""

    def __init__(
        self,
        model: Classifier,
        settings: schema.HeadWarmup,
        seed: int,
        world: World,
    ) -> None:
        self._model, self._settings, self._seed, self._world = model, settings, seed, world

    def warm_up_or_load(self, file: Path, train: Examples, validation: Examples) -> None:
        """Trains the head, unless `file` has it from an earlier attempt; leaves it in `file` and in the model. Collective.

        Raises:
            CheckpointError: the file is damaged.
        """
        head = self._model.head.to(self._world.device)
        if not collectives.on_every_rank(file.exists()):
            self._warm_up(file, train, validation)  # it is not read back: a node may not see the new file yet
            return
        with collectives.agreed("load the warmed-up head"):
            try:
                head.load_state_dict(load_file(file))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise CheckpointError(f"{file} is damaged ({error}): delete it to make it again") from error

    def _warm_up(self, file: Path, train: Examples, validation: Examples) -> None:
        self._model.to(self._world.device).eval()
        head, settings = self._model.head, self._settings
        done = warm_up_head(
            head,
            self._batches(train),
            _loss,
            head=("weight", "bias"),
            validation=self._batches(validation),
            lr=settings.lr,
            max_epochs=settings.max_epochs,
            patience=settings.patience,
        )
        if done.best_epoch == settings.max_epochs:
            log.warning("the head was still improving after %d epochs of warm-up", settings.max_epochs)
        with collectives.agreed("save the warmed-up head"):
            if self._world.is_first:
                weights = {k: v.cpu() for k, v in head.state_dict().items()}
                write_atomic(file, save(weights, {"warm_up": json.dumps(done.__dict__)}))

    @torch.no_grad()
    def _batches(self, examples: Examples) -> list[Features]:
        """This rank's features of a split, in batches of `settings.batch` over all ranks, equally many on every rank."""
        rank, ranks = self._world.rank, self._world.world_size
        features, labels = [], []
        for batch in evaluation_batches(examples, rank, ranks, EVALUATION_BATCH, self._world.device):
            real = batch["real"]
            features.append(self._model.features(batch)[real])
            labels.append(batch["labels"][real])
        x, y = torch.cat(features), torch.cat(labels)
        mixed = torch.tensor(order(self._seed, rank, len(x)), device=x.device)  # they come by length
        share = max(self._settings.batch // ranks, 1)
        num_batches = math.ceil(math.ceil(len(examples) / ranks) / share)
        parts = [mixed[i * share : (i + 1) * share] for i in range(num_batches)]
        return [(x[part], y[part], len(part)) for part in parts]


def _loss(head: nn.Module, batch: Features) -> tuple[Tensor, int]:
    features, labels, count = batch
    return functional.cross_entropy(head(features), labels, reduction="sum"), count
