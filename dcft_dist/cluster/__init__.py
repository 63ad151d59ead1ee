"""Jobs on a cluster: sbatch files, submitit and torchrun from one description of a job.

`render_sbatch(job, site)` (in `cluster.render`) writes an sbatch file that runs by itself.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`Task` is the former name of `SubmititTask`: jobs that were queued before the move are pickled with it."""
    if name != "Task":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .submitit_job import SubmititTask

    return SubmititTask
