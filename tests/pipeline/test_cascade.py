"""A cascade through the command line: two selectors, two models' scores, a selection, a report, and what a rerun does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pharmacist_ray.config.scoring import STANDS_FOR
from pharmacist_ray.data.schema import Row
from tests.pipeline.test_stages import failed, pharmacist, times

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(600)]

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 4, "lr": 1e-2}
ROWS = 120


@pytest.fixture(scope="module")
def config(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    for seed, (name, count) in enumerate({"candidates": ROWS, "validation": 30, "harmful": 30, "benign": 30}.items()):
        (folder / f"{name}.jsonl").write_text("\n".join(row.raw for row in rows_of(count, seed=seed)) + "\n")
    data = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("candidates", "validation", "harmful", "benign")}
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32, "lora": {"r": 2}},
        "data": {**data, "shards": 3},
        "resources": {"workers": 0, "actors": 0, "cpus_per_worker": 0.5},
        "selector": {"warmup": TRAIN, "checkpoints": [2], "reference": None},
        "scoring": {
            "scorers": ["pharmacist", "low_loss", "random"], "random_draws": 1,
            "proxy": {"layers": 1, "miss": 0.25, "sample": 60},
        },
        "selection": {"scorer": "low_loss", "ratio": 0.2},
        "comparison": {"selections": ["all", "random", "calibrated"]},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def run(config: Path, ray_local: None) -> Path:
    for stage in ("ingest", "fit", "score", "select", "report"):
        outcome = pharmacist(stage, "--config", config)
        assert outcome.code == 0, outcome
        if stage == "score":
            assert "the model saw " in outcome.out
            assert "low_loss: of the model's own top 24 an estimated " in outcome.out
    return config.parent / "run"


def test_both_models_are_fitted_and_the_scores_say_who_was_seen(run: Path) -> None:
    for folder in ("fit", "scores", "proxy/fit", "proxy/scores"):
        assert (run / folder / "manifest.json").exists()
    facts = json.loads((run / "scores" / "manifest.json").read_text())["summary"]["cascade"]
    table = pq.read_table(run / "scores" / "rows")
    stands = table[STANDS_FOR].to_pylist()
    assert len(stands) == facts["candidates"] == ROWS
    assert sum(count > 0 for count in stands) == facts["seen"]
    assert table["low_loss"].null_count == stands.count(0)
    assert table["random_0"].null_count == 0
    assert pq.read_table(run / "proxy" / "scores" / "rows")["low_loss"].null_count == 0
    assert list(facts["arms"]) == ["low_loss", "calibrated"]
    assert not (run / "scores" / "cascade").exists()  # what the scores were put together from


def test_every_arm_gets_its_rows(run: Path) -> None:
    kept = {
        name: pq.read_table(run / "selections" / name / "rows").num_rows for name in ("low_loss", "all", "random_0", "calibrated")
    }
    assert kept == {"low_loss": 24, "all": ROWS, "random_0": 24, "calibrated": 24}
    table = pq.read_table(run / "scores" / "rows")
    unseen = {id for id, count in zip(table["id"].to_pylist(), table[STANDS_FOR].to_pylist(), strict=True) if not count}
    for name in ("low_loss", "calibrated"):
        assert not unseen & set(pq.read_table(run / "selections" / name / "rows")["id"].to_pylist())


def test_the_report_states_what_is_lost(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    assert "What the cascade loses of the rows that the model would keep" in page
    assert "drawn at random" in page
    assert STANDS_FOR not in page.split("The configuration with every key")[0]
    assert "was made from an earlier" not in page


def test_another_share_costs_the_proxy_nothing_and_a_rerun_nobody(run: Path, config: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))  # whose scores the other tests look at
    before = times(run)
    for stage in ("fit", "score", "select"):
        assert pharmacist(stage, "--config", config, f"run_dir={run}").code == 0
    assert times(run) == before
    outcome = pharmacist("score", "--config", config, f"run_dir={run}", "scoring.proxy.miss=0.3")
    assert "made anew: what was there was made with proxy.miss=0.25, wanted is proxy.miss=0.3" in outcome.out
    changed = {name for name, at in times(run).items() if before.get(name) != at}
    assert {name.split("/")[0] for name in changed} == {"scores"}


def test_what_a_cascade_cannot_do_is_said_before_anything_runs(config: Path, run: Path) -> None:
    before = times(run)
    assert failed(2, "score", "--config", config, "selection.near_duplicates=1") == (
        "pharmacist: scoring.proxy bounds what is lost of the model's top rows and cannot heed selection.near_duplicates: use "
        "selection.ratio or count alone, or leave scoring.proxy out\n"
    )
    assert times(run) == before
