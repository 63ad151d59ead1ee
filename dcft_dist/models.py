"""The pre-trained models of a run: those that install as a package, and the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import ImageProcessor, Processor, TextProcessor
from .errors import ConfigError, DataError, listing
from .images import OwnImageProcessor
from .imports import find_object
from .labelled_volumes import LabelledVolumeProcessor
from .language import AnswerProcessor
from .own_model import own_model
from .own_parts import CollateProcessor
from .packages import dinov2_file, minilm_folder
from .pretrained import HEAD, Classifier, Exported, Pretrained, find_blocks
from .schema import Config
from .stored import absent
from .volumes import VolumeProcessor


def build_model(config: Config, num_outputs: int) -> Pretrained:
    """The model with a head drawn from the seed.

    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: more layers are asked for than there are; see `own_model` too.
    """
    if config.model.name == "own":
        return own_model(config, num_outputs, make_processor(config))
    backbone, features = {"minilm": _minilm, "dinov2_small": _dinov2_small}[config.model.name](config)
    layers = config.model.num_layers
    if layers is not None:
        if layers > len(backbone.encoder.layer):
            raise ConfigError(f"model.num_layers: the model has {len(backbone.encoder.layer)} layers, not {layers}")
        backbone.encoder.layer = backbone.encoder.layer[:layers]
        backbone.config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        module = Classifier(backbone.float(), features, backbone.config.hidden_size, num_outputs)
    return Pretrained(
        module=module,
        head=(HEAD,),
        blocks=find_blocks(module),
        processor=make_processor(config),
        parts={"backbone.": Exported("."), f"{HEAD}.": Exported(HEAD)},
        describe=backbone.config.save_pretrained,
    )


def make_processor(config: Config) -> Processor:
    """What makes inputs of a split.

    Raises:
        ConfigError: the model has no tokenizer; keys of `[data]` do not fit each other.
    """
    if config.task.name == "mri_region":
        return ImageProcessor(config.model.image_size)
    if config.task.kind == "segmentation":
        return VolumeProcessor(config)
    if config.task.name == "own" and config.data.modality == "volume":
        return LabelledVolumeProcessor(config)
    if config.task.name == "own" and config.data.modality == "own":
        return CollateProcessor(config)
    if config.task.name == "own" and config.data.modality == "image":
        return OwnImageProcessor(config)
    from transformers import AutoTokenizer

    folder = minilm_folder() if config.model.name == "minilm" else config.model.weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.weights: no tokenizer in {folder}: {error}") from error
    if config.task.kind == "causal_lm":
        return AnswerProcessor(tokenizer, config.task.max_tokens, config.data.template)
    return TextProcessor(tokenizer, config.task.max_tokens)


def check_model(config: Config) -> None:
    """
    Raises:
        DataError: the package with the weights is not installed.
        ConfigError: there is nothing at `model.build` or `model.weights`.
    """
    if config.model.name == "own":
        find_object(str(config.model.build), config.import_roots, "model.build")
        if config.model.weights and not Path(config.model.weights).exists():
            raise ConfigError(f"model.weights: {absent(config.model.weights)}")
    else:
        {"minilm": minilm_folder, "dinov2_small": dinov2_file}[config.model.name]()


def _minilm(config: Config) -> tuple[Any, str]:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report lists the unused pooler
    return AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False, local_files_only=True), "mean"


def _dinov2_small(config: Config) -> tuple[Any, str]:
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
    return backbone, "cls"


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
