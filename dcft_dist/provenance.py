"""Where a result comes from: code, libraries, machine, and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import collectives
from .engines import find_engine


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "timm", "monai", "open_clip_torch", "numpy", "dcft_dist"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Commit of the working tree the package runs from, with a `+` if that has changes; None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of every rank's local weights and buffers, in rank order: equal for equal bits on equally many ranks."""
    digest, engine = hashlib.sha256(), find_engine(model)
    local = {shard.name: shard.local for shard in engine.shards()} | dict(engine.module.named_buffers())
    for _, tensor in sorted(local.items()):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    words = [int.from_bytes(digest.digest()[i : i + 4], "little") for i in range(0, 32, 4)]
    everyone = collectives.all_gather_ints(words, what="checksum of the weights")
    return hashlib.sha256(repr(everyone).encode()).hexdigest()


def peak_memory_gib(device: torch.device) -> float:
    """Largest over the ranks: GPU memory where there is one, else resident memory of the process. Collective."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(max(p for (p,) in collectives.all_gather_ints([peak], what="peak memory")) / 2**30, 3)


def machine() -> dict[str, Any]:
    """The processor or GPU the run was on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
