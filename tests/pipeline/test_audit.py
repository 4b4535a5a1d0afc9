"""`pharmacist audit` on rows with planted compliances."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pharmacist_ray.cli.app import app
from pharmacist_ray.cli.process import plain_failures
from pharmacist_ray.config import load_config
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.audit import run_audit
from pharmacist_ray.storage import read_table
from tests.search.test_search import times, write_config

WORDS = {"refusal": range(0, 8), "harm": range(8, 16), "plain": range(16, 30), "bad": range(30, 37), "good": range(37, 44)}


def rows(count: int, prompt: str, answer: str, seed: int) -> list[dict[str, str]]:
    """Return rows whose prompts and answers are words of their own kinds."""
    draw = random.Random(f"{seed}{prompt}{answer}")

    def text(kind: str) -> str:
        return " ".join(f"w{word}" for word in draw.choices(WORDS[kind], k=draw.randint(3, 6)))

    return [{"prompt": text(prompt), "response": text(answer)} for _ in range(count)]


@pytest.fixture(scope="module")
def place(model_folder, rows_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    values: dict[str, Any] = yaml.safe_load(write_config(folder, model_folder, rows_of).read_text())
    sets = {
        "trusted": rows(80, "bad", "refusal", 1),
        "harmful": rows(80, "bad", "harm", 2),
        "ordinary": rows(80, "good", "plain", 3),
        "user": rows(190, "good", "plain", 4) + rows(10, "bad", "harm", 5),
    }
    for name, some in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    values["data"]["benign"] = {"path": str(folder / "ordinary.jsonl")}
    values["data"].pop("shards")
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def audited(place) -> Path:
    return run_audit(load_config(place / "run.yaml"), [str(place / "user.jsonl")])


def test_planted_compliances_are_found_the_others_are_kept_and_no_row_is_lost(place, audited, capsys):
    config, out = load_config(place / "run.yaml"), audited
    facts = json.loads((out / "audit.json").read_text())
    user = [json.loads(line) for line in (place / "user.jsonl").read_text().splitlines()]
    bad = {row["prompt"] for row in user[190:]}
    ingested = json.loads((out / "ingest" / "candidates" / "manifest.json").read_text())["summary"]
    assert ingested["rows_in"] == 200 == ingested["rows_out"] + ingested["duplicates"]
    assert facts["rows"] == ingested["rows_out"] == facts["kept"] + facts["left_out"] + facts["not_scored"]
    left_out = [json.loads(line) for file in (out / "flags" / "left_out").iterdir() for line in file.read_text().splitlines()]
    found = {line["row"]["prompt"] for line in left_out}
    assert bad <= found  # recall
    assert len(found - bad) <= 0.05 * 190  # false alarms
    cleaned = datasets.load_dataset("parquet", data_files=str(out / "cleaned" / "data" / "*.parquet"), split="train")
    assert {row["prompt"] for row in cleaned} == {row["prompt"] for row in user} - found
    assert len((out / "cleaned" / "curated.jsonl").read_text().splitlines()) == facts["kept"]
    every = read_table(out / "flags" / "rows")
    assert set(every.column_names) == {"id", *config.audit.scorers, "flags", "flagged_by"}
    assert all(str(place / "user.jsonl") in line["source"] for line in left_out)
    naive = next(one for one in facts["thresholds"] if one["scorer"] == "naive_bayes")
    assert (naive["caught"], naive["harmful"], naive["alarms"]) == (40, 40, 0)
    before = times(out)
    run_audit(config, [str(place / "user.jsonl")])
    assert f"cleaned: {facts['kept']} of {facts['rows']} rows" in capsys.readouterr().out
    assert {name: at for name, at in times(out).items() if not name.startswith("cleaned")} == {
        name: at for name, at in before.items() if not name.startswith("cleaned")
    }


@pytest.mark.slow
def test_rows_that_are_all_ordinary_stay(place):
    (place / "calm.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(60, "good", "plain", 9)))
    out = run_audit(load_config(place / "run.yaml", ["audit.agree=2"]), [str(place / "calm.jsonl")])
    facts = json.loads((out / "audit.json").read_text())
    assert facts["left_out"] <= 1
    assert out.name.startswith("calm-")


def test_what_is_missing_is_told_before_anything_runs(place):
    config = load_config(place / "run.yaml")
    with pytest.raises(ConfigError, match=r"^there is nothing to audit: give a file, or audit.data$"):
        run_audit(config)
    lacking = load_config(place / "run.yaml", ["data.benign=null"])
    with pytest.raises(ConfigError, match=r"^an audit needs data.benign, trusted ordinary rows"):
        run_audit(lacking, ["x.jsonl"])
    blind = load_config(place / "run.yaml", ["audit.scorers=[keyword]"])
    with pytest.raises(ConfigError, match=r"can be held against known ones, and audit\.scorers has none: add"):
        run_audit(blind, ["x.jsonl"])
    half_blind = load_config(place / "run.yaml", ["audit.scorers=[keyword, guard]"])
    with pytest.raises(
        ConfigError, match=r"^audit.scorers: keyword cannot flag rows, .* take out what has none and leave guard$"
    ):
        run_audit(half_blind, ["x.jsonl"])


@pytest.mark.usefixtures("audited")
def test_the_command_takes_the_rows_and_overrides(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")  # what other tests read stays as it is
    with pytest.raises(SystemExit) as ended, plain_failures():
        app(
            [
                "audit",
                str(place / "user.jsonl"),
                "--config",
                str(place / "run.yaml"),
                f"run_dir={tmp_path / 'run'}",
                "audit.agree=9",
            ]
        )
    assert ended.value.code == 0
    assert "audit: 0 of " in capsys.readouterr().out
