"""One description of a job, rendered as an sbatch file, handed to submitit, or as torchrun commands.

The files in slurm/ are `render_sbatch` of the jobs in `FILES` at no particular site (`dcft slurm-files` writes them).
What is particular to a site (partition, account, modules, network, container) is in one TOML file that the environment
variable DCFT_SITE names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ..errors import RunError, did_you_mean
from .job import Job, Site
from .render import render_sbatch


def check_cluster(job: Job, site: Site) -> None:
    """
    Raises:
        RunError: there is no Slurm here, or it has no such partition, or not that many nodes or GPUs a node.
    """
    for command in ("sbatch", "sinfo"):
        if shutil.which(command) is None:
            raise RunError(
                f"there is no {command} on this machine: submit on a login node of the cluster, or use --with torchrun"
            )
    wanted = (site.partition or os.environ.get("SBATCH_PARTITION") or "").split(",")  # the first that can start it
    rows = [line.split() for line in run_slurm("sinfo", "--noheader", "--format=%R %D %G").splitlines()]
    names = {row[0] for row in rows}
    for partition in filter(None, wanted):
        if partition not in names:
            raise RunError(f"no partition {partition}{did_you_mean(partition, names)}; there are {', '.join(sorted(names))}")
    rows = [row for row in rows if wanted == [""] or row[0] in wanted]
    most = max((_num_gpus(row[2], site.gpu_type) for row in rows), default=0)
    if job.gpus_per_node > most:
        kind = f" {site.gpu_type}" if site.gpu_type else ""
        raise RunError(f"{job.gpus_per_node}{kind} GPUs a node are asked for, but the nodes have {most or 'none'}")
    nodes = max((sum(int(row[1]) for row in rows if row[0] == name) for name in {row[0] for row in rows}), default=0)
    if job.nodes > nodes:
        raise RunError(f"{job.nodes} nodes are asked for, but there are {nodes}")


def _num_gpus(gres: str, kind: str | None) -> int:
    """GPUs in what sinfo says of a node: `gpu:a100:4(S:0-1),gpu:v100:2`, `gpu:8`, `(null)`."""
    found = re.findall(r"gpu(?::([^:,(]+))?:(\d+)", gres)
    return sum(int(number) for name, number in found if kind in (None, name))


def submit_sbatch(job: Job, site: Site, folder: Path) -> str:
    """Writes the sbatch file into the run's directory, submits it, and returns the job's id.

    Raises:
        RunError: sbatch refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "job.sbatch"
    file.write_text(render_sbatch(job, site))
    return run_slurm("sbatch", "--parsable", str(file)).strip().split(";")[0]


def run_slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError(f"there is no {command[0]} here") from None
    if done.returncode:
        text = done.stderr.strip().splitlines()
        raise RunError(f"{command[0]}: {text[-1] if text else f'exit code {done.returncode}'}")
    return done.stdout
