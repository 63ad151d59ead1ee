"""Sharded checkpoints with checksums, published whole.

A checkpoint stores weights, buffers and the optimizer's state by parameter name, flattened, each element once. So any engine
on any number of ranks can read it, whichever wrote it.

A checkpoint is a folder `step_00000100`: safetensors files of all ranks (`shard_files`), `state.json`, and `manifest.json`,
which has the folder's name, the settings of its run, and size and SHA-256 of each file. It is written under a temporary
name, and renamed when all ranks are done. So a folder with its final name is complete; the next save deletes an interrupted
one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compat.pytorch import clean
from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.find import find_engine
from ..engines.whole_tensors import whole_weight
from ..errors import CheckpointError, DamagedError, DcftError, DivergedError, TemporaryError, line_of, listing
from ..files import read_json, sha256_of, write_json
from .shard_files import FlatPiece, ShardReader, State, shard_file_name, write_shard_file

log = logging.getLogger(__name__)

_STATE, _MANIFEST = "state.json", "manifest.json"

_FORMAT = 3  # since 3, the file of a rank has all that this rank needs to go on, but for the buffers

_NUMBER = "#"  # in the name of an entry of the optimizer's state that is a number of Python, before its type

_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.uint8),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}

Files = dict[str, dict[str, Any]]  # name of a file -> its size in bytes, and its SHA-256

VISIBLE_S = 60.0  # seconds that a network file system may take to show one node what another has written

ASIDE = ".aside"  # end of the name of a checkpoint while it is replaced


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, frozen: bool = True) -> State:
    """The tensors that a checkpoint stores, each element on the rank that owns it. Collective.

    Args:
        model: the wrapped model.
        optimizer: its optimizer; None: only weights and buffers.
        frozen: whether weights that are not trained are stored; without, who loads the checkpoint must have them.

    Returns:
        Name (`model.<weight>`, `buffer.<buffer>`, `optimizer.<weight>.<key>`) -> piece or tensor, for `save_checkpoint`.

    Raises:
        CheckpointError: an entry of the optimizer's state is neither a tensor nor a number.
    """
    engine = find_engine(model)
    state: State = {f"buffer.{name}": b for name, b in _buffers(engine)}
    for shard in engine.shards():
        if not (frozen or shard.parameter.requires_grad):
            continue
        piece = state[f"model.{shard.name}"] = _owned(shard, shard.local)
        optimizer_state = optimizer.state.get(shard.parameter, {}) if optimizer is not None else {}
        for key, value in optimizer_state.items():
            name = f"optimizer.{shard.name}.{key}"
            if isinstance(value, Tensor):
                if value.ndim:
                    state[name] = _owned(shard, shard.within(value))
                elif piece.values.numel():  # beside every piece, so that a rank finds it in its own file
                    state[name] = value.clone()
            elif isinstance(value, int | float):  # also True and False
                if piece.values.numel():
                    kind = next(kind for kind in _NUMBERS if isinstance(value, _NUMBERS[kind][0]))
                    state[f"{name}{_NUMBER}{kind}"] = torch.tensor(value, dtype=_NUMBERS[kind][1])
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
    check_tensors(tensors)
    temporary = temporary_folder(folder)
    files = write_tensors(temporary, tensors)
    with collectives.agreed("checkpoint: rename the folder"):
        if collectives.rank() == 0:
            publish(temporary, folder, state, identity, files, sizes_of(tensors))


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


def write_tensors(temporary: Path, tensors: State, group: dist.ProcessGroup | None = None) -> Files:
    """Writes this rank's tensors; returns when all ranks have written theirs. Collective.

    Args:
        temporary: made by `temporary_folder`.
        tensors: made by `model_state`.
        group: process group to communicate in; None: the default one.

    Returns:
        The files of all ranks.

    Raises:
        TemporaryError: the file system failed; running again may help.
    """
    with collectives.agreed("checkpoint: write", group):
        mine = write_mine(temporary, tensors)
    return files_of_all(mine, group)


def write_mine(folder: Path, tensors: State) -> Path | None:
    """Writes the file of this rank. No communication.

    Args:
        folder: where.
        tensors: made by `model_state`.

    Raises:
        TemporaryError: the file system failed; running again may help.
    """
    rank = collectives.rank()
    try:
        return write_shard_file(folder, tensors, rank)
    except Exception as error:
        cause = f"rank {rank}: {type(error).__name__}: {line_of(error)}"
        raise TemporaryError(f"{folder}: cannot write the checkpoint: {cause}") from error


def files_of_all(mine: Path | None, group: dist.ProcessGroup | None = None) -> Files:
    """Sizes and checksums of the files of all ranks; each reads its own. Collective.

    Args:
        mine: this rank's file; None if it has stored nothing.
        group: process group to communicate in; None: the default one.
    """
    row = [0, 0, 0, 0, 0]
    with collectives.agreed("checkpoint: checksum", group):
        if mine is not None:
            digest = bytes.fromhex(sha256_of(mine))
            words = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8, 16, 24)]
            row = [mine.stat().st_size, *words]
    found = collectives.all_gather_ints(row, what="checkpoint: checksums", group=group)
    return {
        shard_file_name(rank): {"size": size, "sha256": b"".join(w.to_bytes(8, "big", signed=True) for w in words).hex()}
        for rank, (size, *words) in enumerate(found)
        if size
    }


def sizes_of(tensors: State) -> dict[str, int]:
    """Number of elements of each whole weight, for `publish`."""
    return {name: entry.numel for name, entry in tensors.items() if name.startswith("model.")}


def publish(
    temporary: Path,
    folder: Path,
    state: dict[str, Any],
    identity: Mapping[str, Any] | None,
    files: Files,
    sizes: Mapping[str, int],
) -> None:
    """Writes state and checksums, and gives a checkpoint its final name. Rank 0 calls it when all ranks have written.

    Args:
        temporary: where the checkpoint was written.
        folder: final folder; replaced if it exists.
        state, identity: as for `save_checkpoint`.
        files: returned by `write_tensors`.
        sizes: returned by `sizes_of`.

    Raises:
        CheckpointError: this rank does not see the whole file of another.
    """
    deadline = time.monotonic() + VISIBLE_S
    for name, entry in files.items():
        while not _has_size(temporary / name, entry["size"]):
            if time.monotonic() > deadline:
                text = f"{temporary / name} is not whole on rank 0 after {VISIBLE_S:g} s"
                raise CheckpointError(f"{text}: runs_dir must be on a file system that all ranks share")
            time.sleep(0.2)
    write_json(temporary / _STATE, state)
    stated = {"size": (temporary / _STATE).stat().st_size, "sha256": sha256_of(temporary / _STATE)}
    about = {"format": _FORMAT, "name": folder.name, "identity": dict(identity or {}), "files": {**files, _STATE: stated}}
    write_json(temporary / _MANIFEST, {**about, "sizes": dict(sizes)})
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    if folder.exists():  # it has its place until the new one has
        folder.rename(aside)
    temporary.rename(folder)
    if aside.exists():
        shutil.rmtree(aside)


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


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


def check_tensors(tensors: State) -> None:
    """Checks what would be saved: each element of each weight once, no NaN, no infinity. Collective.

    Buffers may be infinite, as masks of attention are.

    Args:
        tensors: made by `model_state`.

    Raises:
        DivergedError: a number is not finite; the message names the first weight.
        CheckpointError: the ranks together do not own each element once.
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
    weights = [entry for name, entry in tensors.items() if name.startswith("model.")]
    owned = collectives.all_gather_ints([sum(piece.values.numel() for piece in weights)], what="checkpoint: elements")
    if (stored := sum(n for (n,) in owned)) != (numel := sum(piece.numel for piece in weights)):
        raise CheckpointError(f"the ranks would store {stored} elements of {numel} weights: nothing was saved")


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


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, frozen: bool = True
) -> None:
    """Reads a checkpoint into a prepared model, whichever engine and number of ranks wrote it. Collective.

    If several weights share one flat parameter, its step count is the largest of theirs.

    Args:
        folder: folder of the checkpoint.
        model: the wrapped model; its weights and buffers are changed.
        optimizer: its optimizer, which gets the stored state; None: that state is not read.
        frozen: whether weights that are not trained are read; without, they stay as they are.

    Raises:
        CheckpointError: the checkpoint does not have the weights of this model, or cannot be read.
    """
    engine = find_engine(model)
    shards = [shard for shard in engine.shards() if frozen or shard.parameter.requires_grad]
    with collectives.agreed(f"checkpoint {folder.name}: read"):
        reader = _reader(folder, shards)
        stored = reader.metadata.state_dict_metadata
        targets = [(f"model.{shard.name}", shard, shard.local) for shard in shards]
        requested: State = {f"buffer.{name}": b for name, b in _buffers(engine) if f"buffer.{name}" in stored}
        scalars: dict[int, tuple[Tensor, list[Tensor]]] = {}  # several weights may share one
        numbers: dict[tuple[int, str], tuple[dict[str, Any], list[Tensor]]] = {}  # not tensors, likewise
        if optimizer is not None:
            for shard, key, name in _stored_optimizer_state(shards, stored):
                if _NUMBER in key:
                    requested[name] = torch.zeros((), dtype=_NUMBERS[key.partition(_NUMBER)[2]][1])
                    entries: dict[str, Any] = optimizer.state[shard.parameter]
                    numbers.setdefault((id(entries), key), (entries, []))[1].append(requested[name])
                    continue
                tensor = _state_tensor(optimizer, shard, key, stored[name])
                if tensor.ndim:
                    targets.append((name, shard, shard.within(tensor)))
                else:
                    requested[name] = torch.zeros_like(tensor)
                    scalars.setdefault(id(tensor), (tensor, []))[1].append(requested[name])
        not_contiguous = []
        for name, shard, values in targets:
            first, numel = shard.box.first, prod(shard.box.grid)
            if first is None:
                whole = torch.zeros(numel, dtype=values.dtype, device=values.device)
                not_contiguous.append((whole, shard, values))
                requested[name] = FlatPiece(whole, numel, 0)
            elif name in stored:  # else this rank has no part of it
                requested[name] = FlatPiece(values.detach().view(-1), numel, first)
        with _readable(folder):
            reader.read(requested)
        for whole, shard, values in not_contiguous:
            values.detach().copy_(whole.view(shard.box.grid)[shard.box.slices()])
        for shared, several in scalars.values():
            shared.copy_(torch.stack(several).amax(0))
        for (_, key), (entries, several) in numbers.items():
            name, _, kind = key.partition(_NUMBER)
            entries[name] = _NUMBERS[kind][0](torch.stack(several).amax(0).item())
    engine.publish()


def _reader(folder: Path, shards: list[Shard]) -> ShardReader:
    """Reads this rank's file and that of rank 0, if they have what this rank needs; else all files."""
    parts = [(f"model.{s.name}", s.box.first, s.local.numel()) for s in shards if s.local.numel()]
    needed = [(name, first, n) for name, first, n in parts if first is not None]
    with _readable(folder):
        manifest = _manifest(folder)
        sizes = manifest.get("sizes", {})
        wrong = [s.name for s in shards if sizes.get(f"model.{s.name}", prod(s.box.grid)) != prod(s.box.grid)]
        if wrong:
            raise CheckpointError(f"{folder}: {listing(wrong, 3)} has another size there: it belongs to another model")
        if manifest.get("format", 1) >= 3:  # before, a rank's count of steps could be in any file
            own = {file for rank in (0, collectives.rank()) if (file := folder / shard_file_name(rank)).exists()}
            reader = ShardReader(folder, sorted(own))
            if len(needed) == len(parts) and reader.has(needed):
                return reader
        reader = ShardReader(folder)
    missing = [name for name in (f"model.{s.name}" for s in shards) if name not in reader.metadata.state_dict_metadata]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]} and {len(missing) - 1} more: it belongs to another model")
    return reader


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
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except DcftError:
        raise
    except Exception as error:
        cause = f"rank {collectives.rank()}: {type(error).__name__}: {line_of(error)}"
        raise CheckpointError(f"{folder}: cannot read the checkpoint: {cause}") from error
