"""Jobs on a real cluster: submitted, followed, stopped, and with a node killed under them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.training.objectives import OBJECTIVES

from .conftest import BIN, REPOSITORY, ROWS, SHARDS, Cluster, Node, kept, shards, wait_until

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(started: Cluster, world: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the run directory of a curation that nothing happened to, in the job's own process, and what its submitter saw."""
    started.start_workers(1)  # reads the data; everything else is the job's own process
    run, alone = world / "undisturbed", "resources={workers: 0, actors: 0}"
    arguments = ("--config", world / "config.yaml", f"run_dir={run}", alone, "--id", "undisturbed")
    return run, started.pharmacist("submit", "curate", *arguments)


def process_on(node: Node, kind: str) -> psutil.Process | None:
    """Return a process of the node that does something, as Ray names it."""
    for process in node.processes():
        with suppress(psutil.Error):  # it ended meanwhile
            if any(kind in part for part in process.cmdline()):
                return process
    return None


def scorer_on(node: Node) -> psutil.Process | None:
    """Return the node's actor that scores."""
    return process_on(node, "ShardScorer")


def test_a_submitted_curation_is_followed_to_its_result(undisturbed):
    run, done = undisturbed
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("submitted curate as job undisturbed to http://127.0.0.1:")
    assert f"run directory: {run}" in lines
    assert [line for line in lines if line in ("ingest", "fit", "score", "select")] == ["ingest", "fit", "score", "select"]
    assert f"  kept {len(kept(run))} of {ROWS} rows: {run}/selections/pharmacist" in lines
    assert len(kept(run)) == round(0.4 * ROWS)
    assert lines[-1].startswith("job undisturbed succeeded, ")
    # Progress is lines, for nothing redraws them in a log.
    assert f"  score (shards): {SHARDS} of {SHARDS}" in lines
    assert all(line.expandtabs().isprintable() for line in lines)


@pytest.mark.slow
def test_the_same_line_again_says_what_is_there(cluster, world, undisturbed):
    run, _ = undisturbed
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name != "config.yaml"}
    again = cluster.pharmacist(
        "submit", "curate", "--config", world / "config.yaml", f"run_dir={run}", "resources={workers: 0, actors: 0}"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    lines = again.stdout.splitlines()
    assert "ingest, fit, score, select: there already" in lines
    assert f"  {run}/selections/pharmacist" in lines
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_node_that_dies_while_it_scores_changes_nothing(cluster, world, undisturbed):
    """Kill one of two nodes with `SIGKILL` in the middle of a shard; the job finishes on the other, with the same selection."""
    run = world / "disturbed"
    submitted = cluster.run(
        BIN / "ray", "job", "submit", "--no-wait", "--submission-id", "disturbed", "--working-dir", REPOSITORY, "--",
        "python", "-m", "jobs.curate", "--config", world / "config.yaml", f"run_dir={run}",
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert scorer_on(cluster.head) is None

    # Ray brings the second actor up when the first has had work for seconds. So the first is held within a shard until the other has
    # published some: what appears meanwhile is the other's work, and what the first holds is lost with its node.
    wait_until((run / "fit" / "manifest.json").exists, 240, "the selector")  # by then the actors of a job before are gone
    wait_until(lambda: any(map(scorer_on, cluster.workers)), 120, "an actor")
    victim = next(worker for worker in cluster.workers if scorer_on(worker))
    held = scorer_on(victim)
    wait_until(lambda: len(shards(run)) >= 2, 240, "the first shards", every=0.01)
    held.suspend()
    time.sleep(1)  # for what it had handed over before
    by_victim = shards(run)
    survivor = next(worker for worker in cluster.workers if worker is not victim)
    wait_until(lambda: len(shards(run)) >= len(by_victim) + 2, 120, "shards of the other node")
    assert scorer_on(survivor) is not None
    at_kill = shards(run)
    victim.kill()
    assert not held.is_running() or held.status() == psutil.STATUS_ZOMBIE
    assert len(at_kill) < SHARDS - 4, "it was nearly over"
    assert cluster.job("disturbed")["status"] == "RUNNING"

    wait_until(lambda: cluster.alive() == {cluster.head.id, survivor.id}, 30, "the death of the node")
    wait_until(lambda: cluster.job("disturbed")["status"] != "RUNNING", 180, "the end of the job")
    log = cluster.pharmacist("job", "logs", "disturbed").stdout
    assert cluster.job("disturbed")["status"] == "SUCCEEDED", log
    assert f"  kept {len(kept(run))} of {ROWS} rows: {run}/selections/pharmacist" in log.splitlines()
    assert len(shards(run)) == SHARDS
    assert kept(run) == kept(undisturbed[0])
    scores = [pq.read_table(place / "scores" / "rows").sort_by("id") for place in (run, undisturbed[0])]
    assert scores[0].equals(scores[1])


@pytest.mark.slow
def test_a_model_that_is_spread_over_workers_is_curated_with_and_survives_the_loss_of_a_node(cluster, world, undisturbed):
    """No process holds the model whole, from the warm-up to the scores; the node of the group that scores is killed in between."""
    run = world / "spread"
    submitted = cluster.run(
        BIN / "ray", "job", "submit", "--no-wait", "--submission-id", "spread", "--working-dir", REPOSITORY, "--",
        "python", "-m", "jobs.curate", "--config", world / "config.yaml", f"run_dir={run}", "selector.warmup.zero_stage=3",
        "resources={workers: 2, actors: 1, workers_per_actor: 2, cpus_per_worker: 0.75}",
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: len(shards(run)) >= 2, 400, "the first shards", every=0.01)
    victim = next(worker for worker in cluster.workers if process_on(worker, "RayTrainWorker"))
    held = process_on(victim, "RayTrainWorker")

    def within_a_shard() -> bool:
        held.suspend()
        if any(
            not file.with_name(file.name.split(".")[0] + ".parquet").exists() for file in run.glob("scores/rows/*.attempt.json")
        ):
            return True
        held.resume()
        return False

    wait_until(within_a_shard, 60, "a shard that is begun", every=0.01)
    at_kill = shards(run)
    assert len(at_kill) < SHARDS - 4, "it was nearly over"
    victim.kill()
    wait_until(lambda: cluster.job("spread")["status"] != "RUNNING", 400, "the end of the job")
    log = cluster.pharmacist("job", "logs", "spread").stdout
    assert cluster.job("spread")["status"] == "SUCCEEDED", log
    assert re.search(r"score: a worker died over part-000\d\d\.parquet; it was scored again \(attempt 2\)", log)
    want, got = (
        {row["id"]: row for row in pq.read_table(place / "scores" / "rows").to_pylist()} for place in (undisturbed[0], run)
    )
    assert got.keys() == want.keys()
    assert len(got) == ROWS
    for name in ("pharmacist", "less", "low_loss", "grad_norm"):
        size = max(abs(row[name]) for row in want.values())
        assert [got[id][name] for id in want] == pytest.approx([row[name] for row in want.values()], rel=1e-3, abs=1e-3 * size)
    cut = sorted((row["pharmacist"] for row in want.values()), reverse=True)[len(kept(run)) - 1]
    size = max(abs(row["pharmacist"]) for row in want.values())
    assert all(abs(want[id]["pharmacist"] - cut) < 2e-3 * size for id in kept(run) ^ kept(undisturbed[0]))


@pytest.mark.slow
def test_a_mistake_in_the_configuration_comes_back_as_the_jobs_exit_code(started, world):
    """The file and the code travel: the submitter finds an unknown key itself, the job an unknown objective."""
    arguments = ("submit", "curate", "--config", world / "config.yaml", f"run_dir={world / 'never'}", "--working-dir", REPOSITORY)
    done = started.pharmacist(
        *arguments, "alignment.objective=sfd", "--id", "mistake", "--env", "A_SECRET", "--env", "GIVEN=x=y", A_SECRET="hunter2"
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"\npharmacist: unknown objective 'sfd' (did you mean 'sft'?); known: {min(OBJECTIVES)}, " in done.stdout
    assert "job mistake failed with exit code 2" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    variables = started.job("mistake")["runtime_env"]["env_vars"]
    assert (variables["A_SECRET"], variables["GIVEN"]) == ("hunter2", "x=y")
    assert not (world / "never").exists()
    code = started.pharmacist("job", "logs", "mistake", "--follow")
    assert (code.returncode, "unknown objective" in code.stdout) == (2, True)
    taken = one_line(started.pharmacist(*arguments, "--id", "mistake"), 2)
    assert "--id mistake is taken on this cluster; choose another, or look at that job: pharmacist job logs mistake" in taken


def test_what_the_submitter_can_know_is_told_before_anything_is_sent(started, world):
    arguments = ("submit", "curate", "--config", world / "config.yaml", "--working-dir", REPOSITORY)
    known = one_line(started.pharmacist(*arguments, f"run_dir={world / 'never'}", "selection.ratoi=1"), 2)
    assert "unknown key 'selection.ratoi' (did you mean 'ratio'?)" in known
    assert "run_dir=runs/x is relative" in one_line(started.pharmacist(*arguments, "run_dir=runs/x"), 2)
    assert "curate needs --config FILE" in one_line(started.pharmacist("submit", "curate"), 2)


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return what a command says that has to fail as users' errors do."""
    assert (done.returncode, done.stdout) == (code, ""), (done.stdout, done.stderr)
    assert done.stderr.startswith("pharmacist: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_until_it_is_stopped(cluster, world):
    submitter = subprocess.Popen(
        [sys.executable, "-c", "from pharmacist_ray.cli.app import main; main()", "submit", "curate", "--config", world / "config.yaml",
         f"run_dir={world / 'stopped'}", "--id", "long"],
        env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cluster.folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in a shell's background do not have
    )  # fmt: skip
    assert submitter.stdout is not None
    for line in submitter.stdout:  # the log is followed while it is written
        if line.startswith("run directory: "):
            break
    submitter.send_signal(signal.SIGINT)
    rest = submitter.stdout.read()
    assert submitter.wait(30) == 130, rest
    assert "job long goes on; follow it: pharmacist job logs long --follow; stop it: pharmacist job stop long" in rest
    assert "Traceback" not in rest

    assert "job long: RUNNING, " in cluster.pharmacist("job", "status", "long").stdout
    assert f"run directory: {world / 'stopped'}" in cluster.pharmacist("job", "logs", "long").stdout
    stopped = cluster.pharmacist("job", "stop", "long")
    assert (stopped.returncode, "job long was stopped" in stopped.stdout) == (0, True), stopped
    again = cluster.pharmacist("job", "stop", "long").stdout
    assert again.startswith("job long had ended already\n")
    assert "was stopped" in cluster.pharmacist("job", "status", "long").stdout
    [row] = [line for line in cluster.pharmacist("job", "list").stdout.splitlines() if line.split()[:1] == ["long"]]
    assert row.split()[:3] == ["long", "curate", "STOPPED"]


def test_who_is_refused_is_told_what_to_set(started):
    token = started.environment["RAY_AUTH_TOKEN"]
    missing = one_line(started.pharmacist("job", "list", RAY_AUTH_MODE="", RAY_AUTH_TOKEN=""), 6)
    assert "Unauthorized" in missing
    assert "wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or" in missing
    wrong = one_line(started.pharmacist("job", "list", RAY_AUTH_TOKEN=token[::-1]), 6)
    assert "refuses this token; RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or the file ~/.ray/auth_token) must hold" in wrong
    assert "has no job nowhere; `pharmacist job list` shows" in one_line(started.pharmacist("job", "logs", "nowhere"), 2)
