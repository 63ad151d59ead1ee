"""Exports: a folder of safetensors files with whole tensors, named as transformers and plain torch name them.

Unlike a checkpoint, an export has no optimizer state, and every program that reads safetensors can read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..compat.pytorch import persistent_buffers
from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.find import find_engine
from ..engines.whole_tensors import cells, whole_weight
from ..errors import CheckpointError, DamagedError, listing
from ..files import read_json, write_json
from ..tensor_file import TensorFile, is_altered

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    prefix: str = "",
    stem: str = "",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes the whole weights and persistent buffers of a model under any engine. Collective.

    Writes `model.safetensors`, or numbered files and an index if one file would exceed `max_file_bytes`. Names are those of
    the unwrapped model's `state_dict()`. Rank 0 writes one weight after the other, so no rank needs memory for two of them.

    Args:
        model: a plain module, or one wrapped by any supported engine.
        folder: created if absent; weight files of an earlier export in it are replaced.
        prefix: write only the weights with names that begin with it, and remove it: `"backbone."` writes what
            `AutoModel` reads.
        stem: put before the names afterwards.
        dtype: data type of floating-point weights in the files; None: the type in training (float32 masters).
        max_file_bytes: largest size of one file, in bytes of its tensors; a larger single tensor gets its own file.

    Raises:
        CheckpointError: no weight has the prefix, or safetensors does not support a weight's data type.
        TemporaryError: a file cannot be written.
    """
    engine, target = find_engine(model), Path(folder)
    tensors = {
        stem + name.removeprefix(prefix): (get, shape, _file_dtype(own_dtype, dtype))
        for name, get, shape, own_dtype in _whole_tensors(engine)
        if name.startswith(prefix)
    }
    unsupported = [name for name, (_, _, kind) in tensors.items() if kind not in _DTYPES]
    if unsupported or not tensors:
        wrong_type = f"safetensors cannot store the data type of {listing(unsupported)}"
        raise CheckpointError(wrong_type if unsupported else f"no weight's name begins with {prefix!r}")
    files = _split({name: prod(shape) * kind.itemsize for name, (_, shape, kind) in tensors.items()}, max_file_bytes)
    for file, names in files.items():
        writer: TensorFile | None = None
        with collectives.agreed(f"write {target / file}"):
            if collectives.rank() == 0:
                entries = {n: (_DTYPES[k], s, prod(s) * k.itemsize) for n, (_, s, k) in tensors.items() if n in names}
                writer = TensorFile(target / file, entries, {"format": "pt"})
        for name in names:
            get, _, kind = tensors[name]
            values = get().detach().to(kind).contiguous().reshape(-1).cpu()
            if writer is not None:
                writer.write(values.view(torch.uint8).numpy().tobytes())
        with collectives.agreed(f"write {target / file}"):
            if writer is not None:
                writer.close()
    with collectives.agreed(f"write {target}"):
        if collectives.rank() == 0:
            _tidy(target, files, sum(prod(s) * k.itemsize for _, s, k in tensors.values()))


def load_weights(model: nn.Module, folder: str | os.PathLike[str], *, prefix: str = "", stem: str = "") -> None:
    """Reads a folder of safetensors files into a model under any engine. Each rank reads only its shards. Collective.

    Args:
        model: a plain module, or one wrapped by any supported engine.
        folder: written by `save_weights`, or in the same format.
        prefix: put before the names in the files to get the names in the model. Weights without it stay unchanged.
        stem: removed from the start of the names in the files first.

    Raises:
        CheckpointError: a weight is missing, has another shape, or is not in the model; or a file is damaged.
    """
    engine, source = find_engine(model), Path(folder)
    with collectives.agreed(f"read {source}"), torch.no_grad():
        try:
            sources = {prefix + name.removeprefix(stem): (file, name) for name, file in _names_in(source).items()}
            buffers = persistent_buffers(engine.module)
            _check(source, sources, prefix, engine, buffers)
            shards = {shard.name: shard for shard in engine.shards()}
            for name, (file, stored) in sources.items():
                with safe_open(source / file, framework="pt") as opened:
                    if name in buffers:
                        buffers[name].copy_(opened.get_tensor(stored))
                    else:
                        _read(opened.get_slice(stored), shards[engine.names.aliases[name]])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{source} does not exist, or is damaged: {error}") from error
    engine.publish()


def _whole_tensors(engine: Engine) -> Iterator[tuple[str, Callable[[], Tensor], tuple[int, ...], torch.dtype]]:
    """(name, function that returns the whole tensor, shape, dtype). A tied weight comes under each of its names."""
    shapes, shards = engine.full_shapes(), {s.name: s for s in engine.shards()}
    for name, canonical in engine.names.aliases.items():
        shard = shards[canonical]
        yield name, lambda shard=shard: whole_weight(shard, shard.local), shapes[canonical], shard.local.dtype  # type: ignore[misc]
    for name, buffer in persistent_buffers(engine.module).items():
        yield name, lambda buffer=buffer: buffer, tuple(buffer.shape), buffer.dtype  # type: ignore[misc]


def _file_dtype(own: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    return requested if requested is not None and own.is_floating_point else own


def _split(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in order."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {FILE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def _tidy(folder: Path, files: dict[str, list[str]], total: int) -> None:
    """Writes the index last, and deletes files of an earlier export, which readers would take for this one's."""
    if len(files) > 1:
        file_of = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of}, seal=False)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()


def _names_in(folder: Path) -> dict[str, str]:
    """Name of a tensor -> file that contains it."""
    if (folder / INDEX).exists():
        return files_of_index(folder / INDEX)
    with safe_open(folder / FILE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), FILE)


def files_of_index(file: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file that contains it, from an index as transformers writes it.

    Raises:
        DamagedError: it is no such index, or a file lies outside the folder.
    """
    file_of = read_json(file, "weight_map")["weight_map"]
    if not isinstance(file_of, dict) or not all(isinstance(part, str) for part in file_of.values()):
        raise DamagedError(f"{file} is damaged (weight_map does not give a file for each tensor)")
    if outside := [part for part in file_of.values() if Path(part).name != part or part in ("", ".", "..")]:
        raise DamagedError(f"{file} names {outside[0]!r}, which is not a file beside it")
    return file_of


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors that this rank has, each whole, to one file with checksums.

    Args:
        path: the file.
        tensors: name -> tensor.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {n: (_DTYPES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in plain.items()}
    file = TensorFile(path, entries, {"format": "pt"})
    for tensor in plain.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    file.close()


def _check(
    folder: Path, sources: dict[str, tuple[str, str]], prefix: str, engine: Engine, buffers: dict[str, Tensor]
) -> None:
    """Checks before anything is copied that the files are unaltered, and have the model's names and shapes.

    `sources`: name in the model -> (file, name in the file).
    """
    for file in sorted({file for file, _ in sources.values()})[collectives.rank() :: collectives.world_size()]:
        if is_altered(folder / file):
            raise CheckpointError(f"{folder / file} was altered after it was written")
    aliases, full = engine.names.aliases, engine.full_shapes()
    shapes = {n: full[c] for n, c in aliases.items()} | {n: tuple(b.shape) for n, b in buffers.items()}
    stored_names = {aliases.get(name, name) for name in sources}
    missing = [name for name in shapes if name.startswith(prefix) and aliases.get(name, name) not in stored_names]
    unknown = [name for name in sources if name not in shapes]
    if missing or unknown:
        lacking, extra = listing(missing) or "none", listing(unknown) or "none"
        raise CheckpointError(f"{folder} does not fit the model: missing: {lacking}; not in the model: {extra}")
    for name, (file, stored) in sources.items():
        with safe_open(folder / file, framework="pt") as opened:
            shape = tuple(opened.get_slice(stored).get_shape())
        if shape != shapes[name]:
            raise CheckpointError(f"{name} is {shape} in the file and {shapes[name]} in the model")


def _read(stored: Any, shard: Shard) -> None:
    target = shard.local.detach()
    target.copy_(cells(stored, shard.box).reshape(target.shape))
