"""Low-rank adapters of peft (methods `lora` and `lora_dcft`), on plain and on sharded models."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compat.pytorch import clean
from ..config.method import Lora
from ..distributed import collectives
from ..engines.base import Shard
from ..engines.find import find_engine
from ..engines.names import ParameterNames
from ..engines.whole_tensors import fill_shard, whole_weight
from ..errors import ConfigError, DataError, did_you_mean, listing
from ..models.pretrained import Pretrained
from ..seeds import seed_of
from ..weights.peft_adapter import owners, write_peft_adapter


def insert_adapters(module: nn.Module, head: set[str], settings: Lora) -> None:
    """Gives linear layers of the body adapters, and freezes the rest of the body but `lora.beside`. Call it before wrapping.

    Left out are layers of which the weight is tied to another one, since merging would change that one too, and layers
    inside of `nn.MultiheadAttention`, which reads their weights past the adapter.

    Args:
        module: the model, changed in place; its weights may be on the meta device.
        head: names of the head's weights, which stay trainable.
        settings: rank, alpha and dropout; which layers; and what is trained beside them.

    Raises:
        DataError: the package peft is not installed.
        ConfigError: there is no layer to adapt, or a pattern matches none.
        PatternError: a pattern in `lora.beside` matches nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DataError("adapters need the package peft: pip install peft") from error
    beside = set(ParameterNames.of(module).match(settings.beside, what="lora.beside"))
    linear = _targets(_adaptable(module, head | beside), settings.target_modules)
    if not linear:
        raise ConfigError("adapters: the body has no linear layer to adapt")
    pattern = "|".join(map(re.escape, linear))  # of whole names: names in a list also fit others that end like them
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=pattern)
    with torch.random.fork_rng():
        inject_adapter_in_model(config, module)
    torch.backends.mha.set_fastpath_enabled(False)  # it evaluates an encoder layer without its adapters
    for name, parameter in module.named_parameters():  # peft froze everything but its adapters
        if name in head or name in beside:
            parameter.requires_grad_(True)


def _targets(linear: list[str], patterns: Sequence[str]) -> list[str]:
    """The layers that a pattern names: by the end of the name, as in peft, or as a glob over it. All without patterns.

    Raises:
        ConfigError: a pattern names none.
    """
    named = {p: {n for n in linear if fnmatchcase(n, p) or f".{n}".endswith(f".{p}")} for p in patterns}
    if empty := [pattern for pattern, names in named.items() if not names]:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"lora.target_modules: {empty[0]!r} names no linear layer of the body{did_you_mean(empty[0], ends)}; "
            f"their names end with {listing(ends, 8)}"
        )
    return [name for name in linear if not patterns or any(name in names for names in named.values())]


def _adaptable(module: nn.Module, trained: set[str]) -> list[str]:
    aliases = Counter(ParameterNames.of(module).aliases.values())
    attention = {child for m in module.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    return [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
        and m not in attention
        and f"{name}.weight" not in trained
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
def save_adapters(model: nn.Module, pretrained: Pretrained, settings: Lora, folder: Path) -> None:
    """Writes the adapters, and whatever is trained beside them in the same part of the model, for peft. Collective.

    Call it before they are merged.

    Args:
        model: the wrapped model.
        pretrained: the unwrapped one.
        settings: rank, alpha and dropout.
        folder: folder of the export; each part that has adapters gets a folder `adapter`.
    """
    from peft import LoraConfig

    engine = find_engine(model)
    shapes, shards = engine.full_shapes(), {shard.name: shard for shard in engine.shards()}
    for prefix, part in pretrained.parts.items():
        trained = [n for n, s in shards.items() if s.parameter.requires_grad and n.startswith(prefix)]
        layers = sorted({n.partition(".lora_")[0] for n in trained if ".lora_" in n})
        if not layers:
            continue
        whole = {n: whole_weight(shards[n], shards[n].local).view(shapes[n]).cpu() for n in trained}

        def name_there(name: str, prefix: str = prefix, stem: str = part.stem) -> str:
            return stem + name.removeprefix(prefix).replace(".default.weight", ".weight")

        beside = [name_there(n) for n in trained if ".lora_" not in n]
        with collectives.agreed("write the adapters"):
            if collectives.rank() == 0:
                config = LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.alpha,
                    lora_dropout=settings.dropout,
                    target_modules="|".join(re.escape(name_there(n)) for n in layers),  # whole names
                    modules_to_save=owners(beside) or None,
                )
                tensors = {name_there(n): value for n, value in whole.items()}
                write_peft_adapter(folder / part.folder / "adapter", config, tensors)


@torch.no_grad()
def merge_adapters(model: nn.Module, module: nn.Module) -> None:
    """Merges the adapters into the weights and removes them, so the weights have their original names again. Collective.

    W + scaling x B A (Hu et al. 2022), on each rank's part of W.

    Args:
        model: the wrapped model.
        module: the unwrapped one, changed in place.
    """
    from peft.tuners.lora import LoraLayer

    engine = find_engine(model)
    engine.settle()
    shapes, shards = engine.full_shapes(), {shard.name: shard for shard in engine.shards()}
    for path, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            name = clean(path)
            down, up = (f"{name}.lora_{side}.default.weight" for side in "AB")
            factors = [whole_weight(shards[n], shards[n].local).view(shapes[n]) for n in (up, down)]
            _add_part(shards[f"{name}.base_layer.weight"], layer.scaling["default"], *factors)
            parent, _, slot = path.rpartition(".")
            setattr(module.get_submodule(parent), slot, layer.get_base_layer())
    engine.publish()


def _add_part(shard: Shard, scaling: float, up: Tensor, down: Tensor) -> None:
    """Adds this rank's part of scaling x up x down to a shard, a few rows at a time if the shard is flat."""
    target, columns = shard.local.detach(), down.shape[1]
    if shard.box.first is None:
        whole = scaling * (up @ down)
        target.add_(whole[shard.box.slices()].view(target.shape))
        return
    first, last = shard.box.first, shard.box.first + shard.box.numel
    rows = slice(first // columns, -(-last // columns))
    part = (scaling * (up[rows] @ down)).reshape(-1)[first - rows.start * columns :][: shard.box.numel]
    target.add_(part.to(target.dtype).view(target.shape))
