"""`Pretrained`: a model with its head, and what the trainer needs to know of it."""

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

HEAD = "head"  # name of a head that this package adds to a model


_NO_INPUTS = ("labels", "index", "real")  # entries of a batch that the model does not take


@dataclass(frozen=True)
class ExportPart:
    """Where a part of the weights goes in an export.

    Attributes:
        folder: folder inside the export.
        stem: put before the names of the weights in its files.
    """

    folder: str
    stem: str = ""


@dataclass(frozen=True)
class Pretrained:
    """A model with its head.

    Attributes:
        module: the module, not wrapped; on the meta device (without memory) if `loading` is not None.
        head: patterns of the weights that are new for the task; () if there are none.
        blocks: the modules to shard one by one, ordered from input to output.
        processor: turns a split into inputs of the model.
        loading: reads the pre-trained weights after the model is sharded; None: the module has its weights already.
        parts: prefix of names -> where in an export the weights with that prefix go. The prefix is removed from their names.
        describe: writes the configuration that the model's library needs into the folder of an export.
    """

    module: nn.Module
    head: tuple[str, ...]
    blocks: list[nn.Module]
    processor: Processor
    loading: Loading | None = None
    parts: Mapping[str, ExportPart] = field(default_factory=lambda: {"": ExportPart(".")})
    describe: Callable[[Path], None] = lambda folder: None

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the weights as an export, each part into its folder. Collective.

        Args:
            model: the wrapped model, or the unwrapped one.
            folder: folder of the export.
        """
        for prefix, part in self.parts.items():
            save_weights(model, folder / part.folder, prefix=prefix, stem=part.stem)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads an export into the model. Collective.

        Args:
            model: the wrapped model, or the unwrapped one.
            folder: folder of the export.

        Raises:
            CheckpointError: see `load_weights`.
        """
        for prefix, part in self.parts.items():
            load_weights(model, folder / part.folder, prefix=prefix, stem=part.stem)

    def save_description(self, folder: Path) -> None:
        """Writes what the model's library reads besides the weights: configuration, tokenizer or image processor.

        Args:
            folder: folder of the export.
        """
        self.describe(folder)
        self.processor.save(folder)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs for a batch: [size, num_outputs], or another shape that the objective takes.

        Args:
            model: the wrapped model, or the unwrapped one.
            batch: inputs by name, with `labels`, `index` and `real`.

        Raises:
            ConfigError: the model returns neither a tensor nor an object with `logits`.
        """
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in _NO_INPUTS}
        if "position_ids" in inputs and takes_names(self.module, {"use_cache": None}):
            inputs["use_cache"] = False  # with a cache, transformers would not look where packed texts begin
        outputs = model(**inputs) if self._takes_names(inputs) else model(*inputs.values())
        return output_of(outputs, "logits")

    def _takes_names(self, inputs: Mapping[str, Any]) -> bool:
        return isinstance(self.module, Classifier) or takes_names(self.module, inputs)

    @property
    def head_names(self) -> list[str]:
        """Names of the head's weights."""
        return ParameterNames.of(self.module).match(self.head, what="model.head") if self.head else []

    def head_module(self) -> tuple[str, nn.Module] | None:
        """(name, module) of the head if it is one module, otherwise None."""
        modules = dict(self.module.named_modules())
        return (self.head[0], modules[self.head[0]]) if len(self.head) == 1 and self.head[0] in modules else None


class Classifier(nn.Module):
    """A backbone with a new linear head over one vector of features for each example."""

    def __init__(self, backbone: nn.Module, features: str, width: int, num_outputs: int) -> None:
        """
        Args:
            backbone: the pre-trained model.
            features: the features that the head takes, as in `model.features`: `cls`: the first token; `mean`: the mean
                over all tokens, or over all positions of a feature map; `pooled`: the pooled output of the backbone.
            width: width of the features.
            num_outputs: number of outputs of the head.
        """
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_outputs)
        self._features = features

    def forward(self, **inputs: Tensor) -> Tensor:
        """Outputs of the head, [size, num_outputs]."""
        by_name = takes_names(self.backbone, inputs)
        outputs = self.backbone(**inputs) if by_name else self.backbone(*inputs.values())
        states = output_of(outputs, "pooler_output" if self._features == "pooled" else "last_hidden_state")
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
    """Whether a module's forward has arguments with the names of the inputs; if not, they are passed by position.

    Args:
        module: the model.
        inputs: inputs by name.
    """
    return set(inputs) <= set(inspect.signature(module.forward).parameters)


def output_of(found: Any, name: str) -> Tensor:
    """The tensor that a model returned, or the one with this name inside the object that it returned.

    Args:
        found: what the model returned.
        name: attribute with the tensor, such as `logits`.

    Raises:
        ConfigError: there is no such tensor.
    """
    value = found if isinstance(found, Tensor) else getattr(found, name, None)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"model.build: the model returns a {type(found).__name__} without {name!r}: "
            "wrap it in a module of your own that returns a tensor"
        )
    return value


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, to be sharded one by one.

    They are the children of each `ModuleList` or `Sequential` with at least two children, all of one class and with weights.
    Lists inside such layers do not count.

    Args:
        module: the model, not wrapped yet.
    """
    blocks: list[nn.Module] = []
    for child in module.children():
        layers = list(child.children())
        repeated = isinstance(child, nn.ModuleList | nn.Sequential) and len(layers) > 1
        if repeated and len({type(layer) for layer in layers}) == 1 and all(_has_weights(layer) for layer in layers):
            blocks += layers
        else:
            blocks += find_blocks(child)
    return blocks


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
