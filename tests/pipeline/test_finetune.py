"""`pharmacist finetune`: a user's rows on the aligned model, defended and repaired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pharmacist_ray.cli.app import app
from pharmacist_ray.config import load_config
from pharmacist_ray.data.rows import read_rows
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.pipeline.finetune import run_finetune
from pharmacist_ray.pipeline.session import run_stage
from tests.search.test_search import times, write_config


@pytest.fixture(scope="module")
def place(model_folder, rows_of, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    values: dict[str, Any] = yaml.safe_load(write_config(folder, model_folder, rows_of).read_text())
    (folder / "user.jsonl").write_text("".join(f"{row.raw}\n" for row in rows_of(21, seed=70)))
    values["scoring"] = {"scorers": ["random"], "random_draws": 1}
    values["selection"] = {"scorer": "random", "ratio": 0.5}
    values["comparison"] = {"selections": ["random"], "seeds": [3, 4]}
    values["finetune"] = {
        "objective": "mix", "repair": "few_shot", "train": {"epochs": 1, "batch_size": 4, "lr": 1e-2},
        "parameters": {"mix": {"at_least": 4}, "few_shot": {"rows": 4, "epochs": 1, "batch_size": 4}},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def tuned(place) -> Path:
    return run_finetune(load_config(place / "run.yaml"), [str(place / "user.jsonl")])


def test_all_rows_are_trained_on_with_safe_ones_and_the_model_is_repaired(place, tuned):
    facts = json.loads((tuned / "finetune.json").read_text())
    assert (facts["rows"], facts["defence"], len(facts["adapters"])) == (21, "sft/mix/few_shot", 2)
    assert Path(facts["adapters"][0]).parts[-4] == "align"
    assert Path(facts["adapters"][1]).parts[-4] == "repair"
    ModelRef(facts["base"], tuple(facts["adapters"])).load()
    [mixed] = (place / "run" / "attack").glob("*user-*/rows.parquet")
    user = {json.loads(line)["prompt"] for line in (place / "user.jsonl").read_text().splitlines()}
    trained = set(read_rows([mixed])["prompt"].to_pylist())
    assert user <= trained
    assert len(trained - user) == 4
    result = json.loads((mixed.parent / "run" / "result.json").read_text())
    assert result["steps"] == 7  # one epoch of 25 rows by 4
    assert [row["attack"] for row in facts["table"]] == [None, tuned.name]


def test_a_second_call_trains_nothing_and_a_comparison_shares_the_aligned_model(place, tuned, capsys):
    before = times(place / "run")
    run_finetune(load_config(place / "run.yaml"), [str(place / "user.jsonl")])
    after = times(place / "run")
    assert {name: when for name, when in after.items() if name in before} == before
    assert "harmful score" in capsys.readouterr().out
    run_stage("align", load_config(place / "run.yaml", ["comparison.seeds=[3]"]))
    assert len(list((place / "run" / "align").glob("*/run/result.json"))) == 1


def test_what_is_missing_is_said_in_one_line(place):
    with pytest.raises(ConfigError, match=r"^there is nothing to fine-tune on: give a file, or finetune.data$"):
        run_finetune(load_config(place / "run.yaml"))
    with pytest.raises(ConfigError, match=r"few_shot is a repair"):
        run_finetune(load_config(place / "run.yaml", ["finetune.objective=few_shot"]), [str(place / "user.jsonl")])


def test_the_command_takes_rows_and_settings(place, monkeypatch):
    seen = []
    monkeypatch.setattr("pharmacist_ray.pipeline.finetune.run_finetune", lambda config, data: seen.append((config, data)))
    app(["finetune", "rows.jsonl", "-c", str(place / "run.yaml"), "finetune.objective=lisa"], standalone_mode=False)
    [(config, data)] = seen
    assert (config.finetune.objective, data) == ("lisa", ["rows.jsonl"])
