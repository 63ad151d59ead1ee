"""Pre-trained models that install as a package, with a new head on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .data import Batch, ImageProcessor, TextProcessor
from .errors import ConfigError, DataError, listing
from .packages import dinov2_file, minilm_folder
from .schema import Config

HEAD = "head"  # the head's name in every model of this module
Processor = TextProcessor | ImageProcessor  # called with a split, each gives its `Examples`


class Classifier(nn.Module):
    """A transformer of the transformers library, a vector made of its states, and a linear head."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes)

    def features(self, batch: Batch) -> Tensor:
        """[size, width]."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """[size, num_classes] logits."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def describe(self, folder: Path) -> None:
        """Writes what `AutoModel` needs to know of the backbone besides its weights."""
        self.backbone.config.save_pretrained(folder)  # type: ignore[union-attr, operator]

    def blocks(self) -> list[nn.Module]:
        """The units to shard one by one."""
        return list(self.backbone.encoder.layer)  # type: ignore[union-attr, arg-type]


class TextClassifier(Classifier):
    """Features: the mean of the token states."""

    def features(self, batch: Batch) -> Tensor:
        states = self.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return mean


class ImageClassifier(Classifier):
    """Features: the class token."""

    def features(self, batch: Batch) -> Tensor:
        states: Tensor = self.backbone(pixel_values=batch["pixel_values"]).last_hidden_state
        return states[:, 0]


def build_model(config: Config, num_classes: int) -> tuple[Classifier, Processor]:
    """The pre-trained model with a head drawn from the seed, and what turns a split into its inputs.

    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: more layers are asked for than there are.
    """
    backbone, processor, make = {"minilm": _minilm, "dinov2_small": _dinov2_small}[config.model.name](config)
    layers = config.model.num_layers
    if layers is not None:
        if layers > len(backbone.encoder.layer):
            raise ConfigError(f"model.num_layers: the model has {len(backbone.encoder.layer)} layers, not {layers}")
        backbone.encoder.layer = backbone.encoder.layer[:layers]
        backbone.config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return make(backbone.float(), backbone.config.hidden_size, num_classes), processor


def check_model(config: Config) -> None:
    """
    Raises:
        DataError: the package with the weights is not installed.
    """
    {"minilm": minilm_folder, "dinov2_small": dinov2_file}[config.model.name]()


Parts = tuple[Any, Processor, Callable[[nn.Module, int, int], Classifier]]


def _minilm(config: Config) -> Parts:
    folder = minilm_folder()
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report lists the unused pooler
    backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return backbone, TextProcessor(tokenizer, config.task.max_tokens), TextClassifier


def _dinov2_small(config: Config) -> Parts:
    """DINOv2 ViT-S/14, from the ONNX file of another model that has it as its backbone."""
    from transformers import Dinov2Config, Dinov2Model

    layers = min(config.model.num_layers or 12, 12)  # its configuration names stages, which are not cut with the layers
    size: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    backbone = Dinov2Model(Dinov2Config(**size))
    weights = _onnx_backbone(dinov2_file())
    if "encoder.layer.0.attention.q_proj.weight" in backbone.state_dict():  # transformers 5 has other names than its 4
        weights = {_renamed(name): value for name, value in weights.items()}
    weights = {n: v for n, v in weights.items() if not n.startswith("encoder.layer.") or int(n.split(".")[2]) < layers}
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    if set(missing) != {"embeddings.mask_token"} or unexpected:
        raise DataError(
            f"{dinov2_file()} is not the backbone it should be: missing {listing(missing)}; unexpected {listing(unexpected)}"
        )
    return backbone, ImageProcessor(config.model.image_size), ImageClassifier


def _renamed(name: str) -> str:
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj")):
        name = name.replace(f".attention.{old}.", f".attention.{new}.")
    return name.replace(".attention.output.dense.", ".attention.o_proj.")


def _onnx_backbone(file: Path) -> dict[str, Tensor]:
    """The state of the module `backbone`: linear weights are transposed there, and named after the node that uses them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise DataError("the model dinov2_small needs the package onnx to read its weights: pip install onnx") from error
    graph = onnx.load(file).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = tensors[node.input[1]].t().contiguous()
    places = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
    found["backbone.embeddings.position_embeddings"] = torch.cat(sorted(places, key=lambda value: value.shape[1]), 1)
    return {name.removeprefix("backbone."): value for name, value in found.items()}
