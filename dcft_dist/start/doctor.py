"""`dcft doctor`: what this machine has for training, one line for each part, with the cure where something is missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

Verdict = Literal["good", "note", "bad"]
_SHM = 1 << 30  # bytes in /dev/shm that data workers want


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        part: of the machine.
        verdict: `good`; `note`: fine for many uses; `bad`: trainings will fail.
        text: in words, with the cure.
    """

    part: str
    verdict: Verdict
    text: str


def examine(folder: Path) -> Iterator[Finding]:
    """Looks at the machine, part by part.

    Args:
        folder: where runs will be written.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "GPU": _gpu,
        "NCCL": _nccl,
        "Slurm": _slurm,
        "runs": lambda: _runs(folder),
        "/dev/shm": _shared_memory,
        "network": _network,
    }
    for part, check in checks.items():
        try:
            yield check()
        except Exception as error:  # a machine may be broken in ways that nobody has seen
            yield Finding(part, "bad", f"{type(error).__name__}: {error}")


def _torch() -> Finding:
    import torch

    return Finding("torch", "good", f"{torch.__version__}, dcft_dist {version('dcft_dist')}")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", "good", f"{len(names)}: {', '.join(dict.fromkeys(names))}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPU", "bad", f"a driver, but torch {torch.__version__} sees no GPU: install a torch for your CUDA version"
        )
    return Finding("GPU", "note", "none here: trainings run on the processor, with gloo. On a cluster, ask on a GPU node")


def _nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if dist.is_nccl_available() and torch.cuda.is_available():
        return Finding("NCCL", "good", ".".join(map(str, torch.cuda.nccl.version())))
    return Finding("NCCL", "note", "not used without GPUs")


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "note", "not on this machine; only a cluster needs it, on its login node")
    done = subprocess.run(["sinfo", "--noheader", "--format", "%P"], capture_output=True, text=True, timeout=20)
    if done.returncode:
        text = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("Slurm", "note", f"no cluster answers ({text}). Only a cluster needs it: is this a login node?")
    return Finding("Slurm", "good", f"partitions {', '.join(done.stdout.split()) or 'none'}; DCFT_SITE {_site()}")


def _site() -> str:
    place = os.environ.get("DCFT_SITE")
    return "is not set (docs/clusters.md)" if not place else place if Path(place).is_file() else f"names no file: {place}"


def _runs(folder: Path) -> Finding:
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        return Finding("runs", "bad", f"{nearest} cannot be written: name another folder with --runs_dir")
    free = f"{nearest}: {shutil.disk_usage(nearest).free / 2**30:.0f} GiB free"
    with tempfile.TemporaryFile(dir=nearest) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            cure = "runs are locked by a file that is touched instead; better: mount it with locks (Lustre: -o flock)"
            return Finding("runs", "note", f"{free}, but no flock ({error.strerror}): {cure}")
    return Finding("runs", "good", f"{free}, locks work")


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding("/dev/shm", "note", "not there: set train.workers = 0")
    free = shutil.disk_usage(shm).free
    if free < _SHM:
        return Finding(
            "/dev/shm", "note", f"{free / 2**20:.0f} MiB free: enlarge it (docker: --shm-size=8g), or train.workers = 0"
        )
    return Finding("/dev/shm", "good", f"{free / 2**30:.1f} GiB free")


def _network() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return Finding("network", "bad", f"the name of this machine, {name}, has no address: add it to /etc/hosts")
    with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET, socket.SOCK_STREAM) as server:
        try:
            server.bind((address, 0))
        except OSError as error:
            return Finding("network", "bad", f"no port can be opened at {address} ({name}): {error.strerror}")
        port = server.getsockname()[1]
    if str(address).startswith("127.") or address == "::1":
        return Finding(
            "network", "note", f"{name} is {address}: enough for one node; several nodes need an address others reach"
        )
    return Finding("network", "good", f"{name} is {address}, ports can be opened ({port} was)")
