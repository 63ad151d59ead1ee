"""Submits a run to Slurm through submitit, and waits for it. Copy this file for your own sweeps.

python launch/with_submitit.py CONFIG [--nodes 2] [--gpus-per-node 4] [--ranks-per-node 4] [--time 1:00:00] [--key value ...]

DCFT_SITE names the file with the site settings. Before its time limit a job saves a checkpoint, and is requeued to continue.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from submitit.core.utils import FailedJobError, UncompletedJobError

from dcft_dist import DcftError
from dcft_dist.cluster.job import load_site, make_job
from dcft_dist.cluster.submit import check_cluster
from dcft_dist.cluster.submitit_job import submit_submitit


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("config")
    for option, kind in (("nodes", int), ("gpus-per-node", int), ("ranks-per-node", int), ("time", str)):
        parser.add_argument(f"--{option}", type=kind, default={"nodes": 1, "gpus-per-node": 0}.get(option))
    options, overrides = parser.parse_known_args()
    sizes = {key: value for key, value in vars(options).items() if key != "config"}
    site = load_site()
    job, config = make_job(options.config, overrides, smoke=False, site=site, **sizes)
    check_cluster(job, site)
    folder = Path(config.runs_dir) / config.name
    submitted = submit_submitit(job, site, folder)
    print(f"job {submitted.job_id}; logs in {folder / 'submitit'}", flush=True)
    while not submitted.done():
        time.sleep(5)
    try:
        print(submitted.results()[0])
    except (FailedJobError, UncompletedJobError) as error:
        sys.exit(f"dcft: error: job {submitted.job_id} failed: {str(error).strip().splitlines()[-1]}")


if __name__ == "__main__":
    try:
        main()
    except DcftError as error:
        sys.exit(f"dcft: error: {error}")
