"""Checkpoints by torch.distributed.checkpoint in its safetensors format: sharded, checksummed, atomic, without pickle.

A checkpoint is a folder `step_00000100`: safetensors files of all ranks, `state.json`, and `manifest.json` with the
SHA-256 of each file. It is written under a temporary name and renamed when it is complete on every rank, so a folder
with its final name is whole; an interrupted one is swept away by the next save.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from . import collectives
from .engines import find_engine
from .errors import CheckpointError
from .files import read_json, sha256_of, write_json

_STATE, _MANIFEST = "state.json", "manifest.json"


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by canonical name; tied weights once."""
    tensors: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in find_engine(module).names.parameters.items()}
    tensors.update({f"buffer.{n}": b for n, b in module.named_buffers() if b is not None})
    return tensors


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name and key. All of it must be tensors, as in torch's optimizers."""
    tensors = {}
    for name, parameter in find_engine(module).names.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            elif value is not None:
                raise CheckpointError(f"optimizer state {key} of {name} is a {type(value).__name__}, not a tensor")
    return tensors


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes one checkpoint; it has its final name only once it is whole. Collective."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with collectives.agreed("checkpoint: make room"):
        if collectives.rank() == 0:
            for leftover in folder.parent.glob(".*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
    with _guarded("write", temporary):
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    with collectives.agreed("checkpoint: complete"):
        if collectives.rank() == 0:
            write_json(temporary / _STATE, state)
            files = sorted(f for f in temporary.iterdir() if f.is_file())
            write_json(temporary / _MANIFEST, {f.name: sha256_of(f) for f in files})
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Checks the checksums (each rank some of the files) and returns `state.json`. Collective.

    Raises:
        CheckpointError: a file is missing or was altered.
    """
    with collectives.agreed(f"checkpoint {folder.name}: verify"):
        try:
            manifest = read_json(folder / _MANIFEST)
            for name, checksum in sorted(manifest.items())[collectives.rank() :: collectives.world_size()]:
                if sha256_of(folder / name) != checksum:
                    raise CheckpointError(
                        f"{folder / name} was altered after it was written: delete {folder} to go on without it"
                    )
            state: dict[str, Any] = read_json(folder / _STATE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}): delete it to go on without it") from error
    return state


def load_tensors(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads weights, buffers and, if given, the optimizer's state into a prepared model. Collective; any number of ranks.

    Raises:
        CheckpointError: the checkpoint has not the weights of this model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    wanted = model_tensors(module)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]} and {len(missing) - 1} more: it is of another model")
    if optimizer is not None:
        wanted.update(_empty_optimizer_state(module, optimizer, stored))
    with _guarded("read", folder):
        dcp.load(wanted, storage_reader=reader)


def _empty_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, stored: Any) -> dict[str, Tensor]:
    """Makes the optimizer's state tensors as the checkpoint has them, sharded as their parameters are."""
    tensors: dict[str, Tensor] = {}
    parameters = find_engine(module).names.parameters
    for full_name, meta in stored.items():
        kind, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if kind != "optimizer" or name not in parameters:
            continue
        parameter = parameters[name]
        dtype = meta.properties.dtype
        if tuple(meta.size) == tuple(parameter.shape):
            value = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:
            value = torch.zeros(meta.size, dtype=dtype)
        optimizer.state[parameter][key] = value
        tensors[full_name] = value
    return tensors


@contextmanager
def _guarded(what: str, folder: Path) -> Iterator[None]:
    """Quiet about the library's own format; its exception, which is a BaseException, becomes a CheckpointError."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with collectives.explained(f"checkpoint: {what}"):
            yield
    except dcp.api.CheckpointException as error:
        causes = "; ".join(f"rank {r}: {_last_line(e[0])}" for r, e in sorted(error.failures.items()))
        raise CheckpointError(f"{folder}: cannot {what} the checkpoint: {causes}") from error
    finally:
        logger.setLevel(level)


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
