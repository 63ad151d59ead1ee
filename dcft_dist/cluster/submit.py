"""Submits a job with sbatch, and checks before that the cluster has the partition, nodes and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ..errors import RunError, did_you_mean
from ..files import write_atomic
from .job import Job, Site
from .render import render_sbatch


def check_cluster(job: Job, site: Site) -> None:
    """Checks that the cluster can run a job.

    Args:
        job: size and configuration.
        site: settings of the cluster. Without a partition, SBATCH_PARTITION counts; without both, all partitions.

    Raises:
        RunError: this machine has no Slurm, or the cluster lacks the partition, the nodes or the GPUs for each node.
    """
    for command in ("sbatch", "sinfo"):
        if shutil.which(command) is None:
            raise RunError(
                f"{command} is not installed on this machine: submit on a login node of the cluster, or use --with torchrun"
            )
    # With several partitions, Slurm uses the first that can start the job.
    partitions = (site.partition or os.environ.get("SBATCH_PARTITION") or "").split(",")
    rows = [line.split() for line in run_slurm("sinfo", "--noheader", "--format=%R %D %G").splitlines()]
    names = {row[0] for row in rows}
    for partition in filter(None, partitions):
        if partition not in names:
            raise RunError(
                f"no partition {partition}{did_you_mean(partition, names)}; the cluster has {', '.join(sorted(names))}"
            )
    rows = [row for row in rows if partitions == [""] or row[0] in partitions]
    most = max((_num_gpus(row[2], site.gpu_type) for row in rows), default=0)
    if job.gpus_per_node > most:
        kind = f" {site.gpu_type}" if site.gpu_type else ""
        raise RunError(f"{job.gpus_per_node}{kind} GPUs per node requested, but the nodes have {most or 'none'}")
    nodes = max((sum(int(row[1]) for row in rows if row[0] == name) for name in {row[0] for row in rows}), default=0)
    if job.nodes > nodes:
        raise RunError(f"{job.nodes} nodes requested, but the partition has {nodes}")


def _num_gpus(gres: str, kind: str | None) -> int:
    """Number of GPUs in a node's resources as sinfo prints them: `gpu:a100:4(S:0-1),gpu:v100:2`, `gpu:8`, `(null)`."""
    entries = re.findall(r"gpu(?::([^:,(]+))?:(\d+)", gres)
    return sum(int(number) for name, number in entries if kind in (None, name))


def submit_sbatch(job: Job, site: Site, folder: Path) -> str:
    """Writes the sbatch file to a run's directory and submits it.

    Args:
        job: size and configuration.
        site: settings of the cluster.
        folder: the run's directory; the file is `job.sbatch` in it.

    Returns:
        The job's id.

    Raises:
        RunError: sbatch is missing, or it rejects the job.
    """
    file = folder / "job.sbatch"
    write_atomic(file, render_sbatch(job, site))
    return run_slurm("sbatch", "--parsable", str(file)).strip().split(";")[0]


def run_slurm(*command: str) -> str:
    """Runs a command of Slurm and returns its standard output.

    Raises:
        RunError: the command is missing, or it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError(f"{command[0]} is not installed on this machine") from None
    if done.returncode:
        text = done.stderr.strip().splitlines()
        raise RunError(f"{command[0]}: {text[-1] if text else f'exit code {done.returncode}'}")
    return done.stdout
