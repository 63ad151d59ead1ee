"""Joins the ranks of a run, which torchrun started; without torchrun, the run is a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import WorldError
from .collectives import explained
from .interface import choose_interface


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of ranks.
        device: device of this rank's weights.
        together: neighbouring ranks that compute each batch together (tensor parallelism).
    """

    rank: int
    world_size: int
    device: torch.device
    together: int = 1

    @property
    def data_rank(self) -> int:
        """Which part of the data this rank takes; ranks that compute together take the same."""
        return self.rank // self.together

    @property
    def data_ranks(self) -> int:
        """How many parts of the data there are."""
        return self.world_size // self.together

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def record_collectives(folder: Path) -> None:
    """Lets torch's flight recorder write what NCCL's last collectives were, on each rank, when one of them gives up.

    The files are `nccl_trace_rank_N` in the folder; `torchfrtrace --prefix FOLDER/nccl_trace_rank_` reads them. Environment
    variables that are set already stay.

    Args:
        folder: where the files go; it must exist by then.
    """
    prefix = str(folder / "nccl_trace_rank_")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # the second until torch 2.13
        os.environ.setdefault(name, prefix)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


@contextmanager
def joined_world(timeout_s: float, traces: Path | None = None) -> Iterator[World]:
    """Joins the process group for the block, as torchrun's environment variables describe it.

    Without torchrun the group has one rank. With GPUs, each rank uses one of them. GPU tensors use NCCL,
    CPU tensors use gloo.

    Args:
        timeout_s: seconds after which a collective gives up.
        traces: with GPUs, folder for what is known of it then (`record_collectives`); None: nothing is written.

    Raises:
        WorldError: the ranks did not meet, or this node has more ranks than GPUs.
    """
    alone = "RANK" not in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_rank >= gpus:
        raise WorldError(f"local rank {local_rank} has no GPU: this node has {gpus}; start at most {gpus} ranks on it")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        if traces is not None:
            record_collectives(traces)
    choose_interface()
    backend, timeout = "cpu:gloo,cuda:nccl" if gpus else "gloo", timedelta(seconds=timeout_s)
    try:
        if alone:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            # torchrun keeps its store when it restarts ranks (torch 2.13). With the old keys, gloo would look for minutes
            # for peers at their old addresses. So each start uses its own keys.
            store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise WorldError(f"rank {os.environ.get('RANK', 0)} could not join the other ranks: {error}") from error
    with explained("training"):
        yield World(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may have died
