"""Renders a job as an sbatch file, or as torchrun commands."""

from __future__ import annotations

import shlex
from pathlib import Path

from .job import GRACE_S, SIGNAL_S, Job, Site

# -- sbatch ------------------------------------------------------------------------------------------------------------


def render_sbatch(job: Job, site: Site) -> str:
    """The text of an sbatch file that runs by itself.

    Args:
        job: size and configuration.
        site: settings of the cluster.
    """
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in job.title)]
    lines += [f"#SBATCH {option}" for option in sbatch_options(job, site)]
    if site.setup or site.environment:
        lines += ["", "# -- the site --", *site.setup]  # before `set -u`, which breaks modules and conda
        lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += ["set -euo pipefail"]
    lines += ["", "# -- the run --", *_arguments(job), *job.before]
    ranks = str(job.local_ranks) if job.fixed else "${DCFT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-2}}"
    lines += [f"ranks={ranks}" + ("" if job.fixed else "   # a node's GPUs; two gloo ranks where there are none")]
    prefix = "".join(f"{_quoted(word)} " for word in site.container)
    options = "".join(f" {_quoted(word)}" for word in site.srun)
    python = f'"{job.python}"' if job.python.startswith("$") else shlex.quote(job.python)
    lines += [
        f"run=({prefix}{python})",
        # Computed from SLURM_NNODES: the job's number of tasks is from its first start, which may have had more nodes.
        'each=(--ntasks="${SLURM_NNODES:?start this with sbatch}" '
        + f"--ntasks-per-node=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}{options})",
        "one=(" + (f'srun --nodes=1 --ntasks=1{options} "${{run[@]}}")' if options else '"${run[@]}")'),
    ]
    return "\n".join(lines) + "\n\n" + shell_part("job.sh").replace("@GRACE@", str(GRACE_S))


def shell_part(name: str) -> str:
    """The part of a shell file in this folder that goes into rendered files: the lines below its cut mark.

    Args:
        name: `job.sh` or `sweep.sh`.
    """
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return text.partition("# -- cut here --\n")[2]


def _quoted(word: str) -> str:
    """Like `shlex.quote`, but also quotes words with commas, which look like a mistake in a shell array."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _arguments(job: Job) -> list[str]:
    """Sets "$@" to the arguments of `dcft train`."""
    words = " ".join(map(shlex.quote, job.overrides))
    if job.fixed:
        return [f'set -- {shlex.quote(job.config)} {words + " " if words else ""}"$@"']
    return [f"[ $# -gt 0 ] || set -- {job.config}", *([f'set -- "$1" {words} "${{@:2}}"'] if words else [])]


def sbatch_options(job: Job, site: Site) -> list[str]:
    """Options of sbatch for a job, such as `--nodes=2`, those of the site last."""
    options = [
        f"--job-name={job.name}",
        f"--output={'%x-%A_%a' if job.array else '%x-%j'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{SIGNAL_S}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
    ]
    if job.array:
        options.append(f"--array={job.array}")
    if job.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        options.append(f"--{site.gpu_option}={'gpu:' if site.gpu_option == 'gres' else ''}{kind}{job.gpus_per_node}")
    if cpus := job.cpus_per_task or (site.cpus_per_gpu and site.cpus_per_gpu * job.local_ranks):
        options.append(f"--cpus-per-task={cpus}")
    if time := job.time or site.time:
        options.append(f"--time={time}")
    keys = ("partition", "account", "qos", "constraint")
    options += [f"--{key}={getattr(site, key)}" for key in keys if getattr(site, key)]
    return options + site.sbatch


# -- torchrun, without Slurm -------------------------------------------------------------------------------------------


def render_torchrun(job: Job, site: Site) -> str:
    """Shell lines that start a job with torchrun, to run on each node.

    Args:
        job: size and configuration.
        site: settings of the cluster; only set-up, environment and container are used.
    """
    lines = [*site.setup, *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items())]
    words = [*site.container, job.python, "-m", "torch.distributed.run"]
    if job.nodes == 1:
        words += ["--standalone", "--nproc-per-node", str(job.local_ranks), "--max-restarts", "2"]
    else:
        lines = [f"# on each of the {job.nodes} nodes, with HEAD the address of one of them", *lines]
        words += ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.local_ranks), "--rdzv-id", job.name]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint"]
    command = shlex.join(words) + ("" if job.nodes == 1 else ' "$HEAD:29400"')
    arguments = shlex.join([job.config, *job.overrides])
    return "\n".join([*lines, f"{command} \\", f"    -m dcft_dist.cli train {arguments}"]) + "\n"
