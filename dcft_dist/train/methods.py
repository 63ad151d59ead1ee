"""What tells the methods of the trainer apart: which weights are trained, and what happens around a step."""

from __future__ import annotations

import torch
from torch import nn

from ..config.method import Lora
from ..config.schema import Config
from ..controls.step_controls import EqualDisplacement, PullToStart
from ..engines.prepared import Prepared
from ..errors import DataError
from ..method.fundamental_set import FundamentalSet
from ..method.penalty import Penalty, attach_penalty
from ..models.pretrained import Pretrained


def choose_trained(pretrained: Pretrained, config: Config) -> None:
    """Freezes what the method does not train, or puts adapters into the body; before the model is wrapped."""
    head = set(pretrained.head_names)
    if config.method == "bitfit":
        for name, parameter in pretrained.module.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name in head)
    elif config.method == "lora":
        _insert_adapters(pretrained.module, head, config.lora, config.seed)


def depths(pretrained: Pretrained) -> dict[str, int]:
    """Block of each body weight, counted from the top: what lies above all blocks counts with the last, what lies below them
    comes after the first."""
    blocks, head = pretrained.blocks, set(pretrained.head_names)
    inside = {id(p): len(blocks) - 1 - i for i, block in enumerate(blocks) for p in block.parameters()}
    found, depth = {}, len(blocks)
    for name, parameter in pretrained.module.named_parameters():
        if name not in head:
            depth = inside.get(id(parameter), 0 if depth < len(blocks) else depth)
            found[name] = depth
    return found


def begin(prepared: Prepared, fundamental: FundamentalSet | None, config: Config, head: tuple[str, ...]) -> Penalty | None:
    """Puts in force what the method does around each step; returns the penalty if that is it. Collective."""
    settings, penalty = config.penalty, None
    factors = {"rest_factor": settings.rest_factor, "unscored_factor": settings.unscored_factor}
    if fundamental is not None and config.method == "equal_displacement":
        EqualDisplacement(prepared.model, fundamental, settings.factor, optimizer=prepared.optimizer, **factors)
    elif fundamental is not None:
        penalty = attach_penalty(
            prepared.model,
            fundamental,
            settings.factor,
            optimizer=prepared.optimizer,
            level=settings.level,
            where=settings.where,
            mask_placement=settings.mask_placement,
            **factors,
        )
    if config.optimizer.pull_to_start:
        PullToStart(prepared.model, head, config.optimizer.pull_to_start, prepared.optimizer)
    return penalty


def _insert_adapters(module: nn.Module, head: set[str], settings: Lora, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DataError("method 'lora' needs the package peft: pip install peft") from error
    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in head]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=linear)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():  # peft has frozen all but its own
        if name in head:
            parameter.requires_grad_(True)


def merge_adapters(module: nn.Module) -> None:
    """Adds the adapters to the weights they adapt, and takes them out: the body has its own names again."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, layer.get_base_layer())
