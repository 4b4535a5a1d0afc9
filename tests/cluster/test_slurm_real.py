"""The Slurm script on a real Slurm of two nodes: a curation over both, and what a preemption with a long grace time leaves of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from .conftest import BIN, REPOSITORY, ROWS, kept, wait_until
from .real_slurm import CPUS, GPUS, GRACE, NODES, Site, missing, site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = REPOSITORY / "cluster" / "slurm" / "submit.sbatch"
WORKER = "RayTrainWorker"
STEPS = 40


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if why := missing():
        pytest.skip(f"no real Slurm: {why}")
    with site([tmp_path_factory.getbasetemp()]) as running:
        yield running


@pytest.fixture
def slurm(started: Site) -> Iterator[Site]:
    """Return Slurm with nothing to do, whatever becomes of the test's jobs."""
    yield started
    started.idle()


def submit(slurm: Site, *arguments: object, **options: object) -> str:
    """Submit the script as its head says, with CPUs that the nodes have."""
    given = [f"--{name}={value}" for name, value in options.items()]
    return slurm.submit(f"--cpus-per-task={CPUS}", f"--output={slurm.folder}/%x-%j.log", *given, SCRIPT, *arguments)


def log_of(slurm: Site, number: str) -> str:
    return (slurm.folder / f"pharmacist-{number}.log").read_text()


def curation(world: Path, run: Path) -> tuple[str, ...]:
    """Return the job's arguments: two workers, which each fill a node, and a warm-up that saves its state."""
    warmup = f"selector.warmup={{steps: {STEPS}, batch_size: 8, lr: 2.0e-3, save_every: 2}}"
    return (
        "--config",
        str(world / "config.yaml"),
        f"run_dir={run}",
        "resources.workers=2",
        warmup,
        f"selector.checkpoints=[{STEPS}]",
    )


@dataclass
class Done:
    """A job that has ended."""

    run: Path
    number: str
    job: dict[str, str]
    log: str
    trained_on: set[str]
    """Nodes that had a training worker."""
    rays: dict[str, str]
    """How Ray was started, by node."""


@pytest.fixture(scope="module")
def undisturbed(started: Site, world: Path) -> Done:
    """Run a curation that nothing happens to."""
    run = world / "undisturbed"
    number = submit(started, *curation(world, run))
    trained_on: set[str] = set()
    rays: dict[str, str] = {}

    def over() -> bool:
        trained_on.update(node for node in NODES if started.on(node, WORKER))
        for node in set(NODES) - set(rays):
            for process in started.on(node, f"{BIN}/ray start"):
                rays[node] = " ".join(process.cmdline())
        return started.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    wait_until(over, 800, "the job", every=0.5)
    return Done(run, number, started.job(number), log_of(started, number), trained_on, rays)


def test_a_curation_runs_over_both_nodes_and_leaves_nothing_on_them(slurm: Site, undisturbed: Done) -> None:
    assert (undisturbed.job["JobState"], undisturbed.job["ExitCode"]) == ("COMPLETED", "0:0"), undisturbed.log
    assert undisturbed.job["Restarts"] == "0"
    assert len(kept(undisturbed.run)) == round(0.4 * ROWS)
    assert undisturbed.trained_on == set(NODES)
    assert {node for node, line in undisturbed.rays.items() if "--head" in line} == {"n1"}
    for node in NODES:  # what Slurm gave, for the script does not know
        assert f"--num-cpus={CPUS} --num-gpus={GPUS}" in undisturbed.rays[node]
    # The node's own /etc/hosts calls it 127.0.1.1.
    assert f" head on n1 ({NODES['n1']}:" in undisturbed.log
    assert "jobs.curate ended with 0" in undisturbed.log
    assert nothing_is_left(slurm, undisturbed.number)


def nothing_is_left(slurm: Site, number: str) -> bool:
    """Say whether the nodes are as they were before a job, and nobody has its token."""
    wait_until(lambda: not any(map(slurm.on, NODES)), 60, "the nodes' processes to end")
    folders = [slurm.folder / node / "tmp" / f"ray-{number}" for node in NODES]
    return not any(folder.exists() for folder in folders) and not list(slurm.folder.glob(".pharmacist-*"))


def test_a_preempted_curation_leaves_at_once_and_goes_on_where_it_was(slurm: Site, world: Path, undisturbed: Done) -> None:
    """Slurm ends the steps by TERM and would end the script after the grace time alone; a job of higher rank has the nodes long before."""
    run = world / "preempted"
    low = submit(slurm, *curation(world, run))
    # A worker is held in the middle of the warm-up until the preemption, which so finds a training on both nodes.
    wait_until(lambda: list(run.rglob("state-*/state.json")), 600, "a state of the warm-up", every=0.05)
    held = slurm.on("n2", WORKER)
    assert held, log_of(slurm, low)
    for process in held:
        process.suspend()
    high = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    wait_until(lambda: slurm.job(low).get("PreemptTime", "None") != "None", 60, "the preemption")
    for process in held:
        with suppress(psutil.NoSuchProcess):  # its Ray has ended it
            process.resume()

    wait_until(lambda: slurm.job(high)["JobState"] != "PENDING", GRACE - 30, "the nodes to be free")
    assert slurm.job(low)["Restarts"] == "1"
    assert "Ray ended on its nodes while jobs.curate ran: back into the queue" in log_of(slurm, low)
    assert slurm.wait(high, "COMPLETED", 120)["ExitCode"] == "0:0"

    job = slurm.wait(low, "COMPLETED", 800)
    log = log_of(slurm, low)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log
    again = log.split("back into the queue", 1)[1]
    assert "ingest: there already" in again
    assert "warm-up was interrupted; it goes on after step " in again
    assert kept(run) == kept(undisturbed.run)
    assert nothing_is_left(slurm, low)


def test_a_script_that_hears_of_the_preemption_first_ends_its_job_itself(slurm: Site, tmp_path: Path) -> None:
    """With the parameter that the script's head names, Slurm sends it the signal that it gets when its time is nearly up."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").touch()
    waits = (
        "import os, time\nif 'SLURM_RESTART_COUNT' not in os.environ:\n    print('waiting', flush=True)\n    time.sleep(600)\n"
    )
    (tmp_path / "jobs" / "curate.py").write_text(waits)
    slurm.configure("SlurmctldParameters=preempt_send_user_signal")
    try:
        low = submit(slurm, chdir=tmp_path)
        wait_until(lambda: "\nwaiting\n" in log_of(slurm, low), 120, "the job", every=0.5)
        high = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        wait_until(lambda: slurm.job(high)["JobState"] != "PENDING", GRACE - 30, "the nodes to be free")
        assert "out of time: back into the queue" in log_of(slurm, low)
        job = slurm.wait(low, "COMPLETED", 240)
        assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log_of(slurm, low)
    finally:
        slurm.configure()
