"""A job that submitit starts: the task of every rank, and the requeue after a stop."""

from __future__ import annotations

import os
import shlex
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.toml import load_config
from ..errors import DcftError, RunError
from .job import GRACE_S, SIGNAL_S, Job, Site
from .render import sbatch_options
from .submit import run_slurm


class SubmititTask:
    """The task that submitit starts in every rank: it trains, and requeues the job if the run is not finished."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """
        Args:
            arguments: arguments of `dcft train`: the configuration, then its overrides.
        """
        self.arguments = list(arguments)

    def __call__(self) -> str:
        """Trains on this rank. If the run should be started again, requeues the job and does not return.

        Returns:
            `it is done`, when the run is finished.

        Raises:
            DcftError: an error that another start cannot avoid.
            RunError: the run failed for good, or the requeue had no effect.
        """
        from submitit.helpers import TorchDistributedEnvironment

        from ..runs.folder import RunFolder
        from ..runs.status import run_verdict
        from ..runs.stop import listen_for_stop
        from ..train.run import train

        listen_for_stop()
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
        time.sleep(30.0 * min(world.rank, 4))  # rank 0 decides first; if it is gone, the next rank decides
        if error is not None:
            folder = RunFolder.of(config)
            verdict, reason = run_verdict(folder.path, folder.reached(), config.max_attempts, config.until)
            if verdict == "failed":
                raise RunError(reason)
        _requeue()
        time.sleep(300.0)  # until Slurm ends this process
        raise RunError(f"scontrol requeue {os.environ['SLURM_JOB_ID']} had no effect")


def _requeue() -> None:
    run_slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def _requeue_if_stuck() -> None:
    """After a request to stop, waits DCFT_GRACE_S seconds for ranks in a phase without steps, then requeues the job."""
    from ..runs.stop import stop_requested

    while not stop_requested():
        time.sleep(0.5)
    time.sleep(float(os.environ.get("DCFT_GRACE_S", GRACE_S)))
    _requeue()


def submitit_executor(job: Job, site: Site, folder: Path) -> Any:
    """Makes submitit's executor for a job.

    Args:
        job: size and configuration.
        site: settings of the cluster.
        folder: the run's directory; submitit's files go to `submitit` in it.

    Raises:
        RunError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise RunError("submitit is missing: pip install 'dcft_dist[slurm]'") from error
    python = shlex.join([*site.container, job.python])
    executor = submitit.SlurmExecutor(folder=folder / "submitit", max_num_timeout=10**6, python=python)
    options = dict(option.removeprefix("--").partition("=")[::2] for option in sbatch_options(job, site))
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
    """Submits a job through submitit.

    Args:
        job: size and configuration.
        site: settings of the cluster.
        folder: the run's directory.

    Returns:
        The job as submitit represents it: `job_id`, `done()`, `results()`.

    Raises:
        RunError: submitit is not installed.
    """
    return submitit_executor(job, site, folder).submit(SubmititTask([job.config, *job.overrides]))
