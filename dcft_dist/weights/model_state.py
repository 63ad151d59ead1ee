"""What a checkpoint has of a model: weights, buffers, the optimizer's state and averages, by name, each element once.

So any engine on any number of ranks can read it, whichever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.pytorch import clean
from ..distributed import collectives
from ..engines.base import Engine, Shard
from ..engines.find import find_engine
from ..engines.whole_tensors import whole_weight
from ..errors import CheckpointError, DcftError, line_of, listing
from .checkpoint import manifest_of
from .shard_files import FlatPiece, ShardReader, State, shard_file_name

_AVERAGE = "average"

_NUMBER = "#"  # in the name of an entry of the optimizer's state that is a number of Python, before its type

_NUMBERS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.uint8),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}


def model_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    frozen: bool = True,
    averages: Mapping[str, Tensor] | None = None,
) -> State:
    """The tensors that a checkpoint stores, each element on the rank that owns it. Collective.

    Args:
        model: the wrapped model.
        optimizer: its optimizer; None: only weights and buffers.
        frozen: whether weights that are not trained are stored; without, who loads the checkpoint must have them.
        averages: averages of weights, laid out like this rank's shards; see `AveragedWeights.values`.

    Returns:
        Name (`model.<weight>`, `buffer.<buffer>`, `optimizer.<weight>.<key>`, `average.<weight>`) -> piece or tensor, for
        `save_checkpoint`.

    Raises:
        CheckpointError: an entry of the optimizer's state is neither a tensor nor a number.
    """
    engine = find_engine(model)
    state: State = {f"buffer.{name}": b for name, b in _buffers(engine)}
    for shard in engine.shards():
        if not (frozen or shard.parameter.requires_grad):
            continue
        piece = state[f"model.{shard.name}"] = _owned(shard, shard.local)
        if averages and shard.name in averages:
            state[f"{_AVERAGE}.{shard.name}"] = _owned(shard, averages[shard.name])
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


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    frozen: bool = True,
    averages: Mapping[str, Tensor] | None = None,
    averaged: bool = False,
) -> None:
    """Reads a checkpoint into a prepared model, whichever engine and number of ranks wrote it. Collective.

    If several weights share one flat parameter, its step count is the largest of theirs.

    Args:
        folder: folder of the checkpoint.
        model: the wrapped model; its weights and buffers are changed.
        optimizer: its optimizer, which gets the stored state; None: that state is not read.
        frozen: whether weights that are not trained are read; without, they stay as they are.
        averages: as for `model_state`; they get the stored values.
        averaged: whether the model gets the averages of its weights, where some are stored, in place of the weights.

    Raises:
        CheckpointError: the checkpoint does not have the weights of this model, or cannot be read.
    """
    engine = find_engine(model)
    shards = [shard for shard in engine.shards() if frozen or shard.parameter.requires_grad]
    with collectives.agreed(f"checkpoint {folder.name}: read"):
        reader = _reader(folder, shards)
        stored = reader.metadata.state_dict_metadata
        buffers: State = {f"buffer.{name}": b for name, b in _buffers(engine) if f"buffer.{name}" in stored}
        reading = _Reading(buffers, stored)
        for shard in shards:
            average = f"{_AVERAGE}.{shard.name}"
            reading.values(average if averaged and average in stored else f"model.{shard.name}", shard, shard.local)
            if averages and shard.name in averages:
                reading.values(average, shard, averages[shard.name])
        if optimizer is not None:
            for shard, key, name in _stored_optimizer_state(shards, stored):
                reading.entry(name, shard, key, optimizer)
        with _readable(folder):
            reader.read(reading.requested)
        reading.finish()
    engine.publish()


class _Reading:
    """What is read from a checkpoint, and where it goes afterwards.

    Attributes:
        requested: name in the checkpoint -> piece or tensor that gets the stored values.
    """

    def __init__(self, buffers: State, stored: Mapping[str, Any]) -> None:
        """
        Args:
            buffers: the model's buffers by their names in the checkpoint.
            stored: name -> what this rank's files have of it.
        """
        self.requested, self._stored = buffers, stored
        self._parts: list[tuple[Tensor, Shard, Tensor]] = []  # whole weights, of which a rank takes a part
        self._scalars: dict[int, tuple[Tensor, list[Tensor]]] = {}  # several weights may share one
        self._numbers: dict[tuple[int, str], tuple[dict[str, Any], list[Tensor]]] = {}  # numbers of Python

    def values(self, name: str, shard: Shard, values: Tensor) -> None:
        """Requests `values`, which are laid out like the shard."""
        first, numel = shard.box.first, prod(shard.box.grid)
        if first is None:
            whole = torch.zeros(numel, dtype=values.dtype, device=values.device)
            self._parts.append((whole, shard, values))
            self.requested[name] = FlatPiece(whole, numel, 0)
        elif name in self._stored:  # else this rank has no part of it
            self.requested[name] = FlatPiece(values.detach().view(-1), numel, first)

    def entry(self, name: str, shard: Shard, key: str, optimizer: torch.optim.Optimizer) -> None:
        """Requests an entry of the optimizer's state."""
        if _NUMBER in key:
            self.requested[name] = torch.zeros((), dtype=_NUMBERS[key.partition(_NUMBER)[2]][1])
            entries: dict[str, Any] = optimizer.state[shard.parameter]
            self._numbers.setdefault((id(entries), key), (entries, []))[1].append(self.requested[name])
            return
        tensor = _state_tensor(optimizer, shard, key, self._stored[name])
        if tensor.ndim:
            self.values(name, shard, shard.within(tensor))
        else:
            self.requested[name] = torch.zeros_like(tensor)
            self._scalars.setdefault(id(tensor), (tensor, []))[1].append(self.requested[name])

    def finish(self) -> None:
        """Puts what was not read in place where it belongs."""
        for whole, shard, values in self._parts:
            values.detach().copy_(whole.view(shard.box.grid)[shard.box.slices()])
        for shared, several in self._scalars.values():
            shared.copy_(torch.stack(several).amax(0))
        for (_, key), (entries, several) in self._numbers.items():
            plain, _, kind = key.partition(_NUMBER)
            entries[plain] = _NUMBERS[kind][0](torch.stack(several).amax(0).item())


def _reader(folder: Path, shards: list[Shard]) -> ShardReader:
    """Reads this rank's file and that of rank 0, if they have what this rank needs; else all files."""
    parts = [(f"model.{s.name}", s.box.first, s.local.numel()) for s in shards if s.local.numel()]
    needed = [(name, first, n) for name, first, n in parts if first is not None]
    with _readable(folder):
        manifest = manifest_of(folder)
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
