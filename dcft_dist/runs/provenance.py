"""Where a result comes from: code, libraries, machine, and peak memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..distributed import collectives

# Installed libraries that compute, read or choose what a run trains on.
LIBRARIES = ["torch", "transformers", "timm", "monai", "open_clip_torch", "numpy", "dcft_dist", "deepspeed", "accelerate"]
LIBRARIES += ["tokenizers", "datasets", "pillow", "pydicom", "nibabel", "triton"]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, by name; libraries that are not installed are missing."""
    versions_by_name = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions_by_name[name] = version(name)
    return versions_by_name


def git_commit() -> str | None:
    """Commit of the working tree that the package runs from, with a `+` if tracked files have changes. None outside git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB, the maximum over ranks: allocated GPU memory on a GPU, else resident memory. Collective."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(max(p for (p,) in collectives.all_gather_ints([peak], what="peak memory")) / 2**30, 3)


def machine() -> dict[str, Any]:
    """The hardware of this process: GPU name or None, CPU name, number of torch threads."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
