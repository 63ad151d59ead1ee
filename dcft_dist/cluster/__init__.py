"""Jobs on a cluster: sbatch files, submitit and torchrun from one description of a job.

`render_sbatch(job, site)` (in `cluster.render`) writes an sbatch file that runs by itself.
"""

from importlib import import_module
from typing import Any

# Jobs that were queued before this package was split are pickled with `Task`. The others are used in copies of
# `launch/with_submitit.py`.
_FORMER = {
    "Task": ("submitit_job", "SubmititTask"),
    "submit_submitit": ("submitit_job", "submit_submitit"),
    "load_site": ("job", "load_site"),
    "plan_job": ("job", "make_job"),
    "check_cluster": ("submit", "check_cluster"),
}


def __getattr__(name: str) -> Any:
    """A name that this package had as a single module."""
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, present = _FORMER[name]
    return getattr(import_module(f".{module}", __name__), present)
