"""Every tracker with its real library, without network: what was logged is read back from the files it wrote."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.errors import ConfigError, PluginError
from pharmacist_ray.training.tracking import TRACKERS, check_trackers, tracked

SETTINGS = {"seed": 3, "train": {"lr": 1e-3, "layers": [1, 2]}, "attacks": [{"name": "one"}, {"name": "two"}], "out": Path("/x")}


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def track(folder: Path, *names: str, run: str = "align", steps: range = range(1, 4), scale: float = 1.0) -> None:
    with tracked(names, run=run, folder=folder, project="demo", settings=SETTINGS, artifact="s3://bucket/align") as log:
        for step in steps:
            log(step, {"loss": scale / step, "lr": None if step == 2 else 0.5})


def crash(folder: Path, name: str, **values: float) -> None:
    with tracked([name], run="align", folder=folder, project="demo", settings=SETTINGS) as log:
        log(1, values)
        raise ZeroDivisionError


def test_without_trackers_logging_does_nothing(tmp_path: Path) -> None:
    track(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


# ---- TensorBoard ----------------------------------------------------------------------------------------------------------------


def events(folder: Path) -> Iterator[Any]:
    """Read event files as TensorBoard does, in the order of their names: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return curve → step → value; a start event drops what was logged from its step on."""
    points: list[tuple[str, int, float]] = []
    for event in events(folder):
        if event.session_log.status == event.session_log.START:
            points = [point for point in points if point[1] < event.step]
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value if not value.HasField("tensor")]
    assert len({point[:2] for point in points}) == len(points), "a step was logged twice"
    return {tag: {step: value for name, step, value in points if name == tag} for tag in {tag for tag, _, _ in points}}


def settings_texts(folder: Path) -> list[str]:
    return [v.tensor.string_val[0].decode() for e in events(folder) for v in e.summary.value if v.tag.startswith("settings")]


def test_tensorboard_curves_have_the_logged_steps_without_none(tmp_path: Path) -> None:
    track(tmp_path, "tensorboard")
    assert curves(tmp_path) == {"loss": pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3}), "lr": {1: 0.5, 3: 0.5}}


def test_tensorboard_takes_up_a_resumed_run_and_drops_the_steps_it_repeats(tmp_path: Path) -> None:
    track(tmp_path, "tensorboard", steps=range(1, 6))
    track(tmp_path, "tensorboard", steps=range(3, 5), scale=10)  # in the same second: neither file may replace the other
    assert curves(tmp_path)["loss"] == pytest.approx({1: 1, 2: 1 / 2, 3: 10 / 3, 4: 10 / 4})


def test_tensorboard_shows_the_settings_once(tmp_path: Path) -> None:
    for _ in range(2):
        track(tmp_path, "tensorboard")
    (text,) = settings_texts(tmp_path)
    assert all(line.startswith("    ") for line in text.splitlines())
    assert json.loads(text) == {**SETTINGS, "out": "/x"}


def test_tensorboard_keeps_what_is_not_finite_and_what_was_logged_before_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        crash(tmp_path, "tensorboard", loss=math.nan, norm=math.inf)
    assert math.isnan(curves(tmp_path)["loss"][1])
    assert curves(tmp_path)["norm"][1] == math.inf


# ---- MLflow ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database that one run made; the others copy it, because making its tables takes seconds."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("with space")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    track(folder, "mlflow", run="first")
    return folder / "mlflow.db"


def mlflow_runs(database: Path) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("demo")
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def mlflow_curve(database: Path, run: Any, name: str) -> list[tuple[int, float]]:
    client, _ = mlflow_runs(database)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_logs_to_a_database_in_the_folder(mlflow_database: Path) -> None:
    _, (run,) = mlflow_runs(mlflow_database)
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert mlflow_curve(mlflow_database, run, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert mlflow_curve(mlflow_database, run, "lr") == [(1, 0.5), (3, 0.5)]
    assert run.data.tags["artifact"] == "s3://bucket/align"
    assert run.data.params == {
        "seed": "3", "train.lr": "0.001", "train.layers": "[1, 2]", "attacks.0.name": "one", "attacks.1.name": "two", "out": "/x",
    }  # fmt: skip


def test_mlflow_leaves_no_address_behind_for_the_next_run(mlflow_database: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(mlflow_database, tmp_path / name)
        track(tmp_path / name, "mlflow", run=name)
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert [[run.info.run_name for run in mlflow_runs(tmp_path / name / "mlflow.db")[1]] for name in "ab"] == [
        ["first", "a"],
        ["first", "b"],
    ]


def test_mlflow_goes_on_with_the_same_run_and_marks_a_failure(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shutil.copy(mlflow_database, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    with pytest.raises(ZeroDivisionError):
        crash(tmp_path / "run", "mlflow", loss=1.0)
    _, (_, run) = mlflow_runs(shared)
    assert run.info.status == "FAILED"
    assert "artifact" not in run.data.tags, "there are no weights"
    track(tmp_path / "run", "mlflow", steps=range(2, 3))
    track(tmp_path / "other", "mlflow", run="other", steps=range(1, 2))
    _, (_, again, other) = mlflow_runs(shared)
    assert (again.info.run_id, again.info.status, again.info.run_name) == (run.info.run_id, "FINISHED", "align")
    assert mlflow_curve(shared, again, "loss") == [(1, 1.0), (2, 1 / 2)]
    assert other.info.run_name == "other"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{shared}", "the user's own address stays"
    assert not list(tmp_path.glob("*/mlflow.db"))


def test_mlflow_takes_many_long_and_oddly_named_settings(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shutil.copy(mlflow_database, tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # so that it refuses what we do not cut
    many = {f"k{i}": i for i in range(150)}
    settings = {"many": many, "long": "x" * 9000, "y" * 300: 1, "quotas": {"a//b: ü": 0.5}, "empty": {}, "none": None}
    with tracked(["mlflow"], run="r", folder=tmp_path, project="demo", settings=settings):
        pass
    _, (_, run) = mlflow_runs(shared)
    expected = {"long": "x" * 6000, "y" * 250: "1", "quotas.a__b___": "0.5", "empty": "{}", "none": "None"}
    assert run.data.params == expected | {f"many.k{i}": str(i) for i in range(150)}


def test_mlflow_says_that_its_server_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"^tracker 'mlflow' cannot start: .*; look at MLFLOW_TRACKING_URI.*$"):
        track(tmp_path, "mlflow")


# ---- Weights & Biases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module.teardown()  # it reads its environment once
    yield module
    module.teardown()


def wandb_records(file: Path) -> Iterator[Any]:
    """Read a run's file, which is a LevelDB log: blocks of 32 KiB with pieces of (checksum, length, kind, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""  # after its own header
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """Return what each start of a run left, in the order of the times in their names: id, name, settings, logged rows and exit code."""
    pytest.importorskip("wandb").teardown()  # its own process writes the files, and may still be at it
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run: dict[str, Any] = {"rows": [], "x": set(), "summary": {}}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run |= {"id": record.run.run_id, "name": record.run.display_name, "project": record.run.project}
                run["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                run["rows"].append({key: value for key, value in row.items() if not key.startswith("_")})
            elif kind == "summary":
                run["summary"] |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
            elif kind == "metric" and record.metric.step_metric:
                run["x"].add((record.metric.glob_name or record.metric.name, record.metric.step_metric))
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        found.append(run)
    return found


def test_wandb_goes_on_with_the_same_run_and_marks_a_failure(wandb: Any, tmp_path: Path) -> None:
    for folder in ("run", "other"):
        with pytest.raises(ZeroDivisionError):
            crash(tmp_path / folder, "wandb", loss=1.0)
    time.sleep(1)  # W&B names the files of a start by the second
    track(tmp_path / "run", "wandb")
    first, again = wandb_runs(tmp_path / "run")
    (other,) = wandb_runs(tmp_path / "other")
    assert (first["name"], first["project"], first["exit"], again["exit"]) == ("align", "demo", 1, 0)
    assert first["id"] == again["id"] != other["id"]
    assert again["summary"]["artifact"] == "s3://bucket/align"
    assert "artifact" not in first["summary"], "there are no weights"
    assert {key: value for key, value in first["config"].items() if key != "_wandb"} == {**SETTINGS, "out": "/x"}
    assert again["rows"] == [
        {"step": 1, "loss": 1.0, "lr": 0.5},
        {"step": 2, "loss": 1 / 2},
        {"step": 3, "loss": 1 / 3, "lr": 0.5},
    ]
    assert ("*", "step") in again["x"], "curves are drawn over our steps, which a resumed run repeats"


def test_wandb_says_that_nobody_is_logged_in(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"^tracker 'wandb' cannot start: No API key configured.*; .*WANDB_MODE=offline$"):
        track(tmp_path, "wandb")


def test_a_tracker_that_cannot_start_closes_the_others(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="tracker 'mlflow'"):
        track(tmp_path, "wandb", "mlflow")
    (run,) = wandb_runs(tmp_path)
    assert run["exit"] == 1


# ---- The registry ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_tracker_is_named_with_the_known(tmp_path: Path) -> None:
    line = r"^unknown tracker 'wanbd' \(did you mean 'wandb'\?\); known: mlflow, tensorboard, wandb; one of another package .*$"
    with pytest.raises(ConfigError, match=line):
        check_trackers(["tensorboard", "wanbd"])
    with pytest.raises(ConfigError, match=line):
        track(tmp_path / "run", "wanbd")
    assert not (tmp_path / "run").exists()


PLUGIN = """
from contextlib import contextmanager

@contextmanager
def told(about):
    if about.run == "shut":
        raise RuntimeError("closed on Sundays")
    lines = []
    def log(step, values):
        if step == 3:
            raise KeyError(step)
        lines.append((step, values["loss"]))
    try:
        yield log
    finally:
        (about.folder / "lines").write_text(f"{lines} {about.artifact}")
"""


def test_a_tracker_of_another_package_is_told_the_same_and_its_failure_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tracker_mod.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(TRACKERS, "_found", {})
    name, run = "tracker_mod:told", tmp_path / "run"
    check_trackers([name])
    track(run, name, steps=range(1, 3))
    assert (run / "lines").read_text() == "[(1, 1.0), (2, 0.5)] s3://bucket/align"
    with pytest.raises(PluginError, match=r"^tracker 'tracker_mod:told' failed: KeyError: 3; the bug is the plug-in's"):
        track(run, name, steps=range(2, 5))
    assert (run / "lines").read_text().startswith("[(2, 0.5)]"), "it was closed"
    with pytest.raises(PluginError, match="RuntimeError: closed on Sundays; the bug is the plug-in's"):
        track(run, name, run="shut")
    with pytest.raises(ZeroDivisionError):
        crash(run, name, loss=2.0)
    assert (run / "lines").read_text().startswith("[(1, 2.0)]"), "it was closed, and another's error passed"


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mlflow"}
    monkeypatch.setattr("pharmacist_ray.training.tracking._installed", found.__contains__)
    with pytest.raises(ConfigError, match=r"^tracker 'mlflow' needs .* not installed; pip install SQLAlchemy alembic$"):
        check_trackers(["mlflow"])


def test_the_folder_that_wandb_makes_is_not_taken_for_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(["wandb"])


@pytest.mark.slow
def test_only_what_is_asked_for_is_imported_and_none_calls_home(mlflow_database: Path, tmp_path: Path) -> None:
    code = f"""
import socket, sys
from pathlib import Path
from pharmacist_ray.training.tracking import check_trackers, tracked
asked = []
def getaddrinfo(host, *more, **also):
    asked.append(host)
    raise OSError("no network here")
socket.getaddrinfo = getaddrinfo
def imported(): return {{"mlflow", "tensorboardX", "wandb"}} & set(sys.modules)
def track(name):
    with tracked([name], run="r", folder=Path({str(tmp_path)!r}), project="demo", settings={{}}) as log:
        log(1, {{"loss": 1.0}})
check_trackers({list(TRACKERS)})
assert not imported(), imported()
track("tensorboard")
assert imported() == {{"tensorboardX"}}, imported()
track("mlflow")
assert "wandb" not in imported()
assert not asked, asked
"""
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'shared.db')}"
    # MLflow does not call home from what looks like a test, which this must not.
    told = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "CI"}
    env = {key: value for key, value in os.environ.items() if key not in told} | {"MLFLOW_TRACKING_URI": uri}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
