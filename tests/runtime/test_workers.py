from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ResourceError
from pharmacist_ray.runtime import actors
from pharmacist_ray.runtime import workers as launch
from pharmacist_ray.runtime.group_store import GroupStore


@pytest.fixture
def silent(monkeypatch) -> GroupStore:
    """Return a board on which nothing was written, without a cluster."""
    monkeypatch.setattr(GroupStore, "status", lambda self: "")
    return GroupStore("nobody")


def test_a_group_that_could_not_be_started_is_told_in_one_line(silent):
    failure = ControllerError(WorkerGroupStartupTimeoutError(2))
    found = launch._why(failure, "align", silent, ResourcesConfig(workers=2))
    assert isinstance(found, ResourceError)
    assert str(found).startswith("align: the cluster gave no room for 2 workers (")
    assert "\n" not in str(found)


def test_a_bug_of_the_controller_keeps_its_traceback(silent):
    failure = ControllerError(ValueError("a bug"))
    assert launch._why(failure, "align", silent, ResourcesConfig()) is failure


def test_without_workers_the_work_is_done_in_this_process(tmp_path):
    def work(payload, ranks):
        if payload is None:
            raise ResourceError("nothing to do")
        return os.getpid(), ranks.workers, payload

    resources = ResourcesConfig(workers=0, cpus_per_worker=0.5)
    assert launch.run_on_workers(work, 3, name="here", storage=tmp_path, resources=resources) == (os.getpid(), 1, 3)
    with pytest.raises(ResourceError, match="nothing to do"):
        launch.run_on_workers(work, None, name="here", storage=tmp_path, resources=resources)


def test_a_cluster_that_scales_itself_is_waited_for_and_not_for_ever(ray_local, monkeypatch, capsys):
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(actors, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setenv("PHARMACIST_AUTOSCALING", "1")
    monkeypatch.setenv("PHARMACIST_AUTOSCALING_SECONDS", "1")
    with pytest.raises(
        ResourceError,
        match=r"^2 workers need 800 CPU but the cluster has \d+ and did not grow within 1 s; lower resources.workers or "
        r"resources.cpus_per_worker, look at .*`ray status`.*; what is finished is kept$",
    ):
        actors.check_room({"CPU": 400.0}, 2)
    assert asked == [[{"CPU": 400.0}] * 2, []]
    assert re.match(r"2 workers need 800 CPU, the cluster has \d+: waiting up to 1 s for it to grow\n", capsys.readouterr().err)
    sizes = iter([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 800.0}])
    monkeypatch.setattr(actors.ray, "cluster_resources", lambda: next(sizes))
    actors.check_room({"CPU": 400.0}, 2)
    assert asked[2:] == [[{"CPU": 400.0}] * 2, []]
    monkeypatch.undo()
    with pytest.raises(ResourceError, match=r"but the cluster has \d+; lower .* or set PHARMACIST_AUTOSCALING=1 if it can grow$"):
        actors.check_room({"CPU": 400.0}, 2)


@pytest.mark.parametrize(("mode", "seconds"), [("1", "1800"), ("0", "None")])
def test_a_cluster_that_grows_is_given_time(mode, seconds):
    code = "import os, pharmacist_ray.cli.app; print(os.environ.get('RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S'))"
    environment = {**os.environ, "PHARMACIST_AUTOSCALING": mode}
    environment.pop("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == seconds
