"""A sparse fine-tuning as a SHiRA adapter of peft (Bhardwaj et al. 2024): the changed weights of each linear layer.

peft gives every layer of an adapter r x (inputs + outputs) entries, with one r for all. So r follows from the layer with the
most changes for its size, and layers with fewer are padded with entries of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..errors import CheckpointError, DataError, listing
from ..weights.peft_adapter import owners, write_peft_adapter
from .delta import Weights

_INSTEAD = "`dcft delta` keeps any change"


@dataclass(frozen=True)
class ShiraSize:
    """What an adapter contains.

    Attributes:
        entries: entries of all layers together.
        changed: those that are not padding.
        rank: peft's `r`.
        layers: number of adapted layers.
        num_bytes: size of the file of weights.
    """

    entries: int
    changed: int
    rank: int
    layers: int
    num_bytes: int


def write_shira(config: Config, facts: Mapping[str, Any], adapted: Path, folder: Path) -> ShiraSize:
    """Writes the changes of a run's exported model as an adapter for the pre-trained model of its library.

    Other weights than those of linear layers are stored whole, with their modules (`modules_to_save`). A head that this
    package has put on the model is no part of the library's model, and stays in the export.

    Args:
        config: configuration of the run.
        facts: what the objective needs to know of the training labels; see `objectives.make.label_facts`.
        adapted: folder with the exported model.
        folder: folder to write.

    Raises:
        CheckpointError: the export is damaged; or nothing has changed; or the bias of an adapted layer has changed, which an
            adapter cannot have; or too many weights of a layer have.
        DataError: the package peft is not installed.
    """
    try:
        from peft import ShiraConfig
    except ImportError as error:
        raise DataError("a SHiRA adapter needs the package peft: pip install peft") from error
    before = Weights.before(config, facts)
    after = before.after(config, facts, adapted)
    prefix = next(iter(before.pretrained.parts))  # the part that the library reads
    layers = {name: m for name, m in before.pretrained.module.named_modules() if isinstance(m, nn.Linear)}
    parameters = dict(before.pretrained.module.named_parameters())
    sparse: dict[str, Tensor] = {}  # layer -> what its weight has gained
    whole: dict[str, Tensor] = {}
    for name, value in after.tensors.items():
        layer, _, slot = name.rpartition(".")
        if not name.startswith(prefix) or (name not in before.fresh and torch.equal(before.tensors[name], value)):
            continue
        if slot == "weight" and layer in layers and name not in before.fresh:
            sparse[layer] = value - before.tensors[name]
        elif name in parameters:
            whole[name] = value
    if not sparse:
        raise CheckpointError(f"{config.name} has changed no weight of a linear layer: {_INSTEAD}")
    if biases := [f"{layer}.bias" for layer in sparse if f"{layer}.bias" in whole]:
        raise CheckpointError(
            f"{config.name} has changed {listing(biases, 2)}, which a SHiRA adapter cannot have beside the weights: train "
            f"with penalty.unscored_factor = 0. {_INSTEAD}"
        )
    rank = max(-(-int((gain != 0).sum()) // sum(gain.shape)) for gain in sparse.values())
    if full := [layer for layer, gain in sparse.items() if rank * sum(gain.shape) > gain.numel()]:
        raise CheckpointError(
            f"too many weights have changed for peft's SHiRA: rank {rank}, which one layer needs, is more than all of "
            f"{listing(full, 2)}. {_INSTEAD}"
        )
    tensors = {name.removeprefix(prefix): value for name, value in whole.items()}
    for layer, gain in sparse.items():
        indices, values = _entries(gain, rank)
        tensors |= {f"{layer.removeprefix(prefix)}.shira_{key}": v for key, v in (("indices", indices), ("weight", values))}
    config_there = ShiraConfig(
        r=rank,
        target_modules=[layer.removeprefix(prefix) for layer in sparse],
        modules_to_save=owners(name.removeprefix(prefix) for name in whole) or None,
    )
    changed = sum(int((gain != 0).sum()) for gain in sparse.values())
    entries = sum(rank * sum(gain.shape) for gain in sparse.values())
    return ShiraSize(entries, changed, rank, len(sparse), write_peft_adapter(folder, config_there, tensors))


def _entries(gain: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Places [2, entries] in the rows and columns of a weight, and what is added there; 0 at the padding."""
    flat = gain.reshape(-1)
    changed, others = (flat != 0).nonzero().view(-1), (flat == 0).nonzero().view(-1)
    places = torch.cat([changed, others[: rank * sum(gain.shape) - len(changed)]]).sort().values
    rows, columns = places // gain.shape[1], places % gain.shape[1]
    return torch.stack([rows, columns]).int(), flat[places]
