"""One description of a job: its size, its configuration, and what is particular to a site."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..config.checks import check_ranks
from ..config.schema import Config
from ..config.section import Section
from ..config.toml import find_config, load_config
from ..errors import ConfigError, did_you_mean

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


# -- submitting --------------------------------------------------------------------------------------------------------


def make_job(config_path: str, overrides: Sequence[str], *, smoke: bool, site: Site, **sizes: Any) -> tuple[Job, Config]:
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
