"""Description of a job: its size, its configuration, and the settings of the site."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from ..config.checks import check_ranks
from ..config.schema import Config
from ..config.section import Count, OneLine, Section
from ..config.toml import find_config, load_config
from ..errors import ConfigError, did_you_mean

SMOKE_STEPS = 20  # steps of `dcft submit --smoke`


SIGNAL_S = 120  # seconds before the time limit at which Slurm signals the job, which then saves a checkpoint


GRACE_S = 90  # seconds to wait, after the signal, for ranks in a phase without steps


_TIME = r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+|\d+-\d+:\d+|\d+-\d+:\d+:\d+|UNLIMITED"


def _time_limit(text: str) -> str:
    if not re.fullmatch(_TIME, text, re.ASCII):
        raise ValueError(f"{text!r} is no time limit: write minutes, 24:00:00 or 2-00:00:00 (days first)")
    return text


TimeLimit = Annotated[str, AfterValidator(_time_limit)]


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Site(Section):
    """Settings of a cluster, from the file that DCFT_SITE names. Every key is optional."""

    partition: OneLine | None = Field(None, description="Partition (queue).")
    account: OneLine | None = Field(None, description="Account or project to charge.")
    qos: OneLine | None = Field(None, description="Quality of service.")
    constraint: OneLine | None = Field(None, description="Features that nodes must have.")
    time: TimeLimit | None = Field(None, description="Time limit in the format of sbatch (`24:00:00`).")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="Option of sbatch that requests GPUs.")
    gpu_type: OneLine | None = Field(None, description="Type of GPU, for sites with several (`a100`).")
    cpus_per_gpu: Count | None = Field(None, description="CPU cores for each rank.")
    sbatch: list[OneLine] = Field([], description="Additional options of sbatch (`--exclusive`, `--mem=0`).")
    setup: list[str] = Field([], description="Shell lines that run first (`module load ...`, `source .../activate`).")
    environment: dict[Variable, str] = Field(
        {}, description="Environment variables (`NCCL_SOCKET_IFNAME`, `HF_HUB_OFFLINE`)."
    )
    container: list[OneLine] = Field([], description="Words before python (`apptainer exec --nv dcft.sif`).")
    srun: list[OneLine] = Field([], description="Additional options of srun (pyxis: `--container-image=...`).")
    runs_dir: str | None = Field(None, description="Directory of all runs, on a file system that all nodes share.")


@dataclass(frozen=True)
class Job:
    """One run, or an array of runs, on some nodes.

    Attributes:
        name: name of the job.
        title: comment lines at the top of the sbatch file.
        config: configuration file, or the name of a shipped one.
        overrides: overrides of the configuration, as for `dcft train`. Overrides given to sbatch come after them.
        nodes: number of nodes.
        gpus_per_node: number of GPUs to request on each node; 0: none are requested.
        ranks_per_node: None: a rank for each GPU, or two ranks without GPUs.
        cpus_per_task: CPU cores of a node. None: `Site.cpus_per_gpu` for each rank, if set.
        time: time limit (`24:00:00`). None: that of the site.
        array: indices of an array job (`0-3`). None: not an array.
        fixed: True: the sbatch file contains the configuration and the sizes. False: it takes them from its arguments and
            from Slurm.
        python: interpreter on the nodes.
        before: shell lines between set-up and start; an array job derives its settings from its index there.
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
        """Number of ranks on all nodes."""
        return self.nodes * self.local_ranks

    @property
    def local_ranks(self) -> int:
        """Number of ranks on one node."""
        return self.ranks_per_node or self.gpus_per_node or 2


def load_site(environment: dict[str, str] | None = None) -> Site:
    """Reads the site file that DCFT_SITE names.

    Args:
        environment: environment variables; None: those of this process.

    Returns:
        The site; one without settings if DCFT_SITE is not set.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or keys or values are wrong.
    """
    path = (os.environ if environment is None else environment).get("DCFT_SITE")
    if not path:
        return Site()
    try:
        return Site.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"DCFT_SITE: {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        known, problems = Site.model_fields, []
        for found in error.errors():
            key = ".".join(map(str, found["loc"]))
            guess = did_you_mean(key, known) if found["type"] == "extra_forbidden" else ""
            problems.append(f"{key}: {found['msg'].removeprefix('Value error, ')}{guess}")
        raise ConfigError(f"{path}: {'; '.join(problems)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error


# -- submitting --------------------------------------------------------------------------------------------------------


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Checks the sizes of a job.

    Raises:
        ConfigError: one is too small, or the time limit is none.
    """
    least = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_task": 1}
    for key, number in least.items():
        if sizes.get(key) is not None and sizes[key] < number:
            raise ConfigError(f"--{key.replace('_', '-')} is {sizes[key]}: give at least {number}")
    try:
        _time_limit(sizes.get("time") or "1")
    except ValueError as error:
        raise ConfigError(f"--time: {error}") from error


_VARIABLES = {"account", "constraint", "exclusive", "gres", "partition", "qos", "reservation"}  # sbatch reads SBATCH_...
_OF_SBATCH = _VARIABLES | {"dependency", "exclude", "licenses", "mail-type", "mail-user", "mem", "mem-per-cpu", "nodelist"}


def _refuse_sbatch_options(words: Sequence[str]) -> None:
    """Says where options of sbatch belong.

    Raises:
        ConfigError: there is one among the words.
    """
    for name in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
        if name in _OF_SBATCH:
            key = name if name in Site.model_fields else f"sbatch = ['--{name}=...']"
            variable = f", or set SBATCH_{name.upper()}" if name in _VARIABLES else ""
            raise ConfigError(
                f"--{name} is an option of sbatch: put {key} into the TOML file that DCFT_SITE names "
                f"(docs/clusters.md){variable}"
            )


def make_job(config_path: str, overrides: Sequence[str], *, smoke: bool, site: Site, **sizes: Any) -> tuple[Job, Config]:
    """Makes the job of a configuration, and checks everything that can be checked before it is submitted.

    Args:
        config_path: configuration file, or the name of a shipped one.
        overrides: overrides of the configuration, as for `dcft train`.
        smoke: True: run only `SMOKE_STEPS` steps, under another name.
        site: settings of the cluster.
        sizes: `nodes`, and if needed `gpus_per_node`, `ranks_per_node`, `cpus_per_task` and `time` (see `Job`).

    Returns:
        The job, and its configuration with all overrides.

    Raises:
        ConfigError: the configuration is wrong, the ranks cannot share its batches equally, or runs_dir cannot be written.
    """
    words = list(overrides)
    _refuse_sbatch_options(words)
    _check_sizes(sizes)
    if site.runs_dir and not any(word.split("=")[0] == "--runs_dir" for word in words):
        words = ["--runs_dir", site.runs_dir, *words]
    config = load_config(config_path, words)
    if smoke:
        size = f"{sizes['nodes']}x{Job(**sizes).local_ranks}"
        words += ["--train.max_steps", str(SMOKE_STEPS), "--name", f"{config.name}_smoke_{size}"]
        config = load_config(config_path, words)
    path = find_config(config_path)
    job = Job(
        name=config.name,
        title=(f"{config.name}: written by dcft submit",),
        config=str(path.resolve()),
        overrides=tuple(words),
        fixed=True,
        python="python" if site.container or site.srun or site.setup else sys.executable,
        **sizes,
    )
    check_ranks(config, job.ranks)
    runs = Path(config.runs_dir).absolute()
    nearest = next(folder for folder in (runs, *runs.parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ConfigError(f"runs_dir: {runs} cannot be written")
    return job, config
