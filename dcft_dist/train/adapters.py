"""Low-rank adapters of peft (`method = "lora"`), on plain and on sharded models."""

from __future__ import annotations

import math
import re
from collections import Counter

import torch
from torch import nn

from ..config.method import Lora
from ..engines.find import find_engine
from ..engines.names import ParameterNames
from ..engines.whole_tensors import fill_shard
from ..errors import ConfigError, DataError
from ..seeds import seed_of


def insert_adapters(module: nn.Module, head: set[str], settings: Lora) -> None:
    """Gives each linear layer of the body an adapter, and freezes the rest of the body. Call it before wrapping.

    Left out are layers of which the weight is tied to another one, since merging would change that one too, and layers
    inside of `nn.MultiheadAttention`, which reads their weights past the adapter.

    Args:
        module: the model, changed in place; its weights may be on the meta device.
        head: names of the head's weights, which stay trainable.
        settings: rank, alpha and dropout.

    Raises:
        DataError: the package peft is not installed.
        ConfigError: there is no layer to adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DataError("method 'lora' needs the package peft: pip install peft") from error
    linear = _adaptable(module, head)
    if not linear:
        raise ConfigError("method 'lora': the body has no linear layer to adapt")
    pattern = "|".join(map(re.escape, linear))  # of whole names: names in a list also fit others that end like them
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=pattern)
    with torch.random.fork_rng():
        inject_adapter_in_model(config, module)
    torch.backends.mha.set_fastpath_enabled(False)  # it evaluates an encoder layer without its adapters
    for name, parameter in module.named_parameters():  # peft froze everything but its adapters
        if name in head:
            parameter.requires_grad_(True)


def _adaptable(module: nn.Module, head: set[str]) -> list[str]:
    aliases = Counter(ParameterNames.of(module).aliases.values())
    attention = {child for m in module.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
        and m not in attention
        and f"{name}.weight" not in head
        and aliases[f"{name}.weight"] == 1
    ]


def moved_names(module: nn.Module) -> dict[str, str]:
    """Former name -> name of each weight that is in an adapted layer now."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return {name.replace(".base_layer.", "."): name for name in names if ".base_layer." in name}


@torch.no_grad()
def fill_adapters(model: nn.Module, seed: int) -> None:
    """Gives adapters their first values, as peft does: A is uniform in +-1 / sqrt(inputs), B is 0 (Hu et al. 2022).

    They depend on the seed and the names alone: not on the engine, nor on the number of ranks.

    Args:
        model: the wrapped model.
        seed: of the run.
    """
    engine = find_engine(model)
    shapes = engine.full_shapes()
    for shard in engine.shards():
        if ".lora_A." in shard.name:
            generator = torch.Generator().manual_seed(seed_of(seed, shard.name, bits=63))
            whole = torch.empty(shapes[shard.name])
            fill_shard(shard, nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator))
        elif ".lora_B." in shard.name:
            shard.local.zero_()
    engine.publish()


@torch.no_grad()
def merge_adapters(model: nn.Module, module: nn.Module) -> None:
    """Merges the adapters into the weights and removes them, so the weights have their original names again. Collective.

    Args:
        model: the wrapped model.
        module: the unwrapped one, changed in place.
    """
    from peft.tuners.lora import LoraLayer

    find_engine(model).settle()
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, slot = name.rpartition(".")
            setattr(module.get_submodule(parent), slot, layer.get_base_layer())
