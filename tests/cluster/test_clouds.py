"""The files for Kubernetes and SkyPilot are valid, and their parts fit together. test_slurm.py runs their scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


def test_kubernetes_takes_the_job_and_its_service() -> None:
    for part in kubernetes():
        kubernetes_validate.validate(part, "1.31", strict=True)
    job = kubernetes()[1]
    job["spec"]["complettions"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="complettions"):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_pods_find_each_other_and_have_their_gpus() -> None:
    service, job = kubernetes()
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["HEAD"] == f"{name}-0.{service['metadata']['name']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert int(variables["NODES"]) == spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert variables["RANKS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/shared", "/dev/shm"} and variables["RUNS_DIR"].startswith("/shared/")
    assert variables["DCFT_STOP_FILE"] in container["lifecycle"]["preStop"]["exec"]["command"][2]


def test_the_task_of_skypilot() -> None:
    """Its keys are those of a task; every variable of the script is the task's own or SkyPilot's."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "workdir", "resources", "volumes", "envs", "setup", "run"}
    assert all(task["envs"]["RUNS_DIR"].startswith(f"{place}/") for place in task["volumes"])
    assert 'launch/torchrun_multi_node.sh "$CONFIG" --runs_dir "$RUNS_DIR"' in task["run"]
