"""What was written before the modules moved still works: import paths in users' code, queued jobs, copied sbatch files."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

import dcft_dist
from dcft_dist import cluster
from dcft_dist.cluster.job import load_site, make_job
from dcft_dist.cluster.submit import check_cluster
from dcft_dist.cluster.submitit_job import SubmititTask, submit_submitit


def test_public_names_come_from_the_package() -> None:
    for name in dcft_dist.__all__:
        assert getattr(dcft_dist, name).__name__ == name


@pytest.mark.parametrize(
    ("former", "present"), [("hf", "integrations.transformers"), ("lightning", "integrations.lightning")]
)
def test_callbacks_are_where_they_were(former: str, present: str) -> None:
    here, there = (importlib.import_module(f"dcft_dist.{name}") for name in (former, present))
    assert here.DCFTCallback is there.DCFTCallback


def test_a_job_that_submitit_pickled_before_the_move_is_read() -> None:
    """Pickled by reference, as `dcft_dist.cluster.Task`."""
    before = (
        b"ccopy_reg\n_reconstructor\n(cdcft_dist.cluster\nTask\nc__builtin__\nobject\nNtR(dVarguments\n(lVicd.toml\nasb."
    )
    task = pickle.loads(before)
    assert type(task) is SubmititTask and task.arguments == ["icd.toml"]


def test_copies_of_the_submitit_script_find_their_names() -> None:
    found = [getattr(cluster, name) for name in ("load_site", "plan_job", "check_cluster", "submit_submitit")]
    assert found == [load_site, make_job, check_cluster, submit_submitit]
    with pytest.raises(AttributeError, match="has no attribute 'load_sites'"):
        cluster.load_sites  # noqa: B018


def test_the_node_check_of_a_copied_sbatch_file_runs() -> None:
    """`python -m dcft_dist.meet ADDRESS PORT SECONDS NODE`: one node, which meets itself."""
    words = [sys.executable, "-m", "dcft_dist.meet", "127.0.0.1", "29871", "20", "node0"]
    done = subprocess.run(["env", "SLURMD_NODENAME=node0", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    late = subprocess.run(
        ["env", "SLURMD_NODENAME=node0", *words[:5], "1", "node0", "node1"], capture_output=True, text=True
    )
    assert late.returncode == 1 and "node0: no contact from node1" in late.stderr
