"""The files of slurm/ and launch/ on a real Slurm: they run as they are, and survive what clusters do to jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from dcft_dist.cluster.job import Job, Site
from dcft_dist.cluster.submitit_job import submitit_executor
from dcft_dist.studies.study import final_cells, load_study, make_config, make_preparation

from ..own import tiny_encoder
from ..slurm_cluster import Cluster, install, until
from .left import bits, differing, output, phase_of, step_of, summary, weights
from .test_render import golden_job

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"

# A small BERT, SGD: what one process gives, others give up to rounding.
CONFIG = """
extends = "smoke.toml"
name = "tiny"
log_every = 1
timeout_s = 60
test_resamples = 20
import_roots = ["ROOTS"]
[model]
build = "slow_encoder:encoder"
args = {folder = "WEIGHTS"}
weights = "WEIGHTS"
features = "mean"
[task]
train_per_class = 5
validation_per_class = 2
test_per_class = 2
[head_warmup]
max_epochs = 20
[importance]
num_samples = 32
score_batch = 16
[optimizer]
name = "sgd"
lr = 0.05
[train]
epochs = 1
global_batch = 16
micro_batch = 4
[removal]
fractions = []
"""


@pytest.fixture(scope="module")
def daemons() -> Iterator[Cluster]:
    missing = install()
    if missing:
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: paths of sockets have at most 107 characters
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def beside(daemons: Cluster, config: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """What takes long on nodes 0 and 1 goes on beside the tests on nodes 2 and 3: most of the time it waits for Slurm."""
    with ThreadPoolExecutor(1) as pool:
        folders = [tmp_path_factory.mktemp("beside") for _ in range(2)]
        for folder in folders:
            (folder / "tiny.toml").write_text(config)
        calm = pool.submit(calm_job, daemons, folders[0])
        yield Beside(calm, pool.submit(disturbed_job, daemons, folders[1]))
        pool.shutdown(wait=False, cancel_futures=True)
        daemons.run("scancel", "--user=root")


@pytest.fixture
def cluster(daemons: Cluster) -> Iterator[Cluster]:
    def idle() -> bool:
        return daemons.states()[2:] == ["idle"] * 2

    until("idle nodes", idle, 60, lambda: str(daemons.states()))
    yield daemons
    daemons.run("scancel", "--user=root", "--partition=spare")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_encoder(tmp_path_factory.mktemp("encoder"))
    return CONFIG.replace("ROOTS", str(Path(__file__).parent)).replace("WEIGHTS", str(folder))


@pytest.fixture
def site(tmp_path: Path, config: str) -> Path:
    """A folder to submit from."""
    (tmp_path / "tiny.toml").write_text(config)
    return tmp_path


@dataclass
class Beside:
    """`calm`: the folder of its runs."""

    calm: Future[Path]
    disturbed: Future[Disturbed]


@dataclass
class Disturbed:
    """`folder`: it was submitted from; `asked`: the number of each start that a disturbance caused, and a step before it."""

    folder: Path
    asked: dict[int, int]


# -- as they are -------------------------------------------------------------------------------------------------------


SPARE = {"SBATCH_PARTITION": "spare"}  # nodes 2 and 3
ONE = {"DCFT_RANKS_PER_NODE": "1"}  # imports take longer than steps here
STEPS = ("--train.epochs", "3", "--checkpoint.every", "1")  # 18 steps


def calm_job(cluster: Cluster, folder: Path) -> Path:
    """The runs of a job on two nodes, one rank each, that nothing disturbs."""
    file = str(SLURM / "multi_node_fsdp2.sbatch")
    job = cluster.sbatch("--nodelist=node[0-1]", file, "tiny.toml", "--name", "calm", *STEPS, cwd=folder, **ONE)
    assert cluster.end(job) == "COMPLETED", output(folder)
    for node in ("node0", "node1"):
        assert len(list((folder / "logs").glob(f"{job}.0/{node}/*/attempt_0/*/stdout.log"))) == 1  # one for each rank
    return folder / "runs"


def in_a_cloud(file: str) -> tuple[str, dict[str, str]]:
    """What a node runs, and its environment, as SkyPilot or Kubernetes have them: node 2 is the head, with one rank each."""
    parts = list(yaml.safe_load_all((ROOT / f"launch/{file}.yaml").read_text()))
    if file == "skypilot":
        given = {"NODE_IPS": "10.77.0.12\n10.77.0.13", "NUM_NODES": "2", "NUM_GPUS_PER_NODE": "1"}
        return parts[0]["run"], {f"SKYPILOT_{key}": value for key, value in given.items()}
    (container,) = parts[1]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    named = {entry["name"]: entry["value"] for entry in container["env"]} | {"HEAD": "10.77.0.12", "RANKS": "1"}
    return container["args"][0], {key: named[key] for key in ("HEAD", "NODES", "RANKS", "DCFT_STOP_FILE")}


@pytest.mark.timeout(900)
def test_sbatch_files_and_submitit_give_the_parameters_of_one_process(cluster: Cluster, site: Path, beside: Beside) -> None:
    """2 nodes x 2 ranks by torchrun under ZeRO-3, and by submitit, with a requeue in the middle, under FSDP2; 2 nodes with
    a rank each under FSDP2, by sbatch and by torchrun alone; 2 ranks on one node, one for each GPU."""
    launcher = [sys.executable, str(ROOT / "launch/with_submitit.py"), "tiny.toml", "--nodes", "2", "--ranks-per-node", "2"]
    single, zero3 = str(SLURM / "single_node.sbatch"), str(SLURM / "multi_node_zero3.sbatch")
    with cluster.started(*launcher, "--name", "by_submitit", *STEPS, cwd=site, **SPARE) as submitit:
        jobs = [
            cluster.sbatch(
                single, "tiny.toml", "--name", "single_node", *STEPS, cwd=site, SBATCH_GPUS_PER_NODE="2", **SPARE
            ),
            cluster.sbatch(zero3, "tiny.toml", "--name", "zero3", *STEPS, cwd=site, **SPARE),
        ]
        until("step 2", lambda: step_of(site, "by_submitit") >= 2, 300, lambda: output(site), 0.05)
        cluster.run("scancel", "--signal=USR2", "--name=by_submitit")  # as Slurm does ahead of the time limit
        (site / "no_slurm.toml").write_text(
            'extends = "tiny.toml"\nname = "no_slurm"\n[train]\nepochs = 3\n[checkpoint]\nevery = 1\n'
        )
        programs, files = f"{Path(sys.executable).parent}:{os.environ['PATH']}", ("skypilot", "kubernetes")
        shared = {"CONFIG": str(site / "no_slurm.toml"), "RUNS_DIR": str(site / "runs"), "PATH": programs}
        nodes = [
            subprocess.Popen(cluster.in_node(i, "bash", "-ec", f"cd {ROOT}\n{script}"), env=os.environ | shared | variables)
            for i, (script, variables) in zip((2, 3), map(in_a_cloud, files), strict=True)
        ]
        cli = [sys.executable, "-m", "dcft_dist.cli", "train", "tiny.toml"]
        cluster.run(*cli, "--name", "one", "--engine", "single", *STEPS, cwd=site)
        assert [process.wait(300) for process in nodes] == [0, 0]
        for job in jobs:
            assert cluster.end(job) == "COMPLETED", output(site)
        said = submitit.communicate(timeout=300)[0]
    assert "it is done" in said, said
    expected = weights(site / "runs", "one")
    runs = {"single_node": 2, "zero3": 4, "by_submitit": 4, "calm": 2, "no_slurm": 2}
    for name, ranks in runs.items():
        folder = beside.calm.result() if name == "calm" else site / "runs"
        assert summary(folder, name)["ranks"] == ranks
        for key, value in weights(folder, name).items():
            torch.testing.assert_close(
                value, expected[key], atol=5e-6, rtol=1e-5, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )
    assert summary(site / "runs", "zero3")["engine"] == "deepspeed"
    starts = (site / "runs/by_submitit/attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["restart"] for line in starts] == [0, 1]


@pytest.mark.timeout(900)
def test_sweep_that_scores_once(cluster: Cluster, site: Path, config: str) -> None:
    """Three arrays, each after the one before, give what a task that does it all gives, to the bit.

    Without arguments the configuration is configs/smoke.toml. One task of an array is asked to stop, and is requeued
    alone; the one that does it all is asked to while it scores, where nothing listens, and is ended after DCFT_GRACE_S."""
    (site / "configs").mkdir()
    smoke = config.replace('extends = "smoke.toml"\n', 'extends = "icd.toml"\n').replace('"tiny"', '"smoke"')
    (site / "configs/smoke.toml").write_text(smoke.replace("epochs = 1", "epochs = 3"))
    options = {"DCFT_SWEEP_FILE": str(SLURM / "sweep.sbatch"), "DCFT_FACTORS": "0.0 0.5", **ONE, **SPARE}
    more = {"DCFT_RUNS_DIR": "other", "DCFT_GRACE_S": "0"}
    name = "smoke_seed0_top0.1_x0.5"
    whole = cluster.sbatch("--array=1", options["DCFT_SWEEP_FILE"], cwd=site, **options, **more)
    until("scores", lambda: phase_of(site / "other" / name) == "score", 60, lambda: output(site), 0.02)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{whole}_1")
    chain = cluster.sbatch(str(SLURM / "score_select_train.sbatch"), cwd=site, **options)
    assert cluster.end(chain) == "COMPLETED", output(site)
    train = (site / f"dcft-chain-{chain}.out").read_text().strip().splitlines()[-1].rpartition(" ")[2]

    def started() -> list[dict[str, str]]:
        tasks = cluster.tasks(train)
        return tasks if len(tasks) == 2 and all(step_of(site, f"{name[:-3]}{x}") for x in ("0.0", "0.5")) else []

    until("both tasks at work", started, 240, lambda: output(site), 0.05)
    (eldest,) = (task for task in started() if task["JobId"] == train)  # it has the array's own id
    cluster.run("scancel", "--batch", "--signal=USR1", f"{train}_{eldest['ArrayTaskId']}")
    assert cluster.end(train) == "COMPLETED", output(site)
    assert cluster.end(whole) == "COMPLETED", output(site)
    assert {t["ArrayTaskId"]: t["Restarts"] for t in cluster.tasks(train)} == {
        i: str(int(i == eldest["ArrayTaskId"])) for i in ("0", "1")
    }
    assert [task["Restarts"] for task in cluster.tasks(whole)] == ["1"]
    names = {folder.name for folder in (site / "runs").iterdir()}
    assert names == {"smoke_seed0", "smoke_seed0_top0.1", "smoke_seed0_top0.1_x0.0", "smoke_seed0_top0.1_x0.5"}
    assert (site / "runs/smoke_seed0/scores.safetensors").exists()
    found, expected = summary(site / "runs", name), summary(site / "other", name)
    assert found["factor"] == 0.5 and "score" not in found["seconds"] and "score" in expected["seconds"]
    trained = bits(site / "runs", name)
    assert differing(trained, bits(site / "other", name)) == []
    assert differing(trained, bits(site / "runs", "smoke_seed0_top0.1_x0.0"))


@pytest.mark.timeout(600)
def test_dcft_submit(cluster: Cluster, site: Path) -> None:
    """A site file, a smoke test, and what is found before anything is submitted."""
    (site / "site.toml").write_text('partition = "spare"\n[environment]\nHF_HUB_OFFLINE = "1"\n')
    submit = [sys.executable, "-m", "dcft_dist.cli", "submit", "tiny.toml"]
    said = cluster.run(*submit, "--smoke", "--gpus-per-node", "2", "--ranks-per-node", "1", cwd=site, DCFT_SITE="site.toml")
    for arguments, expected in {
        ("--gpus-per-node", "4", "--ranks-per-node", "2"): "4 GPUs per node requested, but the nodes have 2",
        ("--nodes", "8", "--ranks-per-node", "1"): "8 nodes requested, but the partition has 4",
        ("--nodes", "3"): "train.global_batch 16 is not a multiple of 6 ranks",
        ("--runs_dir", "/dev/null/runs"): "runs_dir: /dev/null/runs cannot be written",
        ("--penalty.factr", "1"): "did you mean 'factor'?",
    }.items():
        done = cluster.call(*submit, *arguments, cwd=site)
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done
    (site / "bad.toml").write_text('partition = "norml"\n')
    done = cluster.call(*submit, cwd=site, DCFT_SITE="bad.toml")
    assert done.stderr == "dcft: error: no partition norml (did you mean 'normal'?); the cluster has normal, spare, urgent\n"
    done = cluster.call("env", "PATH=/nowhere", *submit, cwd=site)
    assert "sbatch is not installed on this machine" in done.stderr
    assert cluster.end(said.split()[1].rstrip(";")) == "COMPLETED", output(site)
    assert "s a step; all 6 steps" in output(site) and "GPU-hours" not in output(site)
    assert not (site / "runs/tiny_smoke_1x1/summary.json").exists()
    said = cluster.run(sys.executable, "-m", "dcft_dist.cli", "status", "runs/tiny_smoke_1x1", cwd=site)
    assert "s a step; all 6 steps" in said


# -- what clusters do to jobs ------------------------------------------------------------------------------------------


def disturbed_job(cluster: Cluster, folder: Path) -> Disturbed:
    """A warning of its end, a requeue, a preemption, the failure of a node and one cut off, one after the other.

    A slow machine may see more starts than disturbances: Slurm may give a node up that has just come back, and ranks that
    have ten seconds may miss each other. Then the job starts once more, as it should."""
    file, options = str(SLURM / "multi_node_fsdp2.sbatch"), ("--name", "disturbed", *STEPS, "--timeout_s", "10")
    job = cluster.sbatch("--nodelist=node[0-1]", file, "tiny.toml", *options, cwd=folder, **ONE)

    asked: dict[int, int] = {}

    def restarts() -> int:
        return int(cluster.job(job)["Restarts"])

    def reached(step: int) -> None:
        """In the start that is at work now: a former one may have been further than its last checkpoint."""
        until(f"step {step}", lambda: step_of(folder, "disturbed", restarts() + 1) >= step, 300, output_now, 0.05)
        asked[restarts() + 1] = step

    def output_now() -> str:
        return f"{cluster.job(job)}\n{output(folder)}"

    def restarted() -> None:
        until(f"restart {max(asked)}", lambda: restarts() >= max(asked), 240, output_now)

    reached(1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    restarted()
    reached(3)
    cluster.run("scontrol", "requeue", job)
    restarted()
    reached(5)
    urgent = cluster.sbatch("--partition=urgent", "--nodelist=node1", "--exclusive", "--wrap=sleep 1", cwd=folder)
    restarted()
    assert cluster.end(urgent) == "COMPLETED"
    reached(7)
    cluster.kill_node(0)  # where the batch script and rank 0 are
    restarted()
    cluster.repair_node(0)
    reached(9)
    cluster.cut(1)
    try:
        restarted()
    finally:
        cluster.cut(1, "up")  # Slurm has missed it long enough, and takes it back when it hears of it
    assert cluster.end(job) == "COMPLETED", output(folder)
    return Disturbed(folder, asked)


@pytest.mark.timeout(600)
def test_on_fewer_nodes_with_the_same_global_batch(cluster: Cluster, site: Path) -> None:
    file = str(SLURM / "multi_node_fsdp2.sbatch")
    job = cluster.sbatch(file, "tiny.toml", "--name", "fewer", *STEPS, cwd=site, **ONE, **SPARE)
    until("step 2", lambda: step_of(site, "fewer") >= 2, 90, lambda: output(site))
    cluster.run("scontrol", "requeuehold", job)
    until("the job to be held", lambda: cluster.job(job)["JobState"] == "PENDING", 60)
    cluster.run("scontrol", "update", f"jobid={job}", "numnodes=1", "numtasks=1")
    cluster.run("scontrol", "release", job)
    assert cluster.end(job) == "COMPLETED", output(site)
    assert summary(site / "runs", "fewer")["ranks"] == 1
    log = (site / f"dcft-{job}.out").read_text()
    assert "going on with 1 rank instead of 2: the global batch stays 16, by accumulation" in log


@pytest.mark.timeout(600)
def test_bad_input_is_not_tried_again(cluster: Cluster, site: Path) -> None:
    """Neither what is found before the ranks start, nor what they find."""
    file = str(SLURM / "single_node.sbatch")
    config = cluster.sbatch(file, "tiny.toml", "--penalty.factr", "1", cwd=site, **SPARE)
    diverges = cluster.sbatch(file, "tiny.toml", "--name", "diverges", "--optimizer.lr", "1e30", cwd=site, **ONE, **SPARE)
    assert cluster.end(config) == cluster.end(diverges) == "FAILED", output(site)
    assert cluster.job(diverges)["Restarts"] == "0"
    assert (site / f"dcft-{config}.out").read_text().count("did you mean 'factor'?") == 1
    log = (site / f"dcft-{diverges}.out").read_text()
    assert re.search(r"diverges: failed: rank \d on node\d at .* lower optimizer.lr", log), log
    ranks = list((site / "logs").glob(f"{diverges}.*/*/*/*/*/stderr.log"))
    assert ranks and not any("Traceback" in file.read_text() for file in ranks)
    said = cluster.run(sys.executable, "-m", "dcft_dist.cli", "status", "runs/diverges", cwd=site)
    assert "last failure: rank " in said and f"Slurm job {diverges}" in said


@pytest.mark.timeout(900)
def test_a_disturbed_job_ends_with_the_same_bits(beside: Beside) -> None:
    disturbed, calm = beside.disturbed.result(), beside.calm.result()
    site = disturbed.folder
    (log,) = (file.read_text() for file in site.glob("dcft-*.out"))

    assert differing(bits(site / "runs", "disturbed"), bits(calm, "calm")) == []
    found, expected = summary(site / "runs", "disturbed"), summary(calm, "calm")
    for key in ("weights_checksum", "test", "validation", "ranks"):
        assert found[key] == expected[key], key
    begun = [json.loads(line) for line in (site / "runs/disturbed/attempts.jsonl").read_text().splitlines()]
    assert [s["restart"] for s in begun] == list(range(len(begun)))
    steps = [int(s["at"].removeprefix("step ")) for s in begun[1:]]
    assert len(disturbed.asked) == 5 and len(steps) in (5, 6), (steps, log)
    assert steps == sorted(steps), steps
    # Asked to stop: no step is done twice. Ended without warning: at most the one that had no checkpoint yet.
    assert all(steps[start - 1] >= step - 1 for start, step in disturbed.asked.items()), (steps, disturbed.asked)
    assert "stopped at step" in log and "disturbed: again: it was asked to stop" in log
    cut_off = log.split("going on from step")[max(disturbed.asked) - 1]
    assert "on node1 does not answer" in cut_off or "on node1 has not arrived" in cut_off, cut_off


STUDY = """
name = "shared"
base = "tiny.toml"
tune_seeds = []
seeds = [0, 1]
[settings.one]
[arms.full]
method = "full"
[arms.dcft]
[[contrasts]]
arm = "dcft"
minus = "full"
"""


NOTHING_TUNED = {("one", "full"): (), ("one", "dcft"): ()}


@pytest.mark.timeout(600)
def test_a_study_by_an_array_with_fewer_places_than_tasks(cluster: Cluster, site: Path) -> None:
    """A task that waits for a share that has no place gives up its own, and comes back."""
    (site / "shared.toml").write_text(STUDY)
    options = ("--array=1-2%1", str(SLURM / "study.sbatch"), "shared.toml", "--folder", "runs/shared")
    job = cluster.sbatch(*options, cwd=site, DCFT_WAIT_S="1", **SPARE)
    assert cluster.end(job) == "COMPLETED", output(site)
    assert sum(int(task["Restarts"]) for task in cluster.tasks(job)) >= 2
    shown = cluster.run(sys.executable, "-m", "dcft_dist.cli", "table", "runs/shared", cwd=site)
    assert all(f"| {arm} | nothing to choose | 2 of 2 |" in shown for arm in ("full", "dcft"))


@pytest.mark.timeout(600)
def test_nobody_waits_for_a_share_that_failed(cluster: Cluster, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    (site / "shared.toml").write_text(STUDY)
    study, folder = load_study(Path("shared.toml")), Path("runs/shared")
    second = [make_preparation(make_config(study, c, folder), folder).name for c in final_cells(study, NOTHING_TUNED)][2]
    (site / folder / "prepared").mkdir(parents=True)
    (site / folder / "prepared" / second).write_text("in the way of the second share")
    options = ("--array=1-2", str(SLURM / "study.sbatch"), "shared.toml", "--folder", str(folder))
    job = cluster.sbatch(*options, cwd=site, DCFT_WAIT_S="1", **SPARE)
    assert cluster.end(job) == "FAILED", output(site)
    assert [task["JobState"] for task in cluster.tasks(job)] == ["FAILED", "FAILED"]
    assert "its share is missing: see the output of task 2" in (site / f"dcft-study-{job}_1.out").read_text()


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_nodes_that_cannot_meet_are_named(cluster: Cluster, site: Path) -> None:
    until("node1 idle again", lambda: cluster.states()[1] == "idle", 60)
    file, short = str(SLURM / "multi_node_fsdp2.sbatch"), {"DCFT_MEET_S": "4"}
    wrong = cluster.sbatch("-w", "node[0-1]", file, "tiny.toml", cwd=site, DCFT_HEAD_ADDRESS="10.77.0.99", **short)
    # What node2 sends from that port is lost, as behind a firewall.
    firewall = ["ip", "rule", "add", "ipproto", "tcp", "sport", "23456", "blackhole"]
    subprocess.run(cluster.in_node(2, *firewall), check=True)
    blocked = cluster.sbatch("-w", "node[2-3]", file, "tiny.toml", cwd=site, DCFT_PORT="23456", **short)
    assert cluster.end(wrong) == cluster.end(blocked) == "FAILED", output(site)
    log = (site / f"dcft-{wrong}.out").read_text()
    assert "node1: cannot reach the head node node0 at 10.77.0.99" in log, log
    assert "node0: no contact from node0, node1 on 10.77.0.99" in log, log
    log = (site / f"dcft-{blocked}.out").read_text()
    # By name, since to node2 its own name means 127.0.1.1.
    assert "node3: cannot reach the head node node2 at node2 port 23456" in log, log
    assert "Traceback" not in log


def test_the_check_of_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """On two nodes without GPUs, with a rank each: from the sbatch file to the page."""
    words = f"-w node[2-3] --output={tmp_path}/check.out {SLURM}/check_gpus.sbatch --small --out {tmp_path}/found"
    job = cluster.sbatch(*words.split(), cwd=ROOT, **ONE, **SPARE)
    assert cluster.end(job) == "COMPLETED", output(tmp_path)
    found = (tmp_path / "found.json").read_text() + (tmp_path / "found.md").read_text()
    assert found.count('"equal": true') == 21 and "error" not in found and "on 2 ranks, 2 nodes" in found, found


def test_what_submitit_is_told(daemons: Cluster, tmp_path: Path) -> None:
    """submitit makes a Slurm job only where it finds srun."""
    job, site = golden_job("site")
    lines = submitit_lines(job, site, tmp_path)
    for option in (
        "gres=gpu:a100:8", "account=med42", "partition=gpu", "qos=normal", "constraint=a100", "time=1:00:00", "requeue",
        "exclusive", "nodes=4", "ntasks-per-node=8", "cpus-per-task=8", "signal=USR2@120",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    (command,) = (line for line in lines if line.startswith("srun "))
    assert "--mpi=none --cpus-per-task=8" in command and "apptainer exec --nv /proj/dcft.sif python" in command
    assert lines.index("module load cuda/12.8") < lines.index("export NCCL_SOCKET_IFNAME=ib0") < lines.index(command)
    plain = submitit_lines(*golden_job("smoke"), tmp_path)
    assert "#SBATCH --gpus-per-node=8" in plain
    assert not [line for line in plain if "--time" in line or "cpus-per-task" in line], "the site's own defaults"


def submitit_lines(job: Job, site: Site, folder: Path) -> list[str]:
    executor = submitit_executor(job, site, folder)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "0")).splitlines()
