"""A real Slurm on this machine, as Debian has it: a controller and two nodes, each in namespaces of its own.

All of it lives below one process, the first of a process namespace. With that process end every daemon, job and Ray, and with them goes
what they alone had: the networks, the mounts, the names. Their files are in one folder, and nothing of the machine's own is changed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from .conftest import BIN, REPOSITORY, wait_until

NODES = {"n1": "10.77.0.11", "n2": "10.77.0.12"}
CPUS, GPUS = 2, 4
GRACE = 150
"""Seconds from a preemption's TERM to its KILL."""
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "unshare", "nsenter", "setpriv")

# A requeued job begins again after cred_expire: 20 s in the place of 120. Whether the machine has what the nodes claim is not asked.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=control(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdSpoolDir={folder}/%n/spool
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

# The first process of all. Networks have names below /run, which is its own therefore.
CONTROL = """
set -euo pipefail
hostname control
mount -t tmpfs none /run
ip link set lo up
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up
munged --foreground --key-file=munge.key --socket="$PWD/munge.sock" --pid-file="$PWD/munged.pid" --seed-file="$PWD/munged.seed" \\
    --log-file="$PWD/munged.log" &
until [[ -S munge.sock ]]; do sleep 0.1; done
slurmctld -D &
while read -r name address; do
    ip netns add "$name"
    ip link add "to-$name" master bridge type veth peer name eth0 netns "$name"
    ip link set "to-$name" up
    ip -n "$name" link set lo up
    ip -n "$name" address add "$address/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" route add default via 10.77.0.1
    ip netns exec "$name" unshare --mount --uts --pid --kill-child --mount-proc bash node "$name" &
done <nodes
wait -n
"""

# A node has a /tmp and a /dev/shm of its own, and by `ip netns exec` a /sys without cgroups. What all nodes see and lies in /tmp is put
# there. /etc/hosts gives the node's own name a loopback address, as Debian's installer does.
NODE = """
set -euo pipefail
hostname "$1"
mount --bind "$1/hosts" /etc/hosts
while read -r shared; do
    mkdir -p "$1$shared"
    mount --rbind "$shared" "$1$shared"
done <shared
mount --rbind "$1/tmp" /tmp
mount -t tmpfs none /dev/shm
slurmd -D -N "$1" &
wait
"""


def missing() -> str:
    """Return why Slurm cannot be run here, or nothing."""
    if os.geteuid() != 0:
        return "only root can give Slurm's nodes networks of their own"
    if absent := [command for command in COMMANDS if not shutil.which(command)]:
        return f"no {', '.join(absent)} on this machine; on Debian: apt-get install slurm-wlm munge iproute2 util-linux"
    tried = subprocess.run(["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


@dataclass
class Site:
    """The controller and its nodes."""

    folder: Path
    environment: dict[str, str]
    """For commands, and for what they submit."""
    process: subprocess.Popen[bytes] | None = None
    """It waits for the first process of all."""

    def run(self, *command: object) -> str:
        """Run a command of Slurm's where it reaches the controller, and return what it says."""
        first, *_ = self.processes()
        entered = ["nsenter", f"--net=/proc/{first.pid}/ns/net", *map(str, command)]
        done = subprocess.run(entered, env=self.environment, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: object) -> str:
        """Submit a batch job, and return its number."""
        return self.run("sbatch", "--parsable", *arguments)

    def job(self, number: str) -> dict[str, str]:
        """Return what the controller knows of a job."""
        shown = self.run("scontrol", "show", "job", number, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, number: str, state: str, seconds: float) -> dict[str, str]:
        """Wait for a job to come into a state."""
        wait_until(lambda: self.job(number)["JobState"] == state, seconds, f"job {number} to be {state}", every=0.5)
        return self.job(number)

    def configure(self, *more: str) -> None:
        """Write the configuration, with more lines; a controller that runs is told to read it again."""
        conf = SLURM_CONF.format(folder=self.folder, grace=GRACE)
        nodes = "".join(
            f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=4000 Gres=gpu:{GPUS}\n" for name, address in NODES.items()
        )
        (self.folder / "slurm.conf").write_text("\n".join([conf + nodes, *more, ""]))
        if self.process:
            self.run("scontrol", "reconfigure")

    def processes(self) -> list[psutil.Process]:
        """Return all that runs here, the first process first."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def on(self, node: str, what: str = "") -> list[psutil.Process]:
        """Return what runs on a node for jobs, or of that what has something in its command line."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):  # it ended meanwhile
                if process.cmdline() == ["bash", "node", node]:
                    found = process.children(recursive=True)
        lines = {}
        for process in found:
            with suppress(psutil.Error):
                lines[process] = " ".join(process.cmdline())
        return [process for process, line in lines.items() if what in line and not line.startswith("slurmd ")]

    def start(self, shared: list[Path]) -> None:
        """Start everything, and wait until both nodes can be given jobs.

        Args:
            shared: Folders that all nodes see.
        """
        folder = self.folder
        for name in NODES:
            (folder / name / "tmp").mkdir(parents=True)
            (folder / name / "hosts").write_text(
                "127.0.0.1 localhost\n"
                + "".join(f"{'127.0.1.1' if name == other else address} {other}\n" for other, address in NODES.items())
            )
        for number in range(GPUS):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.stat("/dev/null").st_rdev)
        in_tmp = [path for path in (folder, *shared) if path.is_relative_to("/tmp")]
        for name, text in {
            "control": CONTROL,
            "node": NODE,
            "nodes": "".join(f"{name} {address}\n" for name, address in NODES.items()),
            "shared": "".join(f"{path}\n" for path in in_tmp),
            "gres.conf": f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n",
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
        }.items():
            (folder / name).write_text(text)
        self.configure()
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        with (folder / "log").open("wb") as log:
            apart = ["unshare", "--mount", "--uts", "--net", "--pid", "--kill-child", "--mount-proc", "bash", "control"]
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *apart], env=self.environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip

        try:
            wait_until(self.ready, 60, "the nodes")
        except TimeoutError:
            raise RuntimeError(f"the nodes did not come up: {self.log()}") from None

    def ready(self) -> bool:
        """Say whether both nodes wait for jobs."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"a daemon ended: {self.log()}")
        with suppress(AssertionError, ValueError):  # no controller yet, or none that answers
            return self.run("sinfo", "--noheader", "--partition=low", "--format=%D %T") == f"{len(NODES)} idle"
        return False

    def idle(self) -> None:
        """Cancel all jobs, and wait until both nodes wait for others."""
        self.run("scancel", "--user=root")
        wait_until(self.ready, 120, "the nodes to be idle")

    def log(self) -> str:
        """Return the end of what the daemons said."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """End everything: the first process takes all others with it, and is gone when they are."""
        if self.process and self.process.poll() is None:
            for first in psutil.Process(self.process.pid).children():
                first.kill()
            self.process.wait(60)


@contextmanager
def site(shared: list[Path]) -> Iterator[Site]:
    """Run Slurm, and leave nothing of it.

    Args:
        shared: Folders that all nodes see, besides those of the package and its environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for the names of sockets are limited
    folder.chmod(0o711)  # munged takes no socket that others cannot reach
    ours = ("RAY_", "SLURM_", "SBATCH_", "PHARMACIST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HOME": str(folder),
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    running = Site(folder, environment)
    try:
        running.start([REPOSITORY, Path(sys.prefix), *shared])
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)
