"""One description of a job, rendered as an sbatch file, handed to submitit, or as torchrun commands.

The files in slurm/ are `render_sbatch` of the jobs in `FILES` at no particular site (`dcft slurm-files` writes them).
What is particular to a site (partition, account, modules, network, container) is in one TOML file that the environment
variable DCFT_SITE names.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from .config import check_ranks, find_config, load_config
from .errors import ConfigError, DcftError, RunError, did_you_mean
from .schema import Config, Section

SMOKE_STEPS = 20
SIGNAL_S = 120  # before its end a job is told to leave a checkpoint
GRACE_S = 90  # for which ranks in a phase without steps are waited for then


class Site(Section):
    """What is particular to a cluster; every key may be absent."""

    partition: str | None = Field(None, description="Partition (queue).")
    account: str | None = Field(None, description="Account or project that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that nodes must have.")
    time: str | None = Field(None, description="Time limit, as sbatch writes it (`24:00:00`).")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="How the site asks for GPUs.")
    gpu_type: str | None = Field(None, description="Type of GPU, where the site has several (`a100`).")
    cpus_per_gpu: int | None = Field(None, description="CPU cores for each rank.")
    sbatch: list[str] = Field([], description="Further options of sbatch (`--exclusive`, `--mem=0`).")
    setup: list[str] = Field([], description="Shell lines before anything else (`module load ...`, `source .../activate`).")
    environment: dict[str, str] = Field({}, description="Variables (`NCCL_SOCKET_IFNAME`, `HF_HUB_OFFLINE`).")
    container: list[str] = Field([], description="Words before python (`apptainer exec --nv dcft.sif`).")
    srun: list[str] = Field([], description="Further options of srun (pyxis: `--container-image=...`).")
    runs_dir: str | None = Field(None, description="Directory of all runs, on a file system that all nodes share.")


@dataclass(frozen=True)
class Job:
    """One run (or an array of them) on some nodes.

    Attributes:
        config: file or shipped name; overrides: as for `dcft train`, before those given to sbatch.
        ranks_per_node: None: a rank for each GPU, two where there are none.
        fixed: configuration and sizes are written into the file, not taken from its arguments and from Slurm.
        python: interpreter on the nodes.
        before: shell lines between set-up and start (what an array makes of its index).
    """

    name: str = "dcft"
    title: tuple[str, ...] = ()
    config: str = "configs/smoke.toml"
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    array: str | None = None
    fixed: bool = False
    python: str = "${DCFT_PYTHON:-python}"
    before: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * self.local_ranks

    @property
    def local_ranks(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 2


def load_site(environment: dict[str, str] | None = None) -> Site:
    """The site file that DCFT_SITE names; an empty site without it.

    Raises:
        ConfigError: it does not exist, is no TOML, or has unknown keys.
    """
    path = (os.environ if environment is None else environment).get("DCFT_SITE")
    if not path:
        return Site()
    try:
        return Site.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"DCFT_SITE: {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        known = Site.model_fields
        problems = [
            f"{d['loc'][0]}: {d['msg']}" + (did_you_mean(str(d["loc"][0]), known) if d["type"] == "extra_forbidden" else "")
            for d in error.errors()
        ]
        raise ConfigError(f"{path}: {'; '.join(problems)}") from error


# -- sbatch ------------------------------------------------------------------------------------------------------------

_BODY = r"""
# -- a warning from Slurm becomes a file that the ranks look for at each step: a signal would end torchrun --
export DCFT_STOP_FILE=$PWD/.dcft-stop-$SLURM_JOB_ID
rm -f "$DCFT_STOP_FILE"
pid=
trap 'touch "$DCFT_STOP_FILE"; ( sleep "${DCFT_GRACE_S:-@GRACE@}"; [ -z "$pid" ] || kill "$pid" ) 2>/dev/null &' USR1
again() { # the bare id of an array would mean all of its tasks
    rm -f "$DCFT_STOP_FILE"
    if scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; then exit 0; fi
    exit 75
}

# -- the nodes --
nodes=${SLURM_NNODES:?start this with sbatch} restart=${SLURM_RESTART_COUNT:-0}
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ -n "${DCFT_HEAD_ADDRESS:-}" ]; then
    address=$DCFT_HEAD_ADDRESS
else
    address=$(srun --nodes=1 --ntasks=1 -w "${names[0]}" hostname --ip-address | awk '{print $1}')
    case $address in 127.*) address=${names[0]} ;; esac   # a host that resolves its own name to loopback
fi
port=${DCFT_PORT:-$((20000 + (SLURM_JOB_ID + 97 * restart) % 20000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# -- bad input, and nodes that cannot reach each other: found before any rank starts, and not tried again --
"${one[@]}" -m dcft_dist.cli check "$@" --ranks $((nodes * ranks))
[ "$nodes" = 1 ] || srun "${each[@]}" --kill-on-bad-exit=0 \
    "${run[@]}" -m dcft_dist.meet "$address" "$port" "${DCFT_MEET_S:-60}" "${names[@]}"
[ ! -e "$DCFT_STOP_FILE" ] || again

# -- the ranks: torchrun on each node --
export PET_TEE=3 DCFT_LOGS=${DCFT_LOGS:-logs}/$SLURM_JOB_ID.$restart   # PET_*: torchrun's options
# shellcheck disable=SC2016 # expanded on each node
node='export PET_LOG_DIR=$DCFT_LOGS/$SLURMD_NODENAME PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0)); exec "$@"'
srun "${each[@]}" --kill-on-bad-exit=1 --label bash -c "$node" _ \
    "${run[@]}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts $((nodes == 1 ? 2 : 0)) \
    --rdzv-id "$SLURM_JOB_ID.$restart" --rdzv-backend c10d --rdzv-endpoint "$address:$port" \
    -m dcft_dist.cli train "$@" &
pid=$!
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done   # a trapped signal ends `wait`, not srun

# -- finished, to be started again, or failed for good? --
code=0
"${one[@]}" -m dcft_dist.cli status "$@" --verdict || code=$?
[ "$code" != 75 ] || again
rm -f "$DCFT_STOP_FILE"
exit "$code"
"""


def render_sbatch(job: Job, site: Site) -> str:
    """The text of an sbatch file that runs by itself."""
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in job.title)]
    lines += [f"#SBATCH {option}" for option in _options(job, site)]
    if site.setup or site.environment:
        lines += ["", "# -- the site --", *site.setup]  # modules and conda know nothing of `set -u`
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
        # The number of tasks is not taken from the job: it is that of the first start, which may have had more nodes.
        'each=(--ntasks="${SLURM_NNODES:?start this with sbatch}" '
        + f"--ntasks-per-node=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}{options})",
        "one=(" + (f'srun --nodes=1 --ntasks=1{options} "${{run[@]}}")' if options else '"${run[@]}")'),
    ]
    return "\n".join(lines) + "\n" + _BODY.replace("@GRACE@", str(GRACE_S))


def _quoted(word: str) -> str:
    """As `shlex.quote`, and with quotes around commas, which look like a mistake in an array of the shell."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def _arguments(job: Job) -> list[str]:
    """Sets "$@" to the arguments of `dcft train`."""
    words = " ".join(map(shlex.quote, job.overrides))
    if job.fixed:
        return [f'set -- {shlex.quote(job.config)} {words + " " if words else ""}"$@"']
    return [f"[ $# -gt 0 ] || set -- {job.config}", *([f'set -- "$1" {words} "${{@:2}}"'] if words else [])]


def _options(job: Job, site: Site) -> list[str]:
    found = [
        f"--job-name={job.name}",
        f"--output={'%x-%A_%a' if job.array else '%x-%j'}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{SIGNAL_S}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
    ]
    if job.array:
        found.append(f"--array={job.array}")
    if job.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        found.append(f"--{site.gpu_option}={'gpu:' if site.gpu_option == 'gres' else ''}{kind}{job.gpus_per_node}")
    if cpus := job.cpus_per_task or (site.cpus_per_gpu and site.cpus_per_gpu * job.local_ranks):
        found.append(f"--cpus-per-task={cpus}")
    if time := job.time or site.time:
        found.append(f"--time={time}")
    found += [f"--{key}={getattr(site, key)}" for key in ("partition", "account", "qos", "constraint") if getattr(site, key)]
    return found + site.sbatch


_USAGE = (
    "Submit from a folder that all nodes share, with an environment active that has dcft_dist; partition, account, time by",
    "options of sbatch or SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT; GPUs by --gpus-per-node (docs/clusters.md).",
    "Warned of its end or of preemption, or after a node has failed, the job goes back into the queue and then goes on.",
)
_SWEEP = """\
# task i of the array: one of seeds x fractions x factors; each seed's head and scores may come from an earlier job
read -ra seeds <<< "${DCFT_SEEDS:-0 1}"
read -ra fractions <<< "${DCFT_FRACTIONS:-0.1}"
read -ra factors <<< "${DCFT_FACTORS:-0.1 1.0}"
i=${SLURM_ARRAY_TASK_ID:?submit this with --array} base=$(basename "$1" .toml)
stage=${DCFT_STAGE:-all}   # all, or one of score (array over seeds), select (seeds x fractions), train
[ "$stage" != score ] || fractions=(0.1)
case $stage in score | select) factors=(0.1) ;; esac
count=$((${#seeds[@]} * ${#fractions[@]} * ${#factors[@]}))
[ "$i" -lt "$count" ] || { echo "dcft: error: array task $i of $count: use --array=0-$((count - 1))" >&2; exit 2; }
seed=${seeds[i / (${#fractions[@]} * ${#factors[@]})]} fraction=${fractions[i / ${#factors[@]} % ${#fractions[@]}]}
factor=${factors[i % ${#factors[@]}]}
runs=${DCFT_RUNS_DIR:-runs} scored=${base}_seed${seed}; selected=${scored}_top${fraction}
case $stage in
    score) more=(--name "$scored" --until score) ;;
    select) more=(--name "$selected" --until select --start_from "$runs/$scored" --selection.fraction "$fraction") ;;
    train) more=(--name "${selected}_x${factor}" --start_from "$runs/$selected") ;;
    all) more=(--name "${selected}_x${factor}") ;;
    *) echo "dcft: error: DCFT_STAGE is $stage, not score, select, train or all" >&2; exit 2 ;;
esac
case $stage in train | all) more+=(--selection.fraction "$fraction" --penalty.factor "$factor") ;; esac
set -- "$1" --runs_dir "$runs" --seed "$seed" "${more[@]}" "${@:2}\""""

FILES: dict[str, Job] = {
    "single_node.sbatch": Job(
        title=(
            "One run on one node:",
            "  sbatch --gpus-per-node 4 slurm/single_node.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
    ),
    "multi_node_fsdp2.sbatch": Job(
        title=(
            "One run over several nodes under FSDP2:",
            "  sbatch --nodes 4 --gpus-per-node 8 slurm/multi_node_fsdp2.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        nodes=2,
        overrides=("--engine", "fsdp2"),
    ),
    "multi_node_zero3.sbatch": Job(
        title=(
            "One run over several nodes under DeepSpeed ZeRO-3:",
            "  sbatch --nodes 4 --gpus-per-node 8 slurm/multi_node_zero3.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        nodes=2,
        overrides=("--engine", "deepspeed", "--sharding.zero_stage", "3"),
    ),
    "sweep.sbatch": Job(
        title=(
            "Many runs, seeds x fractions x factors, one array task each (on one node, or on --nodes):",
            '  DCFT_SEEDS="0 1 2" DCFT_FRACTIONS="0.05 0.1" DCFT_FACTORS="0 0.1 1" \\',
            "      sbatch --array=0-17 --gpus-per-node 4 slurm/sweep.sbatch configs/icd.toml [--key value ...]",
            *_USAGE,
        ),
        array="0-3",
        before=tuple(_SWEEP.splitlines()),
    ),
}


# -- submitting --------------------------------------------------------------------------------------------------------


def plan_job(config_path: str, overrides: Sequence[str], *, smoke: bool, site: Site, **sizes: Any) -> tuple[Job, Config]:
    """The job of a configuration, checked as far as that can be done before it is submitted.

    Raises:
        ConfigError: the configuration is wrong, its batches do not divide among the ranks, or runs_dir cannot be written.
    """
    more = list(overrides)
    if site.runs_dir and not any(word.split("=")[0] == "--runs_dir" for word in more):
        more = ["--runs_dir", site.runs_dir, *more]
    config = load_config(config_path, more)
    if smoke:
        size = f"{sizes['nodes']}x{Job(**sizes).local_ranks}"
        more += ["--train.max_steps", str(SMOKE_STEPS), "--name", f"{config.name}_smoke_{size}"]
        config = load_config(config_path, more)
    path = find_config(config_path)
    job = Job(
        name=config.name,
        title=(f"{config.name}: written by dcft submit",),
        config=str(path.resolve()),
        overrides=tuple(more),
        fixed=True,
        python="python" if site.container or site.srun or site.setup else sys.executable,
        **sizes,
    )
    check_ranks(config, job.ranks)
    runs = Path(config.runs_dir).absolute()
    there = next(folder for folder in (runs, *runs.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"runs_dir: {runs} cannot be written")
    return job, config


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
    rows = [line.split() for line in _slurm("sinfo", "--noheader", "--format=%R %D %G").splitlines()]
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
    return _slurm("sbatch", "--parsable", str(file)).strip().split(";")[0]


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError(f"there is no {command[0]} here") from None
    if done.returncode:
        text = done.stderr.strip().splitlines()
        raise RunError(f"{command[0]}: {text[-1] if text else f'exit code {done.returncode}'}")
    return done.stdout


# -- torchrun, where there is no Slurm ---------------------------------------------------------------------------------


def render_torchrun(job: Job, site: Site) -> str:
    """Shell lines to run on each node."""
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


# -- submitit ----------------------------------------------------------------------------------------------------------


class Task:
    """What submitit starts in every rank: `dcft train`, and the requeue when the run was asked to stop."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> str:
        """Returns the run's last word.

        Raises:
            RunError: it failed for good.
        """
        from submitit.helpers import TorchDistributedEnvironment

        from . import life
        from .run_folder import RunFolder
        from .start import train

        life.listen_for_stop()
        world = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        config = load_config(self.arguments[0], self.arguments[1:])
        if world.rank == 0:
            threading.Thread(target=_requeue_if_stuck, daemon=True).start()
        error: Exception | None = None
        try:
            if train(config):
                return "it is done"
        except Exception as caught:
            error = caught
            print(f"dcft: error: {error}" if isinstance(error, DcftError) else traceback.format_exc(), flush=True)
            if isinstance(error, DcftError) and error.exit_code == 2:
                raise
        time.sleep(30.0 * min(world.rank, 4))  # rank 0 decides what follows; if it is gone, the next one does
        if error is not None:
            folder = RunFolder.of(config)
            found, why = life.verdict(folder.path, folder.reached(), config.max_attempts, config.until)
            if found == "failed":
                raise RunError(why)
        _requeue()
        time.sleep(300.0)  # until Slurm ends this process
        raise RunError(f"scontrol requeue {os.environ['SLURM_JOB_ID']} had no effect")


def _requeue() -> None:
    _slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def _requeue_if_stuck() -> None:
    """Once Slurm has warned, ranks in a phase without steps are not waited for longer than DCFT_GRACE_S."""
    from .life import stop_requested

    while not stop_requested():
        time.sleep(0.5)
    time.sleep(float(os.environ.get("DCFT_GRACE_S", GRACE_S)))
    _requeue()


def submitit_executor(job: Job, site: Site, folder: Path) -> Any:
    """submitit's executor for the job.

    Raises:
        RunError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise RunError("submitit is missing: pip install 'dcft_dist[slurm]'") from error
    python = shlex.join([*site.container, job.python])
    executor = submitit.SlurmExecutor(folder=folder / "submitit", max_num_timeout=10**6, python=python)
    options = dict(option.removeprefix("--").partition("=")[::2] for option in _options(job, site))
    for key in (
        "job-name",
        "output",
        "signal",
        "nodes",
        "ntasks-per-node",
        "array",
        "requeue",
        "open-mode",
        "cpus-per-task",
    ):
        options.pop(key, None)
    cpus = job.cpus_per_task // job.local_ranks if job.cpus_per_task else site.cpus_per_gpu
    executor.update_parameters(
        job_name=job.name,
        nodes=job.nodes,
        ntasks_per_node=job.local_ranks,
        cpus_per_task=cpus,
        gpus_per_node=options.pop("gpus-per-node", None),
        time=options.pop("time", None),  # submitit's own default is five minutes
        setup=[*site.setup, *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items())],
        srun_args=[*site.srun, *([f"--cpus-per-task={cpus}"] if cpus else [])],  # srun does not inherit it
        signal_delay_s=SIGNAL_S,
        additional_parameters={"requeue": True, **{key.replace("-", "_"): value or True for key, value in options.items()}},
    )
    return executor


def submit_submitit(job: Job, site: Site, folder: Path) -> Any:
    """Submits through submitit; returns its job."""
    return submitit_executor(job, site, folder).submit(Task([job.config, *job.overrides]))
