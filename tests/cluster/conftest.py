"""A real Ray cluster on this machine: a head without CPUs and two worker nodes, each a `ray start` of its own.

Ray replaces 127.0.0.1 by the machine's address for all but the dashboard, so it is the token that keeps others out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from pharmacist_ray.testbed.tiny import tiny_llama, word_tokenizer
from pharmacist_ray.testbed.world import World

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WORKER_CPUS = 2
ROWS, SHARDS = 240, 24


@dataclass
class Node:
    """What one `ray start` started."""

    process: subprocess.Popen[bytes]
    id: str = ""
    """Ray's id of the node."""

    def processes(self) -> list[psutil.Process]:
        """Return its processes, the node's own first."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """End it as a power cut would: raylet, agents and workers by SIGKILL, none of which can say goodbye."""
        while alive := [process for process in self.processes() if process.status() != psutil.STATUS_ZOMBIE]:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
                    process.kill()
            psutil.wait_procs(alive[1:], timeout=5)
            self.process.wait(10)


@dataclass
class Cluster:
    """The cluster, and how to talk to it."""

    folder: Path
    """Ray's files; short, for its sockets' names are limited."""
    environment: dict[str, str]
    """For commands that talk to it."""
    head: Node | None = None
    workers: list[Node] = field(default_factory=list)
    url: str = ""
    """Of the dashboard."""
    address: str = ""

    def pharmacist(self, *arguments: object, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run the `pharmacist` command against it, in a folder that holds nothing."""
        return self.run(sys.executable, "-c", "from pharmacist_ray.cli.app import main; main()", *arguments, **changed)

    def run(self, *command: object, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the cluster's environment; a variable that is changed to nothing is not set."""
        environment = {name: value for name, value in (self.environment | changed).items() if value}
        return subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600, cwd=self.folder
        )

    def ask(self, path: str) -> Any:
        """Return what the head's dashboard answers."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/{path}", headers=token), timeout=20) as reply:
            return json.load(reply)

    def job(self, id: str) -> dict[str, Any]:
        """Return what the head knows of a job."""
        return dict(self.ask(f"jobs/{id}"))

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the head knows of its nodes."""
        return list(self.ask("v0/nodes")["data"]["result"]["result"])

    def alive(self) -> set[str]:
        """Return the ids of the nodes that the head takes for alive."""
        return {node["node_id"] for node in self.nodes() if node["state"] == "ALIVE"}

    def start_head(self) -> None:
        """Start the head; a port that somebody took meanwhile costs another attempt."""
        for _ in range(3):
            ports = free_ports(2)
            self.url, self.address = (f"{scheme}127.0.0.1:{port}" for scheme, port in zip(("http://", ""), ports, strict=True))
            self.head = self._start(
                "--head", f"--port={ports[1]}", f"--dashboard-port={ports[0]}", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
                f"--temp-dir={self.folder}", "--num-cpus=0",
            )  # fmt: skip
            try:
                wait_until(lambda: self.head.process.poll() is not None or len(self.alive()) == 1, 180)
                self.head.id = next(iter(self.alive()))
                return
            except (TimeoutError, OSError, StopIteration):
                self.head.kill()
        raise RuntimeError(f"no head came up: {(self.folder / 'start.log').read_text()[-2000:]}")

    def start_workers(self, number: int) -> None:
        """Have at least so many worker nodes alive; they start one after the other, for two at a time may choose the same sockets."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        wait_until(lambda: len(self.alive()) == 1 + len(self.workers), 60, "the deaths of others")
        ended: list[int | None] = []
        for _ in range(3 * number):
            if len(self.workers) >= number:
                return
            known = self.alive()
            worker = self._start(f"--address={self.address}", f"--num-cpus={WORKER_CPUS}")
            wait_until(
                lambda known=known, worker=worker: worker.process.poll() is not None or self.alive() - known, 180, "a worker"
            )
            if new := self.alive() - known:
                worker.id = new.pop()
                self.workers.append(worker)
            else:
                ended.append(worker.process.poll())
                worker.kill()
        if len(self.workers) >= number:
            return
        exits = "".join(file.read_text()[-2000:] for file in self.folder.rglob("ray_process_exit.log"))
        started = (self.folder / "start.log").read_text()[-2000:]
        raise RuntimeError(f"{len(self.workers)} of {number} workers came up, others ended with {ended}: {exits}\n{started}")

    def stop(self) -> None:
        """End everything that was started here."""
        for node in [*self.workers, *([self.head] if self.head else [])]:
            node.kill()
        for process in psutil.process_iter(["cmdline"]):  # what was orphaned names our folder
            if any(str(self.folder) in part for part in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: str) -> Node:
        ports = free_ports(3)
        command = [
            str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={ports[0]}",
            f"--dashboard-agent-grpc-port={ports[1]}", f"--metrics-export-port={ports[2]}", *arguments,
        ]  # fmt: skip
        with (self.folder / "start.log").open("ab") as log:
            return Node(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    start_new_session=True,
                    preexec_fn=_end_with_me,
                )
            )


def _end_with_me() -> None:
    """Have the kernel end this process when the tests' own does, also where that is killed: `ray start` then ends all of its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback that nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until(true: Callable[[], object], seconds: float, what: str = "it", every: float = 0.2) -> None:
    """Wait for something to become true, with so many seconds between two looks.

    Raises:
        TimeoutError: It does not within the time; carries the last error.
    """
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if true():
                return
        except OSError as error:
            last = error
        time.sleep(every)
    raise TimeoutError(f"waited {seconds} s for {what}; {last}")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster for the whole module; see `cluster`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # A node that does not answer is dead after two seconds; one that is slow to answer is not.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
    }
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), environment)
    try:
        cluster.start_head()
        cluster.environment["RAY_API_SERVER_ADDRESS"] = cluster.url
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """Return the cluster with two worker nodes, whatever a test before did to them."""
    started.start_workers(2)
    return started


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's data made small, a base with random weights, and the demo's configuration of a curation."""
    folder = tmp_path_factory.mktemp("world")
    made = World(seed=3)
    others = (
        "benign",
        "attack_harmful",
        "eval_harmful",
        "eval_benign",
        "classification_train",
        "classification_test",
    )
    made.write_jsonl(folder / "data", {"alignment": ROWS, "validation": 24, "harmful": 24, **dict.fromkeys(others, 0)})
    tokenizer = word_tokenizer(made.vocabulary())
    tiny_llama(tokenizer, max_length=64).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    text = files("pharmacist_ray.testbed").joinpath("demo.yaml").read_text(encoding="utf-8").replace("{folder}", str(folder))
    values: dict[str, Any] = yaml.safe_load(text)
    for section in ("pretraining", "attacks", "evaluation", "alignment"):
        del values[section]
    del values["data"]["benign"]
    values["data"]["shards"] = SHARDS
    # Of two CPUs a node has, so that two actors are on two nodes.
    values["resources"] = {"actors": 2, "cpus_per_worker": 1.5}
    values["selector"] |= {"warmup": {"steps": 4, "batch_size": 8, "lr": 2e-3}, "checkpoints": [4], "reference": None}
    values["scoring"]["scorers"] = ["pharmacist", "less", "low_loss", "grad_norm", "random"]
    values["comparison"] = {"selections": ["pharmacist"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def kept(run: Path) -> set[str]:
    """Return the ids of a curated subset."""
    return set(pq.read_table(run / "selections" / "pharmacist" / "rows", columns=["id"]).column("id").to_pylist())


def shards(run: Path) -> set[str]:
    """Return the names of the score files that a run has published."""
    return {file.name for file in (run / "scores" / "rows").glob("part-*.parquet")}
