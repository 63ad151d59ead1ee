"""A pre-trained model as the trainer takes it: the module itself, and what must be known of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Processor
from ..engines.names import ParameterNames
from ..errors import ConfigError
from ..weights.export import load_weights, save_weights
from ..weights.loading import Loading

HEAD = "head"  # the name of a head that is put on here


_NO_INPUTS = ("labels", "index", "real")  # of a batch


@dataclass(frozen=True)
class ExportPart:
    """Where in an export weights go: the folder, and what is put before their names there."""

    folder: str
    stem: str = ""


@dataclass(frozen=True)
class Pretrained:
    """A model with its head.

    Attributes:
        module: not wrapped yet; without memory (on the meta device) if there is `loading`.
        head: patterns of the weights that are new for the task; () if there are none.
        blocks: the modules to shard one by one, from the input on.
        processor: makes inputs of a split.
        loading: what reads the pre-trained weights, once the model is sharded; None: they are there.
        parts: prefix of names -> where in an export the weights with that prefix go, without it.
        describe: writes into an export what its library needs to know besides the weights.
    """

    module: nn.Module
    head: tuple[str, ...]
    blocks: list[nn.Module]
    processor: Processor
    loading: Loading | None = None
    parts: Mapping[str, ExportPart] = field(default_factory=lambda: {"": ExportPart(".")})
    describe: Callable[[Path], None] = lambda folder: None

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the weights of the (wrapped) model as an export: each part into its folder. Collective."""
        for prefix, part in self.parts.items():
            save_weights(model, folder / part.folder, prefix=prefix, stem=part.stem)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads an export into the (wrapped) model. Collective.

        Raises:
            CheckpointError: see `load_weights`.
        """
        for prefix, part in self.parts.items():
            load_weights(model, folder / part.folder, prefix=prefix, stem=part.stem)

    def save_description(self, folder: Path) -> None:
        """Writes into an export what its library reads besides weights: configuration, tokenizer or image processor."""
        self.describe(folder)
        self.processor.save(folder)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the (wrapped) model makes of a batch: [size, num_outputs], or as the objective has it."""
        inputs = {key: value for key, value in batch.items() if key not in _NO_INPUTS}
        found = model(**inputs) if self._takes_names(inputs) else model(*inputs.values())
        return output_of(found, "logits")

    def _takes_names(self, inputs: Mapping[str, Tensor]) -> bool:
        return isinstance(self.module, Classifier) or takes_names(self.module, inputs)

    @property
    def head_names(self) -> list[str]:
        """Names of the head's weights."""
        return ParameterNames.of(self.module).match(self.head, what="model.head") if self.head else []

    def head_module(self) -> tuple[str, nn.Module] | None:
        """Name and module of the head, if it is one module."""
        modules = dict(self.module.named_modules())
        return (self.head[0], modules[self.head[0]]) if len(self.head) == 1 and self.head[0] in modules else None


class Classifier(nn.Module):
    """A backbone, a vector made of its outputs, and a new linear head."""

    def __init__(self, backbone: nn.Module, features: str, width: int, num_outputs: int) -> None:
        """`features`: see `model.features` in the configuration."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_outputs)
        self._features = features

    def forward(self, **inputs: Tensor) -> Tensor:
        """[size, num_outputs]."""
        by_name = takes_names(self.backbone, inputs)
        found = self.backbone(**inputs) if by_name else self.backbone(*inputs.values())
        states = output_of(found, "pooler_output" if self._features == "pooled" else "last_hidden_state")
        if self._features == "cls":
            states = states[:, 0]
        elif self._features == "mean" and states.ndim > 3:  # a feature map: [size, channels, ...]
            states = states.flatten(2).mean(-1)
        elif self._features == "mean":
            mask = inputs.get("attention_mask", torch.ones(states.shape[:2], device=states.device))
            weights = mask.unsqueeze(-1).to(states.dtype)
            states = (states * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(states)
        return logits


def takes_names(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a module's forward has arguments of these names; otherwise they are given in order."""
    return set(inputs) <= set(inspect.signature(module.forward).parameters)


def output_of(found: Any, name: str) -> Tensor:
    """The tensor that a model gave, or the one of that name in what it gave.

    Raises:
        ConfigError: there is none.
    """
    value = found if isinstance(found, Tensor) else getattr(found, name, None)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"model.build: the model gives a {type(found).__name__} without {name!r}: "
            "wrap it in a function of yours whose model gives a tensor"
        )
    return value


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers: children of one class in a list, two or more, with weights; outermost lists first and only."""
    found: list[nn.Module] = []
    for child in module.children():
        layers = list(child.children())
        repeated = isinstance(child, nn.ModuleList | nn.Sequential) and len(layers) > 1
        if repeated and len({type(layer) for layer in layers}) == 1 and all(_has_weights(layer) for layer in layers):
            found += layers
        else:
            found += find_blocks(child)
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
