"""A job becomes the text that sbatch, torchrun and users are to see."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from dcft_dist.cluster.job import Job, Site, load_site, make_job
from dcft_dist.cluster.node_check import meet
from dcft_dist.cluster.render import render_sbatch, render_torchrun
from dcft_dist.cluster.shipped_files import FILES
from dcft_dist.cluster.submit import _num_gpus
from dcft_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"

SITE = Site(
    partition="gpu", account="med42", qos="normal", constraint="a100", time="12:00:00", gpu_option="gres", gpu_type="a100",
    cpus_per_gpu=8, sbatch=["--exclusive"], setup=["module load cuda/12.8", "source /proj/med42/venv/bin/activate"],
    environment={"NCCL_SOCKET_IFNAME": "ib0", "HF_HUB_OFFLINE": "1"}, srun=["--mpi=none"], runs_dir="/scratch/runs",
    container=["apptainer", "exec", "--nv", "/proj/dcft.sif"],
)  # fmt: skip

PYXIS = Site(
    partition="gpu", account="med42", sbatch=["--reservation=course"], runs_dir="/scratch/runs",
    srun=["--container-image=/proj/dcft.sqsh", "--container-mounts=/scratch,/proj"],
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_files_of_slurm_are_what_is_rendered(name: str) -> None:
    assert (ROOT / "slurm" / name).read_text() == render_sbatch(FILES[name], Site()), "run: dcft slurm-files slurm"


def golden_job(name: str) -> tuple[Job, Site]:
    sizes = {"gpus_per_node": 8, "ranks_per_node": None, "cpus_per_task": None}
    if name == "site":
        job, _ = make_job("icd.toml", ["--seed", "3"], smoke=False, site=SITE, nodes=4, time="1:00:00", **sizes)
        return job, SITE
    if name == "pyxis":
        job, _ = make_job("icd.toml", ["--engine", "deepspeed"], smoke=False, site=PYXIS, nodes=2, time="8:00:00", **sizes)
        return job, PYXIS
    job, _ = make_job("icd.toml", ["--name", "it"], smoke=True, site=Site(), nodes=1, time=None, **sizes)
    return job, Site()


@pytest.mark.parametrize("name", ["site", "pyxis", "smoke"])
@pytest.mark.parametrize("way", ["sbatch", "torchrun"])
def test_rendered_text_is_the_golden_file(name: str, way: str) -> None:
    """After a change that is meant: delete the golden files, run this once, and read them."""
    job, site = golden_job(name)
    text = (render_sbatch if way == "sbatch" else render_torchrun)(job, site)
    for here, there in ((sys.executable, "/home/me/venv/bin/python"), (str(ROOT), "/home/me/dcft_dist")):
        text = text.replace(here, there)  # in this order: an environment may lie inside the project
    file = GOLDEN / f"{name}.{way}"
    if not file.exists():
        file.write_text(text)
        pytest.fail(f"{file.name} was missing and has been written: read it, then run this again")
    assert file.read_text() == text


def test_gpus_of_a_node() -> None:
    two = "gpu:a100:4(S:0-1),gpu:v100:2(S:0)"
    found = [_num_gpus(*case) for case in ((two, None), (two, "a100"), (two, "h100"), ("gpu:8", None), ("(null)", None))]
    assert found == [6, 4, 0, 8, 0]


def test_site_files(tmp_path: Path) -> None:
    assert load_site({}) == Site()
    file = tmp_path / "site.toml"
    file.write_text('partition = "gpu"\n[environment]\nA = "1"\n')
    assert load_site({"DCFT_SITE": str(file)}) == Site(partition="gpu", environment={"A": "1"})
    for text, message in {
        "partiton = 'x'": "partiton: Extra inputs are not permitted .did you mean 'partition'",
        "gpu_option = 'x'": "gpu_option: ",
        "[": "not a TOML file",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_site({"DCFT_SITE": str(file)})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_site({"DCFT_SITE": str(tmp_path / "no.toml")})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def meet_all(
    nodes: list[str], present: list[str], port: int, timeout_s: float = 3.0, secrets: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What each node says. `secrets`: of nodes that have another than the others."""
    found: dict[str, str] = {}

    def one(me: str) -> None:
        found[me] = meet(me, "127.0.0.1", port, nodes, timeout_s, (secrets or {}).get(me, "a secret"))

    threads = [threading.Thread(target=one, args=(me,)) for me in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_nodes_meet_and_leave_the_port_free() -> None:
    port, nodes = free_port(), ["a", "b", "c"]
    for _ in range(2):
        assert meet_all(nodes, nodes, port) == {"a": "", "b": "", "c": ""}
    found = meet_all(nodes, ["a", "b"], port, 1.0)
    assert found["a"] == f"a: no contact from c on 127.0.0.1 port {port} within 1 s"
    assert found["b"] == f"b: cannot reach the head node a at 127.0.0.1 port {port} (other nodes were missing)"
    with socket.create_server(("127.0.0.1", port)):
        assert (
            meet("a", "127.0.0.1", port, nodes, 1.0, "") == f"a: port {port} cannot be opened here: Address already in use"
        )
    assert meet("b", "127.0.0.1", port, nodes, 0.5, "").endswith("(Connection refused)")
