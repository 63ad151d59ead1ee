"""The file of one rank in a checkpoint: pieces of flattened tensors, as safetensors, by torch.distributed.checkpoint.

A rank writes what it owns into a file of its own. No plan of all ranks is made, so nothing is sent that grows with the
number of tensors. A rank that goes on with its own part reads its own file and that of rank 0, which has the buffers. Any
other layout reads the headers of all files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ..errors import CheckpointError

State = dict[str, Any]  # name -> FlatPiece, or a tensor that is stored whole


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


def write_shard_file(folder: Path, tensors: State, rank: int) -> Path | None:
    """Writes the file of a rank, through to the disk. No communication.

    Args:
        folder: made if absent.
        tensors: what the rank stores. Buffers (`buffer.<name>`) are the same everywhere: only rank 0 stores them.
        rank: the rank.

    Returns:
        The file; None if there is nothing to store.
    """
    stored = {name: entry for name, entry in tensors.items() if rank == 0 or not name.startswith("buffer.")}
    writer, planner = HuggingFaceStorageWriter(str(folder), save_distributed=True), _SavePlanner()
    planner.set_up_planner(stored, None, True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = writer.prepare_global_plan([*[SavePlan([])] * rank, plan])[rank]  # this gives the file its number
    writer.write_data(planner.finish_plan(plan), planner).wait()
    file = folder / shard_file_name(rank)
    return file if plan.items else None


def shard_file_name(rank: int) -> str:
    """Name of the file of a rank in a checkpoint, as torch's writer forms it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


class ShardReader(HuggingFaceStorageReader):
    """Reads files of ranks.

    Attributes:
        metadata: which pieces of which tensors the files have.
    """

    def __init__(self, folder: Path, files: Collection[Path] | None = None) -> None:
        """
        Args:
            folder: folder of the checkpoint.
            files: the files to read; None: all.
        """
        super().__init__(str(folder))
        self._all = files is None
        if files is not None:
            self.fs.ls = lambda path: [str(file) for file in files]  # type: ignore[method-assign]
        self.metadata = self.read_metadata()

    def has(self, pieces: Iterable[tuple[str, int, int]]) -> bool:
        """Whether each piece is in the files as part of one stored piece.

        Args:
            pieces: (name, index of the first element, number of elements) of each.
        """
        stored: Any = self.metadata.state_dict_metadata

        def within(chunk: ChunkStorageMetadata, begin: int, end: int) -> bool:
            return chunk.offsets[0] <= begin and end <= chunk.offsets[0] + chunk.sizes[0]

        return all(
            name in stored and any(within(chunk, begin, begin + n) for chunk in stored[name].chunks)
            for name, begin, n in pieces
        )

    def read(self, requested: State) -> None:
        """Fills pieces and tensors. No communication.

        Args:
            requested: name -> FlatPiece or tensor, which gets the stored values.

        Raises:
            CheckpointError: a whole tensor has another shape.
        """
        for name, entry in requested.items():
            stored: Any = self.metadata.state_dict_metadata[name]
            if not isinstance(entry, FlatPiece) and stored.size != entry.size():
                raise CheckpointError(f"{self.path}: {name} is {list(stored.size)} there, not {list(entry.size())}")
            if not self._all:  # the files do not show how large the whole tensors are
                stored.size = entry.size()
        planner = _LoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(requested, self.metadata, True)
        self.set_up_storage_reader(self.metadata, True)
        plan = self.prepare_local_plan(planner.create_local_plan())
        self.read_data(planner.finish_plan(plan), planner).wait()
