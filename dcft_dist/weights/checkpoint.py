"""Checkpoints by torch.distributed.checkpoint in its safetensors format: sharded, checksummed, atomic, without pickle.

Weights, buffers and the optimizer's state are stored by parameter name, flattened, each element once. So a checkpoint can be
read under any engine and any number of ranks, whichever wrote it.

A checkpoint is a folder `step_00000100`: safetensors files of all ranks, `state.json`, and `manifest.json` with the
SHA-256 of each file. It is written under a temporary name and renamed when it is complete on every rank, so a folder
with its final name is whole; an interrupted one is swept away by the next save.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..compat.pytorch import clean
from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.find import find_engine
from ..engines.whole_tensors import whole_weight
from ..errors import CheckpointError, PassingError, line_of
from ..files import read_json, sha256_of, write_json

_STATE, _MANIFEST = "state.json", "manifest.json"


State = dict[str, Any]


class FlatPiece:
    """`values`: the elements from `begin` on of a flattened tensor of `numel` elements.

    Tells torch.distributed.checkpoint what there is to write and to read as a DTensor does.
    """

    def __init__(self, values: Tensor, numel: int, begin: int) -> None:
        self.values, self.numel, self.begin = values, numel, begin

    def size(self) -> torch.Size:
        return torch.Size([self.numel])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        chunk = ChunkStorageMetadata(torch.Size([self.begin]), torch.Size([self.values.numel()]))
        return [chunk] if self.values.numel() else []

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.values)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.values if isinstance(found, FlatPiece) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: State, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # Its own way puts None in the place of everything that is no tensor.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.values if isinstance(found, FlatPiece) else super().lookup_tensor(index)


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """What a checkpoint holds of a model and, if given, its optimizer: each element on the rank that owns it."""
    engine = find_engine(model)
    state: State = {f"buffer.{name}": b for name, b in _buffers(engine)}
    for shard in engine.shards():
        state[f"model.{shard.name}"] = _owned(shard, shard.local)
        kept = optimizer.state.get(shard.parameter, {}) if optimizer is not None else {}
        for key, value in kept.items():
            name = f"optimizer.{shard.name}.{key}"
            if isinstance(value, Tensor):
                state[name] = value.clone() if value.ndim == 0 else _owned(shard, shard.within(value))
            elif value is not None:
                raise CheckpointError(f"optimizer state {key} of {shard.name} is a {type(value).__name__}, not a tensor")
    return state


def _buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((clean(name), b) for name, b in engine.module.named_buffers() if b is not None)


def _owned(shard: Shard, values: Tensor) -> FlatPiece:
    first, numel = shard.box.first, prod(shard.box.grid)
    if first is None:  # no contiguous range: put together, then shared out again
        whole = whole_weight(shard, values)
        ranks, rank = collectives.world_size(), collectives.rank()
        begin, end = numel * rank // ranks, numel * (rank + 1) // ranks
        return FlatPiece(whole[begin:end].clone(), numel, begin)
    begin, end = shard.owned
    return FlatPiece(values.detach().reshape(-1)[begin:end], numel, first + begin)


def save_checkpoint(folder: Path, tensors: State, state: dict[str, Any]) -> None:
    """Writes one checkpoint; it has its final name only once it is whole. Collective."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with collectives.agreed("checkpoint: make room"):
        if collectives.rank() == 0:
            for leftover in folder.parent.glob(".*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
    with _guarded("write", temporary):
        dcp.save(
            tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True), planner=_SavePlanner()
        )
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


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads weights, buffers and, if given, the optimizer's state into a prepared model. Collective.

    Whatever engine and number of ranks wrote it. Where several weights share one flat parameter, its step count is the
    largest of theirs.

    Raises:
        CheckpointError: the checkpoint has not the weights of this model.
    """
    engine = find_engine(model)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    shards = engine.shards()
    targets = [(f"model.{shard.name}", shard, shard.local) for shard in shards]
    missing = [name for name, *_ in targets if name not in stored]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]} and {len(missing) - 1} more: it is of another model")
    wanted: State = {f"buffer.{name}": b for name, b in _buffers(engine) if f"buffer.{name}" in stored}
    scalars: list[tuple[Tensor, Tensor]] = []
    if optimizer is not None:
        for shard, key, name in _stored_optimizer_state(shards, stored):
            made = _state_tensor(optimizer, shard, key, stored[name])
            if made.ndim:
                targets.append((name, shard, shard.within(made)))
            else:
                wanted[name] = torch.zeros_like(made)
                scalars.append((made, wanted[name]))
    scattered = []
    for name, shard, values in targets:
        first, numel = shard.box.first, prod(shard.box.grid)
        if first is None:
            whole = torch.zeros(numel, dtype=values.dtype, device=values.device)
            scattered.append((whole, shard, values))
            wanted[name] = FlatPiece(whole, numel, 0)
        else:
            wanted[name] = FlatPiece(values.detach().view(-1), numel, first)
    with _guarded("read", folder):
        dcp.load(wanted, storage_reader=reader, planner=_LoadPlanner(flatten_state_dict=False))
    for whole, shard, values in scattered:
        values.detach().copy_(whole.view(shard.box.grid)[shard.box.slices()])
    for made, read in scalars:
        made.copy_(torch.maximum(made, read))
    engine.publish()


def _stored_optimizer_state(shards: list[Shard], stored: Any) -> Iterator[tuple[Shard, str, str]]:
    """(shard, key, name in the checkpoint) of all optimizer state there is for these weights."""
    by_name = {shard.name: shard for shard in shards}
    for full_name in stored:
        kind, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "optimizer" and name in by_name:
            yield by_name[name], key, full_name


def _state_tensor(optimizer: torch.optim.Optimizer, shard: Shard, key: str, meta: Any) -> Tensor:
    """The optimizer's tensor of that key, made as the checkpoint has it: a number, or laid out as its parameter is."""
    state = optimizer.state[shard.parameter]
    if key not in state:
        dtype = meta.properties.dtype
        like = shard.parameter.detach()
        state[key] = torch.zeros_like(like, dtype=dtype) if len(meta.size) else torch.zeros((), dtype=dtype)
    made: Tensor = state[key]
    return made


@contextmanager
def _guarded(what: str, folder: Path) -> Iterator[None]:
    """Quiet about the library's own format; its exception, a BaseException, becomes a CheckpointError, or, where a file
    system may have failed, a PassingError."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with collectives.explained(f"checkpoint: {what}"):
            yield
    except dcp.api.CheckpointException as error:
        causes = "; ".join(f"rank {r}: {type(e[0]).__name__}: {line_of(e[0])}" for r, e in sorted(error.failures.items()))
        kind = PassingError if what == "write" else CheckpointError
        raise kind(f"{folder}: cannot {what} the checkpoint: {causes}") from error
    finally:
        logger.setLevel(level)
