"""A real Slurm of four nodes on this machine, for tests: real daemons, a network namespace and an address for each node.

Everything is inside one private network namespace without a way out; commands are run in it. A node has its own host name,
/dev/shm and processes, so that killing one is a node failure, and taking its link down is a partition. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .debian import apt_install

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
NODES, CPUS, GPUS = 4, 4, 2
NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")  # of a node

CONF = """
ClusterName=test
SlurmctldHost={host}(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again; below 5 it counts as 120
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
PropagateResourceLimits=NONE
# notice things fast
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
KillWait=5
InactiveLimit=0
Waittime=0
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=0,sched_interval=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
NodeName=node[0-{last}] NodeAddr=10.77.0.[10-{last_address}] CPUs={cpus} Gres=gpu:a100:{gpus} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=spare Nodes=node[2-3] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""

# What a node does in its own namespaces; bash is its first process. Its own name means 127.0.1.1 to it, as Debian has it.
NODE = """
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up && ip address add "$2/24" dev eth0 && ip link set eth0 up
hostname "$1" && (echo "127.0.1.1 $1" && cat "$3/hosts") > "$3/hosts.$1"
mount --bind "$3/hosts.$1" /etc/hosts && mount --bind "$3/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm && slurmd -D -f "$SLURM_CONF" -N "$1"
"""


def install() -> str:
    """Installs Slurm if that can be done; otherwise says what is missing.

    Raises:
        RuntimeError: root cannot make namespaces here, as in a plain chroot.
    """
    if sys.platform != "linux" or os.getuid() != 0:
        return "a Slurm for tests needs Linux and root"
    apart = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if apart.returncode:
        raise RuntimeError(f"a Slurm for tests needs namespaces of its own: {apart.stderr.strip()}")
    if all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch", "ip"))):
        return ""
    if shutil.which("apt-get") is None:
        return f"not installed: {', '.join(PACKAGES)}"
    return apt_install(*PACKAGES)


class Cluster:
    """The daemons of a Slurm; `run` runs a command as on its login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "WORLD"))}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        sizes = {"last": NODES - 1, "last_address": 9 + NODES, "cpus": CPUS, "gpus": GPUS}
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, host=host, **sizes))
        devices = []
        for i in range(GPUS):
            device = self.folder / f"gpu{i}"
            os.mknod(device, 0o20666, os.makedev(1, 3))
            devices.append(f"NodeName=node[0-{NODES - 1}] Name=gpu Type=a100 File={device}\n")
        (self.folder / "gres.conf").write_text("".join(devices))
        addresses = [f"10.77.0.{10 + i} node{i}" for i in range(NODES)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"10.77.0.1 {host}", *addresses]) + "\n")
        names = ("passwd", "group", "shadow", "hosts", "services", "protocols")
        (self.folder / "nsswitch.conf").write_text("".join(f"{name}: files\n" for name in names))  # nodes ask no DNS
        self._daemon("net", "unshare", "--net", "sleep", "infinity", inside=False)
        until("a network namespace", lambda: _namespace(self.daemons["net"].pid) != _namespace(os.getpid()), 10)
        bridge = "ip link set lo up; ip link add br0 type bridge; ip address add 10.77.0.1/24 dev br0; ip link set br0 up"
        self.run("bash", "-c", bridge)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        files |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munge.seed"}
        self._daemon("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        until("munged", (self.folder / "munge.socket").exists, 10)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for i in range(NODES):
            self.start_node(i)
        until("four idle nodes", lambda: self.states() == ["idle"] * NODES, 60, self._logs)

    def start_node(self, i: int) -> None:
        self._daemon(f"node{i}", *NAMESPACES, "bash", "-c", NODE, "node", f"node{i}", f"10.77.0.{10 + i}", str(self.folder))
        pid = self.daemons[f"node{i}"].pid
        own = _namespace(self.daemons["net"].pid)
        until("the node's namespace", lambda: _namespace(pid) not in (own, _namespace(os.getpid())), 10)
        # Always the same hardware address: others remember it, and would not find a node that came back with another.
        peer = ["peer", "name", "eth0", "address", f"02:00:00:00:00:1{i}", "netns", str(pid)]
        self.run("ip", "link", "add", f"veth{i}", "type", "veth", *peer)
        self.run("ip", "link", "set", f"veth{i}", "master", "br0", "up")

    def kill_node(self, i: int) -> None:
        """All its processes end at once, as in a power failure."""
        self.daemons[f"node{i}"].kill()
        self.daemons[f"node{i}"].wait()

    def repair_node(self, i: int) -> None:
        """One that came back before it was missed would leave its lost job running for ever: first it is declared down."""
        self.run("scontrol", "update", f"nodename=node{i}", "state=down", "reason=test")
        if self.daemons[f"node{i}"].poll() is not None:
            subprocess.run(self._inside("ip", "link", "delete", f"veth{i}"), capture_output=True)
            self.start_node(i)
        self.run("scontrol", "update", f"nodename=node{i}", "state=resume")
        until(f"node{i} idle", lambda: self.states()[i] == "idle", 60, self._logs)

    def in_node(self, i: int, *command: str) -> list[str]:
        """A command, to be run in the network of a node and under its name."""
        return ["nsenter", "-t", str(self.daemons[f"node{i}"].pid), "--net", "--uts", "--mount", *command]

    def cut(self, i: int, state: str = "down") -> None:
        self.run("ip", "link", "set", f"veth{i}", state)

    def states(self) -> list[str]:
        done = self.call("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %T")
        return [line.split()[1] for line in sorted(done.stdout.splitlines())]

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node; its exit code may be any."""
        return subprocess.run(
            self._inside(*command), capture_output=True, text=True, cwd=cwd, env=self.environment | environment, timeout=300
        )

    @contextmanager
    def started(self, *command: str, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs beside the block."""
        process = subprocess.Popen(
            self._inside(*command),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=self.environment | environment,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        done = self.call(*command, cwd=cwd, **environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> str:
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        return self.tasks(number)[0]

    def tasks(self, number: str) -> list[dict[str, str]]:
        """The tasks of an array that have begun."""
        lines = self.run("scontrol", "show", "job", "-o", number).splitlines()
        return [dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", line)) for line in lines]

    def end(self, number: str, timeout_s: float = 400) -> str:
        """The state in which a job (or all tasks of an array) ended."""

        def states() -> set[str]:
            return set(re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", number)))

        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(f"the end of job {number}", lambda: states() <= over, timeout_s, lambda: f"{states()}\n{self._logs()}", 0.5)
        return " ".join(sorted(states()))

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.daemons["net"].pid), "-n", *command]

    def _daemon(self, name: str, *command: str, inside: bool = True) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                self._inside(*command) if inside else command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=self.environment, start_new_session=True,
            )  # fmt: skip

    def _logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in files)


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def until(
    what: str, true: Callable[[], Any], timeout_s: float, explain: Callable[[], str] = lambda: "", pause_s: float = 0.1
) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s} s\n{explain()}")
        time.sleep(pause_s)
