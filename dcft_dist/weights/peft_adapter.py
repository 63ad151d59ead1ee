"""Folders of adapters as peft reads them: `PeftModel.from_pretrained(base, folder)`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_atomic
from .export import write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # peft's, before the names of the base model


def write_peft_adapter(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> int:
    """Writes an adapter. One process calls it.

    Args:
        folder: made if absent.
        config: peft's configuration of the adapter.
        tensors: name in the base model, such as `layers.0.q_proj.lora_A.weight` -> tensor.

    Returns:
        Bytes of the file of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    values["peft_type"], values["inference_mode"] = config.peft_type.value, True
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")
    return (folder / WEIGHTS).stat().st_size


def owners(names: Iterable[str]) -> list[str]:
    """Modules that own these weights, for `modules_to_save`, sorted."""
    return sorted({name.rpartition(".")[0] for name in names})
