"""A search end to end under Ray Tune, with a tiny random model: sharing, concurrency, failure, resuming, reproducing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from pharmacist_ray.config import load_config
from pharmacist_ray.data.schema import Row
from pharmacist_ray.pipeline.search import run_search
from pharmacist_ray.pipeline.session import run_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}


def times(root: Path) -> dict[str, int]:
    """Return when each stage that has finished below a run directory was finished."""
    files = (path for pattern in ("manifest.json", "result.json") for path in root.rglob(pattern))
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


@pytest.fixture
def file(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> Path:
    """Return a configuration with two attacks on data of a few rows."""
    counts = {"alignment": 24, "trusted": 4, "harmful": 4, "task": 8, "attacker": 4, "ask_bad": 3, "ask_good": 3, "test": 3}
    for seed, (name, count) in enumerate(counts.items()):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(row.raw for row in rows_of(count, seed=seed)) + "\n")
    path = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in counts}
    attack = {"task": path["task"], "harmful": path["attacker"], "rows": 8, "harmful_share": 0.25, "train": TRAIN}
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
        "data": {"candidates": path["alignment"], "validation": path["trusted"], "harmful": path["harmful"], "shards": 2},
        "resources": {"cpus_per_worker": 0.5},
        "selector": {"warmup": TRAIN, "checkpoints": [2], "batch_size": 4, "reference": None},
        "scoring": {"scorers": ["pharmacist", "random"], "random_draws": 1},
        "selection": {"ratio": 0.5},
        "alignment": {"train": TRAIN},
        "attacks": [{"name": "weak", **attack}, {"name": "strong", **attack, "rows": 6}],
        "evaluation": {
            "harmful_prompts": path["ask_bad"], "benign_prompts": path["ask_good"], "task": {"source": path["test"]},
            "max_new_tokens": 4, "bootstrap_draws": 50,
        },
        "comparison": {"selections": ["all", "pharmacist"], "seeds": [3]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def table_of(root: Path) -> list[dict[str, Any]]:
    return pq.read_table(root / "search" / "trials.parquet").to_pylist()


@pytest.mark.usefixtures("ray_local")
def test_trials_share_what_they_have_in_common_and_a_failure_is_one_of_them(file, capsys):
    # Four attacks on one alignment; 0.9 of 8 rows are more harmful rows than there are.
    space = "search={concurrent: 2, space: {attacks.0.harmful_share: [0.0, 0.25, 0.5, 0.9]}}"
    config = load_config(file, [space])
    run_search(config)
    root, out = file.parent / "run", capsys.readouterr().out
    rows = table_of(root)
    assert [row["param.attacks.0.harmful_share"] for row in rows] == ["0.0", "0.25", "0.5", "0.9"]
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"]
    assert "the attack needs 7 harmful rows but" in rows[3]["error"]
    assert f"trial {rows[3]['trial']} failed" in out
    made = times(root)
    finished = [name for name in made if name.endswith("manifest.json")]
    count = {stage: sum(name.startswith(f"{stage}/") for name in finished) for stage in ("fit", "scores", "align", "attack")}
    assert count == {"fit": 1, "scores": 1, "align": 1, "attack": 4}  # the attack that no trial changed ran once
    assert len(list((root / "selections").iterdir())) == 2  # the search's and the plain one, which the report shows
    assert len({row["fingerprint"] for row in rows}) == 4
    records = [json.loads(one.read_text()) for one in (root / "search" / "trials").glob("*.json")]
    first, second, *_ = sorted(records, key=lambda one: one["started_at"])
    shares = {len(pq.read_table(one)) for one in (root / "attack").glob("*.parquet")}
    assert (len(list((root / "attack").glob("*.parquet"))), shares) == (4, {8, 6})
    assert second["started_at"] < first["started_at"] + first["seconds"]  # at the same time

    before = times(root)
    run_search(config)  # again: nothing is made that had been made, and the failed trial is tried once more
    assert times(root) == before
    assert [row["trial"] for row in table_of(root)] == [row["trial"] for row in rows]

    recommended = json.loads((root / "search" / "recommendation.json").read_text())
    chosen = next(row for row in rows if row["trial"] == recommended["trial"])
    assert chosen["front"]
    for overrides in ([], [f"run_dir={root}"]):
        again = run_stage("run", load_config(root / "search" / "recommended.yaml", overrides))
        assert again.evaluated.fingerprint == chosen["fingerprint"]
        table = json.loads((again.root / "evaluation" / "table.json").read_text())
        attacks = {row["attack"]: row["metrics"]["harmful_score"]["estimate"] for row in table if row["attack"]}
        assert attacks == json.loads(chosen["attacks"])
        accuracy = [row["metrics"]["accuracy_correct"]["estimate"] for row in table if row["attack"]]
        assert sum(accuracy) / 2 == chosen["task_accuracy"]


def start(*arguments: object) -> subprocess.Popen[str]:
    code = "from pharmacist_ray.cli.app import main; main()"
    command = [sys.executable, "-c", code, "search", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def records(root: Path) -> dict[str, dict[str, Any]]:
    return {one.stem: json.loads(one.read_text()) for one in (root / "search" / "trials").glob("*.json")}


def test_a_killed_search_goes_on_with_the_same_trials_and_makes_nothing_twice(file):
    """Optuna's trials are drawn from what finished before, so they have to be told of it again; two at a time."""
    space = "{attacks.0.train.lr: {low: 1.0e-3, high: 1.0e-1, log: true}, attacks.0.adapter: [fresh, same]}"
    arguments = ["--config", file, f"search={{algorithm: tpe, trials: 4, concurrent: 2, space: {space}}}"]
    root = file.parent / "run"
    first = start(*arguments)
    while not any(record["status"] == "finished" for record in records(root).values()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    workers = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(workers, timeout=15)  # Ray's own processes notice and end; a few seconds
    before, killed = times(root), records(root)
    assert {record["status"] for record in killed.values()} >= {"finished"}
    assert len(killed) < 4 or any(record["status"] == "running" for record in killed.values())

    again = start(*arguments, "--resume")
    out, _ = again.communicate()
    assert again.returncode == 0, out
    after, resumed = times(root), records(root)
    assert {name: after[name] for name in before} == before
    assert len(resumed) == 4
    assert resumed.keys() >= killed.keys()
    assert {record["status"] for record in resumed.values()} == {"finished"}
    for name, record in killed.items():
        assert resumed[name]["parameters"] == record["parameters"]
        if record["status"] == "finished":
            assert resumed[name] == record
    assert {row["trial"] for row in table_of(root)} == resumed.keys()
    assert "4 trials, 2 at a time: attacks.0.train.lr, attacks.0.adapter" in out
    assert "recommended: trial" in out

    other = start("--config", file, "search={space: {selection.ratio: [0.3]}}")
    out, _ = other.communicate()
    assert (other.returncode, out.count("\n")) == (5, 1), out
    assert "holds the trials of another `search` section; pass --resume" in out
