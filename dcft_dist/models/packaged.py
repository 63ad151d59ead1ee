"""Backbones with weights that install as a Python package: MiniLM for texts, DINOv2 for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import DataError, listing
from ..packages import dinov2_file, minilm_folder


def minilm(config: Config) -> tuple[Any, str]:
    """all-MiniLM-L6-v2 for texts: (backbone, features that the head takes, as in `model.features`)."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its load report lists the unused pooler
    return AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False, local_files_only=True), "mean"


def dinov2_small(config: Config) -> tuple[Any, str]:
    """DINOv2 ViT-S/14 for images: (backbone, features that the head takes, as in `model.features`).

    The weights come from the ONNX file of another model that uses DINOv2 as its backbone.

    Args:
        config: configuration of the run; `model.num_layers` limits the layers.

    Raises:
        DataError: a package is missing, or the file has other weights.
    """
    from transformers import Dinov2Config, Dinov2Model

    # Limited here, since the configuration lists stages: cutting layers later would not shorten that list.
    layers = min(config.model.num_layers or 12, 12)
    size: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    backbone = Dinov2Model(Dinov2Config(**size))
    weights = _onnx_backbone(dinov2_file())
    if "encoder.layer.0.attention.q_proj.weight" in backbone.state_dict():  # transformers 5 renamed these weights
        weights = {_renamed(name): value for name, value in weights.items()}
    weights = {n: v for n, v in weights.items() if not n.startswith("encoder.layer.") or int(n.split(".")[2]) < layers}
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    if set(missing) != {"embeddings.mask_token"} or unexpected:
        raise DataError(
            f"{dinov2_file()} does not have the weights of DINOv2 ViT-S/14: missing {listing(missing)}; "
            f"unexpected {listing(unexpected)}"
        )
    return backbone, "cls"


def _renamed(name: str) -> str:
    """The name in transformers 5 of a weight with this name in transformers 4."""
    for old, new in (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj")):
        name = name.replace(f".attention.{old}.", f".attention.{new}.")
    return name.replace(".attention.output.dense.", ".attention.o_proj.")


def _onnx_backbone(file: Path) -> dict[str, Tensor]:
    """State of the module `backbone` in an ONNX file, which transposes linear weights and names them after their node."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise DataError("the model dinov2_small needs the package onnx to read its weights: pip install onnx") from error
    graph = onnx.load(file).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].t().contiguous()
    positions = [value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3]
    state["backbone.embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda value: value.shape[1]), 1)
    return {name.removeprefix("backbone."): value for name, value in state.items()}
