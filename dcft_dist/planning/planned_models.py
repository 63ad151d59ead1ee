"""The models that `dcft plan` can plan, each with a batch and a loss, built on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..compat.transformers import without_initialising
from ..config.schema import Config
from ..config.toml import load_config
from ..engines.blocks import Checkpointing
from ..engines.meta import on_meta
from ..engines.prepared import Weight
from ..errors import ConfigError, did_you_mean
from ..models.custom import custom_model
from ..models.example_inputs import example_inputs
from ..objectives.make import make_objective
from ..train.context import micro_batch
from ..train.methods import choose_trained
from ..train.optimizer import make_optimizer, rates_of


def _vit(width: int, layers: int, heads: int, patch: int) -> tuple[str, dict[str, int]]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return "ViTConfig", {**sizes, "patch_size": patch}


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> tuple[str, dict[str, int]]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}
    return "LlamaConfig", {**sizes, "num_key_value_heads": kv_heads, "vocab_size": words}


# Name -> class of transformers' configuration, and sizes. In this order: ViT-L/16, ViT-H/14, ViT-g/14 (DINOv2), Llama 3.2
# 1B (with an untied head), Llama 2 7B, Llama 3 70B.
MODELS = {
    "vit_large": _vit(1024, 24, 16, 16),
    "vit_huge": _vit(1280, 32, 16, 14),
    "vit_giant": _vit(1536, 40, 24, 14),
    "decoder_1b": _llama(2048, 8192, 16, 32, 8, 128256),
    "decoder_7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "decoder_70b": _llama(8192, 28672, 80, 64, 8, 128256),
}


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        model: `vit_large`, `vit_huge`, `vit_giant`, `decoder_1b`, `decoder_7b` or `decoder_70b`; a folder with a
            transformers `config.json`; or a configuration file (`.toml`).
        ranks: number of GPUs.
        engine: `fsdp2`, or `zero3` (DeepSpeed).
        gpus_per_node: number of GPUs in a node; only the printed number of nodes depends on it.
        micro_batch: samples in one forward pass of a rank.
        length: tokens in a sample of text.
        level: level of the penalty, `update` or `gradient`.
        where: gradient level: multiply `before` or `after` the reduction over ranks.
        mask_placement: gradient level before the reduction: `replicated` or `sharded` mask bits.
        bf16: True: compute in bfloat16; False: in float32.
        replicas: number of groups of ranks, each with a full copy of the weights (hybrid sharding).
        tensor_parallel: ranks that share the layers of a model; see `sharding.tensor_parallel`.
        memory_gib: memory of one GPU in GiB.
        accumulation: micro-batches in one step.
        reduce: when the gradients of several micro-batches are reduced over ranks; see `sharding.reduce`.
        activation_checkpointing: what is computed again in the backward; see `train.activation_checkpointing`.
        activations_on_host: what a block keeps for the backward waits in host memory.
        offload: weights, reduced gradients and optimizer state are in host memory; see `sharding.offload`.
        pull_to_start, pull_by_importance: see `optimizer.pull_to_start` and `optimizer.pull_by_importance`.
        ema: decay of an average of the weights; None: there is none. See `train.ema`.
        custom_optimizer: the optimizer is that of `optimizer.build`, which may read numbers during a step.
        checkpoint_copies: checkpoints are copied into host memory; see `checkpoint.background`.
        host_memory_gib: host memory of a node in GiB; None: unknown.
        words: overrides of a configuration file, as on the command line.
    """

    model: str
    ranks: int
    engine: Literal["fsdp2", "zero3"] = "fsdp2"
    gpus_per_node: int = 8
    micro_batch: int = 1
    length: int = 512
    level: Literal["update", "gradient"] = "update"
    where: Literal["before", "after"] = "before"
    mask_placement: Literal["replicated", "sharded"] = "replicated"
    bf16: bool = True
    replicas: int = 1
    tensor_parallel: int = 1
    memory_gib: float = 80.0
    accumulation: int = 1
    reduce: Literal["auto", "last", "each"] = "auto"
    activation_checkpointing: Checkpointing = "none"
    activations_on_host: bool = False
    offload: bool = False
    pull_to_start: float = 0.0
    pull_by_importance: float = 0.0
    ema: float | None = None
    custom_optimizer: bool = False
    checkpoint_copies: bool = False
    host_memory_gib: float | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A model to plan.

    Attributes:
        model: the model, on the meta device.
        head: patterns of the head's weights.
        blocks: modules to shard one by one.
        make_batch: makes one micro-batch, a dictionary of tensors.
        loss: (model, micro-batch) -> scalar loss.
        make_optimizer: makes the optimizer for a list of weights.
        eligible: patterns of the weights to score; None: weights of linear and convolution layers outside the head.
        uses_set: whether weights are scored and penalised; if not, that is not planned.
    """

    model: nn.Module
    head: str | tuple[str, ...]
    blocks: Sequence[nn.Module]
    make_batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    make_optimizer: Callable[[list[Weight]], torch.optim.Optimizer] = lambda weights: torch.optim.AdamW(
        [p for _, p, _ in weights], lr=1e-4
    )
    eligible: Sequence[str] | None = None
    uses_set: bool = True


def is_configuration(model: str) -> bool:
    """Whether `Request.model` names a configuration file."""
    return model.endswith(".toml")


def request_of(model: str, words: Sequence[str], **given: Any) -> Request:
    """Builds a request. Given values override those of the configuration.

    Args:
        model: as in `Request`.
        words: overrides of a configuration file, as on the command line; otherwise empty.
        given: other fields of `Request`. None: take the value of the configuration, or else the default of `Request`.

    Raises:
        ConfigError: the configuration is wrong, or there are words without a configuration file.
    """
    configured: dict[str, Any] = {}
    if is_configuration(model):
        config = load_config(model, list(words))
        zero3 = config.engine == "deepspeed" and config.sharding.zero_stage == 3
        configured = {
            "engine": "zero3" if zero3 else "fsdp2",
            "micro_batch": config.train.micro_batch,
            "length": config.task.max_tokens,
            "level": config.level,
        }
        together = given.get("tensor_parallel") or config.sharding.tensor_parallel
        share = max(config.train.global_batch // max((given.get("ranks") or 1) // together, 1), 1)
        size = micro_batch(given.get("micro_batch") or config.train.micro_batch, share)
        given = {**given, "micro_batch": size}
        configured |= {"accumulation": share // size}
        configured |= {"where": config.penalty.where, "bf16": config.train.precision == "bf16"}
        configured |= {
            "mask_placement": config.penalty.mask_placement,
            "replicas": config.sharding.replicas,
            "tensor_parallel": config.sharding.tensor_parallel,
            "reduce": config.sharding.reduce,
            "activation_checkpointing": config.train.activation_checkpointing,
            "activations_on_host": config.train.activations_on_host,
            "offload": config.sharding.offload,
            "pull_to_start": config.optimizer.pull_to_start,
            "pull_by_importance": config.optimizer.pull_by_importance,
            "ema": config.train.ema,
            "custom_optimizer": config.optimizer.build is not None,
            "checkpoint_copies": config.checkpoint.background and config.checkpoint.staging is None,
            "words": tuple(words),
        }
    elif words:
        raise ConfigError(f"unknown words {' '.join(words)}: only a configuration file accepts overrides")
    return Request(**{"model": model, **configured, **{key: value for key, value in given.items() if value is not None}})


def planned(request: Request) -> Planned:
    """Builds the model of a request, with placeholder values.

    Args:
        request: its `model` says which model.

    Raises:
        ConfigError: the model is unknown, cannot be planned, or is neither a causal language model nor an image classifier.
    """
    return _configured(request) if is_configuration(request.model) else _of_transformers(request)


# -- the model of a configuration ----------------------------------------------------------------------------------------


def _configured(request: Request) -> Planned:
    config = load_config(request.model, list(request.words))
    if config.model.name != "own":
        raise ConfigError(f"{request.model}: only a model from model.build can be planned, not {config.model.name}")
    if config.method not in ("dcft", "equal_displacement", "full", "lora", "lora_dcft"):
        raise ConfigError(f"{request.model}: method {config.method!r} cannot be planned")
    if config.has_adapters and request.engine == "zero3":
        raise ConfigError(f"{request.model}: adapters can be planned under FSDP2, not under ZeRO-3")
    if config.data.modality == "own":
        raise ConfigError(f"{request.model}: batches of data.collate cannot be planned: their sizes are unknown")
    labels = config.data.label if isinstance(config.data.label, list) else [config.data.label]
    names = labels if config.task.kind == "multi_label" else config.data.classes or ["no", "yes"]
    objective = make_objective(config, {"names": names, "mean": 0.0, "std": 1.0, "grades": None})
    no_processor: Any = None
    with without_initialising():
        pretrained = custom_model(config, objective.num_outputs, no_processor, read=False)

    def batch() -> dict[str, Tensor]:
        inputs = example_inputs(config, pretrained.module, request.micro_batch, request.length)
        return {**inputs, "labels": _labels(config, request, objective.num_outputs, inputs)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = pretrained.outputs(model, batch)
        if config.task.kind == "segmentation":  # MONAI's Dice loss reads values, which these tensors do not have
            return functional.cross_entropy(outputs.float(), batch["labels"][:, 0])
        return objective.loss(outputs, batch["labels"])

    eligible = config.importance.eligible
    choose_trained(pretrained, config)
    optimizer = partial(make_optimizer, config=config, rates=rates_of(pretrained, config))
    module, uses_set = pretrained.module, config.method != "lora"
    return Planned(module, pretrained.head, pretrained.blocks, batch, loss, optimizer, eligible, uses_set)


def _labels(config: Config, request: Request, outputs: int, batch: dict[str, Tensor]) -> Tensor:
    """Placeholder labels of a micro-batch for the kind of task."""
    if config.task.kind == "causal_lm":
        return batch["input_ids"]
    if config.task.kind == "segmentation":
        return torch.zeros(batch["image"][:, :1].shape, dtype=torch.int64)
    if config.task.kind == "multi_label":
        return torch.zeros(request.micro_batch, outputs)
    return torch.zeros(request.micro_batch, dtype=torch.float32 if config.task.kind == "regression" else torch.int64)


# -- a model of transformers ---------------------------------------------------------------------------------------------


def _of_transformers(request: Request) -> Planned:
    model = _model(request.model)
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{request.model}: the model has no list of blocks to shard one by one")
    blocks, batch = max(lists, key=len), partial(_batch, model, request)
    return Planned(model, _head(model), blocks, batch, lambda model, batch: model(**batch).loss)


def _model(name: str) -> nn.Module:
    """A model of `MODELS`, or one from a folder with a transformers configuration, with placeholder values."""
    import transformers
    from transformers.models.auto import modeling_auto

    if name in MODELS:
        kind, sizes = MODELS[name]
        config = getattr(transformers, kind)(**sizes)
    elif (Path(name) / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    else:
        raise ConfigError(f"unknown model {name!r}{did_you_mean(name, MODELS)}: use {', '.join(MODELS)}, or a folder "
                          "with a transformers config.json")  # fmt: skip
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto: Any = transformers.AutoModelForCausalLM
    elif config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        auto = transformers.AutoModelForImageClassification
    else:
        raise ConfigError(f"{name}: neither a causal language model nor an image classifier ({config.model_type})")
    with on_meta(), without_initialising():
        model: nn.Module = auto.from_config(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def _head(model: Any) -> str:
    """The name of the classifier, or of the layer that computes scores over the vocabulary."""
    last = getattr(model, "classifier", None) or model.get_output_embeddings()
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    if last not in names:
        raise ConfigError(f"{type(model).__name__}: no classifier and no output embedding, so its head is unknown")
    return names[last]


def _batch(model: nn.Module, request: Request) -> dict[str, Tensor]:
    """A placeholder micro-batch of images or tokens, with labels."""
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 224)
        pixels = torch.zeros(request.micro_batch, config.num_channels, side, side)
        return {"pixel_values": pixels, "labels": torch.zeros(request.micro_batch, dtype=torch.int64)}
    tokens = torch.zeros(request.micro_batch, request.length, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens}
