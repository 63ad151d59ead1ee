"""What fine-tuning changed, in one file: delta + pre-trained weights = adapted weights, bit for bit.

A delta stores one bit for each weight (changed or not) and the values of the changed weights. It is small where most
weights were frozen (sparse fine-tuning of the set, BitFit). Weights that the pre-trained model does not have (a new head)
are stored whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..compat.pytorch import persistent_buffers
from ..config.schema import Config
from ..engines.meta import Materialiser
from ..engines.names import ParameterNames
from ..errors import CheckpointError
from ..files import write_atomic
from ..method.bits import num_bytes, pack, popcount, unpack
from ..models.pretrained import Pretrained
from ..train.task_model import build_for_task

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weights:
    """The weights and persistent buffers of a model, in memory on the CPU.

    Attributes:
        pretrained: the model with its head.
        tensors: name -> weight or buffer.
        fresh: names of the weights that are newly initialised for the task: the head, and `LoadReport.fresh`.
    """

    pretrained: Pretrained
    tensors: dict[str, Tensor]
    fresh: set[str]

    @classmethod
    def before(cls, config: Config, facts: Mapping[str, Any]) -> Self:
        """Builds and loads the pre-trained model of a configuration.

        Args:
            config: configuration of the run.
            facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.

        Raises:
            DcftError: the model cannot be built, or its weights cannot be read.
        """
        _, pretrained = build_for_task(config, facts)
        fresh = set(pretrained.head_names)
        if pretrained.loading:
            pretrained.loading.into_whole(pretrained.module, _CPU)
            fresh |= set(pretrained.loading.report.fresh)
        return cls._of(pretrained, fresh)

    def after(self, config: Config, facts: Mapping[str, Any], folder: Path) -> Self:
        """Builds and loads the adapted model of a run.

        Args:
            config: configuration of the run.
            facts: as in `before`.
            folder: the exported model of the run.

        Raises:
            CheckpointError: the export is damaged, or belongs to another model.
        """
        _, pretrained = build_for_task(config, facts)
        Materialiser(_CPU)(pretrained.module)
        pretrained.load(pretrained.module, folder)
        return self._of(pretrained, self.fresh)

    @classmethod
    def _of(cls, pretrained: Pretrained, fresh: set[str]) -> Self:
        named = ParameterNames.of(pretrained.module).parameters
        weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in named.items()}
        return cls(pretrained, weights | persistent_buffers(pretrained.module), fresh)

    def checksum(self) -> str:
        """SHA-256 of the pre-trained weights: all but `fresh`."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors.keys() - self.fresh):
            digest.update(name.encode())
            digest.update(_bytes(self.tensors[name]).numpy().tobytes())
        return digest.hexdigest()


def write_delta(config: Config, facts: Mapping[str, Any], adapted: Path, target: Path) -> tuple[int, int]:
    """Writes the delta of a run's exported model.

    Args:
        config: configuration of the run.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.
        adapted: folder with the exported model.
        target: file to write.

    Returns:
        (number of changed weights, number of all weights).

    Raises:
        CheckpointError: the export is damaged, or belongs to another model.
    """
    before = Weights.before(config, facts)
    after = before.after(config, facts, adapted)
    stored, changed, total = dict[str, Tensor](), 0, 0
    for name, value in after.tensors.items():
        if name in before.fresh:
            stored[f"{name}|whole"], number = value.clone(), value.numel()
        else:
            mask = (_bytes(before.tensors[name]) != _bytes(value)).any(-1)
            stored[f"{name}|bits"] = torch.from_numpy(pack(mask))
            number = int((before.tensors[name] != value).sum())  # a zero that lost its sign is stored, but not counted
            stored[f"{name}|values"] = value.reshape(-1)[mask]
        changed, total = changed + number, total + value.numel()
    write_atomic(target, save(stored, {"base": before.checksum(), "run": config.name}))
    return changed, total


def apply_delta(config: Config, facts: Mapping[str, Any], delta: Path, folder: Path) -> None:
    """Rebuilds the adapted model from a delta, and writes it into a folder as a run exports it.

    Args:
        config: configuration of the run.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.
        delta: file that `write_delta` wrote.
        folder: folder to write.

    Raises:
        CheckpointError: the delta is damaged, or was made from other pre-trained weights.
    """
    try:
        stored = load_file(delta)
        with safe_open(delta, framework="pt") as opened:
            base = opened.metadata()["base"]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{delta} is not a delta, or is damaged: {error}") from error
    weights = Weights.before(config, facts)
    if base != weights.checksum():
        raise CheckpointError(f"{delta} was made from other pre-trained weights than those of {config.name}")
    for name, tensor in weights.tensors.items():
        _change(tensor, name, stored, delta)
    weights.pretrained.save(weights.pretrained.module, folder)
    weights.pretrained.save_description(folder)


@torch.no_grad()
def _change(tensor: Tensor, name: str, stored: Mapping[str, Tensor], delta: Path) -> None:
    """Applies the stored changes to the tensor `name`, in place."""
    if (whole := stored.get(f"{name}|whole")) is not None and whole.shape == tensor.shape:
        tensor.copy_(whole)
        return
    bits, values = stored.get(f"{name}|bits"), stored.get(f"{name}|values")
    if bits is None or values is None or len(bits) != num_bytes(tensor.numel()) or popcount(bits.numpy()) != len(values):
        raise CheckpointError(f"{delta} is damaged, or belongs to another model: {name}")
    tensor.view(-1)[unpack(bits.numpy(), tensor.numel())] = values


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: [weights, bytes of a weight]. Comparing bytes, -0 differs from 0 and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)
