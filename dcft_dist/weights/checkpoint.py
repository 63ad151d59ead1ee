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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import collectives
from ..errors import CheckpointError, DamagedError, DivergedError, TemporaryError, line_of, listing
from ..files import read_json, sha256_of, write_json
from .shard_files import FlatPiece, State, shard_file_name, write_shard_file

log = logging.getLogger(__name__)

_STATE, _MANIFEST = "state.json", "manifest.json"

_FORMAT = 3  # since 3, the file of a rank has all that this rank needs to go on, but for the buffers

Files = dict[str, dict[str, Any]]  # name of a file -> its size in bytes, and its SHA-256

VISIBLE_S = 60.0  # seconds that a network file system may take to show one node what another has written

ASIDE = ".aside"  # end of the name of a checkpoint while it is replaced


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
                what = {"model": f"weight {rest}", "buffer": f"buffer {rest}", "average": f"average of {rest}"}.get(
                    kind, f"optimizer's state {rest}"
                )
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
        for name, entry in sorted(manifest_of(folder)["files"].items())[collectives.rank() :: collectives.world_size()]:
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
        found = [(entry, (folder / name).stat().st_size) for name, entry in manifest_of(folder)["files"].items()]
    except (OSError, DamagedError):
        return False
    return all(entry.get("size", size) == size for entry, size in found)


def manifest_of(folder: Path) -> dict[str, Any]:
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
        stored = manifest_of(folder)["identity"]
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
