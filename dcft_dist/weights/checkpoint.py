"""Sharded checkpoints with checksums, written atomically by torch.distributed.checkpoint as safetensors, without pickle.

A checkpoint stores weights, buffers and the optimizer's state by parameter name, flattened, each element once. So any engine
on any number of ranks can read it, whichever wrote it.

A checkpoint is a folder `step_00000100`: safetensors files of all ranks, `state.json`, and `manifest.json`, which has the
folder's name, the settings of its run, and size and SHA-256 of each file. It is written under a temporary name, and renamed
when all ranks are done. So a folder with its final name is complete; the next save deletes an interrupted one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from ..errors import CheckpointError, DamagedError, DivergedError, TemporaryError, line_of, listing
from ..files import read_json, sha256_of, write_json

log = logging.getLogger(__name__)

_STATE, _MANIFEST, _FORMAT = "state.json", "manifest.json", 2

ASIDE = ".aside"  # end of the name of a checkpoint while it is replaced


State = dict[str, Any]


class FlatPiece:
    """A contiguous piece of a flattened tensor, in the form that torch.distributed.checkpoint can write and read.

    Args:
        values: this rank's elements, flat.
        numel: number of elements of the whole tensor.
        begin: index of the first element of `values` in the whole tensor.
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
        entry = self.state_dict[index.fqn]
        return entry.values if isinstance(entry, FlatPiece) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: State, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The parent's method would replace everything that is not a tensor by None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        entry = self.state_dict[index.fqn]
        return entry.values if isinstance(entry, FlatPiece) else super().lookup_tensor(index)


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """The tensors that a checkpoint stores, each element on the rank that owns it. Collective.

    Args:
        model: the wrapped model.
        optimizer: its optimizer; None: only weights and buffers.

    Returns:
        Name (`model.<weight>`, `buffer.<buffer>`, `optimizer.<weight>.<key>`) -> piece or tensor, for `save_checkpoint`.

    Raises:
        CheckpointError: an entry of the optimizer's state is not a tensor.
    """
    engine = find_engine(model)
    state: State = {f"buffer.{name}": b for name, b in _buffers(engine)}
    for shard in engine.shards():
        state[f"model.{shard.name}"] = _owned(shard, shard.local)
        optimizer_state = optimizer.state.get(shard.parameter, {}) if optimizer is not None else {}
        for key, value in optimizer_state.items():
            name = f"optimizer.{shard.name}.{key}"
            if isinstance(value, Tensor):
                state[name] = value.clone() if value.ndim == 0 else _owned(shard, shard.within(value))
            elif value is not None:
                raise CheckpointError(f"optimizer state {key} of {shard.name} is a {type(value).__name__}, not a tensor")
    return state


def _buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    return ((clean(name), b) for name, b in engine.module.named_buffers() if b is not None)


def _owned(shard: Shard, values: Tensor) -> FlatPiece:
    """The piece of a tensor laid out like the shard that this rank stores. Collective if the shard is not contiguous."""
    first, numel = shard.box.first, prod(shard.box.grid)
    if first is None:  # not a contiguous range: gather the whole tensor, then store an equal part of it
        whole = whole_weight(shard, values)
        ranks, rank = collectives.world_size(), collectives.rank()
        begin, end = numel * rank // ranks, numel * (rank + 1) // ranks
        return FlatPiece(whole[begin:end].clone(), numel, begin)
    begin, end = shard.owned
    return FlatPiece(values.detach().reshape(-1)[begin:end], numel, first + begin)


def save_checkpoint(folder: Path, tensors: State, state: dict[str, Any], identity: Mapping[str, Any] | None = None) -> None:
    """Writes one checkpoint, which gets its final name only when it is complete. Collective.

    Args:
        folder: folder of the checkpoint; replaced if it exists.
        tensors: made by `model_state`.
        state: further values for `state.json`.
        identity: settings of the run, which `read_state` compares; keys with their default values may be left out.

    Raises:
        DivergedError: a weight, a buffer or the optimizer's state is not finite. Nothing was written.
        TemporaryError: the file system failed; running again may help.
    """
    require_finite(tensors)
    temporary = temporary_folder(folder)
    write_tensors(temporary, tensors)
    with collectives.agreed("checkpoint: rename the folder"):
        if collectives.rank() == 0:
            publish(temporary, folder, state, identity)


def temporary_folder(folder: Path, keep: Collection[Path] = ()) -> Path:
    """Makes the folder in which a checkpoint is written, and deletes those of interrupted saves. Collective.

    Args:
        folder: final folder of the checkpoint.
        keep: temporary folders that are in use.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with collectives.agreed("checkpoint: prepare the folder"):
        if collectives.rank() == 0:
            for leftover in set(folder.parent.glob(".*.tmp")) - set(keep):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
    return temporary


def write_tensors(temporary: Path, tensors: State, group: dist.ProcessGroup | None = None) -> None:
    """Writes this rank's tensors; returns when all ranks have written theirs. Collective.

    Args:
        temporary: made by `temporary_folder`.
        tensors: made by `model_state`.
        group: process group to communicate in; None: the default one.

    Raises:
        TemporaryError: the file system failed; running again may help.
    """
    storage = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    with _guarded("write", temporary):
        dcp.save(tensors, storage_writer=storage, planner=_SavePlanner(), process_group=group)


def publish(temporary: Path, folder: Path, state: dict[str, Any], identity: Mapping[str, Any] | None) -> None:
    """Writes state and checksums, and gives a checkpoint its final name. Rank 0 calls it when all ranks have written.

    Args:
        temporary: where the checkpoint was written.
        folder: final folder; replaced if it exists.
        state, identity: as for `save_checkpoint`.
    """
    write_json(temporary / _STATE, state)
    files = sorted(file for file in temporary.iterdir() if file.is_file())
    entries = {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    about = {"format": _FORMAT, "name": folder.name, "identity": dict(identity or {}), "files": entries}
    write_json(temporary / _MANIFEST, about)
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    if folder.exists():  # it has its place until the new one has
        folder.rename(aside)
    temporary.rename(folder)
    if aside.exists():
        shutil.rmtree(aside)


def bring_back(checkpoints: Path) -> None:
    """After a start that ended while it replaced a checkpoint: gives the former one its name again. One process calls it.

    Args:
        checkpoints: the folder of all checkpoints; need not exist.
    """
    for aside in checkpoints.glob(f".*{ASIDE}"):
        folder = aside.with_name(aside.name.removesuffix(ASIDE)[1:])
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


def require_finite(tensors: State) -> None:
    """Checks that no NaN or infinity would be saved. Buffers may be infinite, as masks of attention are. Collective.

    Args:
        tensors: made by `model_state`.

    Raises:
        DivergedError: there is one; the message names the first weight.
    """
    with collectives.agreed("checkpoint: numbers"):
        for name, entry in tensors.items():
            values = (entry.values if isinstance(entry, FlatPiece) else entry).detach()
            if not (values.is_floating_point() or values.is_complex()):
                continue
            wrong = torch.isnan(values) if name.startswith("buffer.") else ~torch.isfinite(values)
            if number := int(wrong.sum()):
                kind, _, rest = name.partition(".")
                what = {"model": f"weight {rest}", "buffer": f"buffer {rest}"}.get(kind, f"optimizer's state {rest}")
                raise DivergedError(f"{number} elements of the {what} are NaN or infinite: nothing was saved")


def damage_in(folder: Path) -> str:
    """Compares a checkpoint's files with its checksums, each rank some of them. Collective.

    Args:
        folder: folder of the checkpoint.

    Returns:
        What is damaged, the same text on every rank; empty if the checkpoint is whole.
    """
    problem = ""
    try:
        for name, entry in sorted(_manifest(folder)["files"].items())[collectives.rank() :: collectives.world_size()]:
            if sha256_of(folder / name) != entry["sha256"]:
                raise DamagedError(f"{folder / name} was altered after it was written")
        read_json(folder / _STATE)
    except (OSError, DamagedError) as error:
        problem = str(error)
    found = collectives.all_gather_ints([int(bool(problem))], what=f"checkpoint {folder.name}: verify")
    first = next((rank for rank, (damaged,) in enumerate(found) if damaged), None)
    return "" if first is None else collectives.broadcast_text(problem, first, what=f"checkpoint {folder.name}: verify")


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there in full length. No communication; their contents are not read."""
    try:
        found = [(entry, (folder / name).stat().st_size) for name, entry in _manifest(folder)["files"].items()]
    except (OSError, DamagedError):
        return False
    return all(entry.get("size", size) == size for entry, size in found)


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked for its form.

    Raises:
        DamagedError: it is damaged, it belongs to another folder, or a file of weights is not in it.
        OSError: it cannot be read.
    """
    path = folder / _MANIFEST
    content = read_json(path)
    if isinstance(content, dict) and content and "format" not in content:  # before version 2: file -> checksum
        content = {"name": folder.name, "identity": None, "files": {n: {"sha256": s} for n, s in content.items()}}
    if not isinstance(content, dict) or not isinstance(files := content.get("files"), dict) or _STATE not in files:
        raise DamagedError(f"{path} is damaged (it does not list the files)")
    if any(Path(name).name != name or not isinstance(entry, dict) or "sha256" not in entry for name, entry in files.items()):
        raise DamagedError(f"{path} is damaged (a file has no checksum)")
    if content["name"] != folder.name:
        raise DamagedError(f"{folder} is the checkpoint {content['name']} under another name")
    if strange := {file.name for file in folder.glob("*.safetensors")} ^ {n for n in files if n.endswith(".safetensors")}:
        raise DamagedError(f"{folder}: {listing(sorted(strange))} is missing, or was added after the checkpoint was written")
    return content


def read_state(folder: Path, identity: Mapping[str, Any] | None = None, verified: bool = False) -> dict[str, Any]:
    """Checks a checkpoint's checksums, each rank some of the files, and reads its `state.json`. Collective.

    Args:
        folder: folder of the checkpoint.
        identity: settings that the checkpoint must have been saved with; None: they are not compared.
        verified: whether `damage_in` has just found no damage.

    Raises:
        CheckpointError: a file is missing or was altered, or another run has written it.
    """
    if problem := "" if verified else damage_in(folder):
        raise CheckpointError(problem)
    with collectives.agreed(f"checkpoint {folder.name}: read"):
        stored = _manifest(folder)["identity"]
        if identity is not None and stored is None:
            log.warning("%s is from an older version: it does not say which run it belongs to", folder)
        elif identity is not None:
            both = sorted(stored.keys() | identity.keys())
            changed = [key for key in both if stored.get(key) != identity.get(key)]
            if changed:
                said = (f"{k} = {stored.get(k, 'default')}, not {identity.get(k, 'default')}" for k in changed)
                raise CheckpointError(f"{folder} belongs to another run: it was saved with {listing(said, 3)}")
        state: dict[str, Any] = read_json(folder / _STATE)
    return state


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads a checkpoint into a prepared model, whichever engine and number of ranks wrote it. Collective.

    If several weights share one flat parameter, its step count is the largest of theirs.

    Args:
        folder: folder of the checkpoint.
        model: the wrapped model; its weights and buffers are changed.
        optimizer: its optimizer, which gets the stored state; None: that state is not read.

    Raises:
        CheckpointError: the checkpoint does not have the weights of this model, or cannot be read.
    """
    engine = find_engine(model)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    shards = engine.shards()
    targets = [(f"model.{shard.name}", shard, shard.local) for shard in shards]
    missing = [name for name, *_ in targets if name not in stored]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]} and {len(missing) - 1} more: it belongs to another model")
    requested: State = {f"buffer.{name}": b for name, b in _buffers(engine) if f"buffer.{name}" in stored}
    scalars: list[tuple[Tensor, Tensor]] = []
    if optimizer is not None:
        for shard, key, name in _stored_optimizer_state(shards, stored):
            tensor = _state_tensor(optimizer, shard, key, stored[name])
            if tensor.ndim:
                targets.append((name, shard, shard.within(tensor)))
            else:
                requested[name] = torch.zeros_like(tensor)
                scalars.append((tensor, requested[name]))
    not_contiguous = []
    for name, shard, values in targets:
        first, numel = shard.box.first, prod(shard.box.grid)
        if first is None:
            whole = torch.zeros(numel, dtype=values.dtype, device=values.device)
            not_contiguous.append((whole, shard, values))
            requested[name] = FlatPiece(whole, numel, 0)
        else:
            requested[name] = FlatPiece(values.detach().view(-1), numel, first)
    with _guarded("read", folder):
        dcp.load(requested, storage_reader=reader, planner=_LoadPlanner(flatten_state_dict=False))
    for whole, shard, values in not_contiguous:
        values.detach().copy_(whole.view(shard.box.grid)[shard.box.slices()])
    for tensor, value in scalars:
        tensor.copy_(torch.maximum(tensor, value))
    engine.publish()


def _stored_optimizer_state(shards: list[Shard], stored: Any) -> Iterator[tuple[Shard, str, str]]:
    """(shard, key, name in the checkpoint) of each stored entry of the optimizer's state for these weights."""
    by_name = {shard.name: shard for shard in shards}
    for full_name in stored:
        kind, _, rest = full_name.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "optimizer" and name in by_name:
            yield by_name[name], key, full_name


def _state_tensor(optimizer: torch.optim.Optimizer, shard: Shard, key: str, meta: Any) -> Tensor:
    """The entry `key` of the optimizer's state, created if absent: a scalar, or like its parameter (see `meta`)."""
    state = optimizer.state[shard.parameter]
    if key not in state:
        dtype = meta.properties.dtype
        like = shard.parameter.detach()
        state[key] = torch.zeros_like(like, dtype=dtype) if len(meta.size) else torch.zeros((), dtype=dtype)
    tensor: Tensor = state[key]
    return tensor


@contextmanager
def _guarded(action: str, folder: Path) -> Iterator[None]:
    """Silences the library's warnings, and turns its exception (a BaseException) into an error of this package.

    A failed "write" becomes a TemporaryError, since the file system may have failed; a failed "read" a CheckpointError.
    """
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with collectives.explained(f"checkpoint: {action}"):
            yield
    except dcp.api.CheckpointException as error:
        causes = "; ".join(f"rank {r}: {type(e[0]).__name__}: {line_of(e[0])}" for r, e in sorted(error.failures.items()))
        kind = TemporaryError if action == "write" else CheckpointError
        raise kind(f"{folder}: cannot {action} the checkpoint: {causes}") from error
    finally:
        logger.setLevel(level)
