from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from pharmacist_ray.benchmarks.matrix import CURATED, DEFENCES, UNDEFENDED, by_arm, matrix, show, summarised
from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.load import load_config
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from pharmacist_ray.testbed.guard import make_guard
from pharmacist_ray.testbed.world import World
from pharmacist_ray.training.objectives import ALIGNING, OBJECTIVES

MINE = (CURATED, "sft/lisa")


def row(arm: tuple[str, str], attack: str | None, hs: float, accuracy: float = 0.9) -> dict[str, Any]:
    metrics = {"harmful_score": hs, "accuracy_correct": accuracy, "helpfulness": 0.8, "over_refusal": 0.1}
    named = {"selection": arm[0], "defence": arm[1], "attack": attack}
    return named | {"metrics": {name: {"estimate": value} for name, value in metrics.items()}}


def test_an_arms_numbers_are_means_over_all_attacks_and_the_worst_of_them():
    table = [
        row(MINE, None, 0.1),
        row(MINE, "a", 0.2, 0.7),
        row(MINE, "b", 0.6),
        row(MINE, "mean of attacks", 9.0) | {"over": []},
    ]
    found = by_arm(table)[MINE]
    assert found == pytest.approx(
        {
            "helpful_before": 0.8, "hs_before": 0.1, "hs a": 0.2, "hs b": 0.6, "mean": 0.4, "worst": 0.6,
            "accuracy": 0.8, "helpful": 0.8, "over_refusal": 0.1,
        }
    )  # fmt: skip


WORLDS = {
    20: {
        UNDEFENDED: {"mean": 0.9, "bounded": 0.9},
        MINE: {"mean": 0.3, "bounded": 0.5},
        (CURATED, "sft"): {"mean": 0.5, "bounded": 0.9},
    },
    21: {
        UNDEFENDED: {"mean": 0.8, "bounded": 0.95},
        MINE: {"mean": 0.4, "bounded": 0.6},
        (CURATED, "sft"): {"mean": 0.5, "bounded": 0.9},
    },
    22: {UNDEFENDED: {"mean": 0.9, "bounded": 0.9}, MINE: {"mean": 0.5, "bounded": 0.55}, (CURATED, "sft"): {"mean": 0.6}},
}


def test_means_over_worlds_have_students_intervals_and_differences_are_of_the_same_worlds(capsys):
    rows = summarised(WORLDS)
    found = {(one["selection"], one["defence"]): one for one in rows}
    values = np.array([0.3, 0.4, 0.5])
    low, high = stats.t.interval(0.95, 2, values.mean(), values.std(ddof=1) / np.sqrt(3))
    assert found[MINE]["mean"] == pytest.approx([0.4, low, high], abs=0.02)
    assert found[MINE]["minus"]["bounded"][0] == pytest.approx((0.4 + 0.35 + 0.35) / -3)
    assert (found[MINE]["survives"], found[CURATED, "sft"]["survives"]) == (True, False)
    assert "survives" not in found[UNDEFENDED]
    assert found[CURATED, "sft"]["bounded"][0] == pytest.approx(0.9)  # of the worlds in which something was found
    show([{**one, "hs a": [0.1, 0.0, 0.2]} for one in rows])
    out = capsys.readouterr().out
    assert [line.split()[1:4:2] for line in out.splitlines() if line.startswith("│")] == [
        [CURATED, "sft/lisa"], [CURATED, "sft"], ["none", "sft"],
    ]  # fmt: skip
    assert "not below the undefended model under the adaptive attacker: rank_sum by sft" in " ".join(out.split())


def test_every_objective_is_in_the_matrix_and_its_configuration_is_in_order(tmp_path, monkeypatch, model_folder):
    """The texts of the attackers' forms are words of every world."""
    stages = [part for name in DEFENCES for part in name.split("/")]
    assert set(OBJECTIVES) - {"booster+vaccine"} == set(stages)
    assert all(Defence.of(name).alignment in ALIGNING for name in DEFENCES)
    text = files("pharmacist_ray.testbed").joinpath("matrix.yaml").read_text()
    values = yaml.safe_load(text.replace("{folder}", str(tmp_path)))
    known = {*World(20, 20).vocabulary(), "{prompt}", "{answer}"}
    for attack in values["attacks"]:
        for part in attack.get("form", {}).values():
            assert set(part.split()) <= known, part
    demo = yaml.safe_load(files("pharmacist_ray.testbed").joinpath("demo.yaml").read_text().replace("{folder}", str(tmp_path)))
    del demo["pretraining"]
    demo["model"]["path"] = str(model_folder)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(demo))
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    config = load_config(
        tmp_path / "config.yaml", [*settings, f"comparison.defences={json.dumps(DEFENCES)}", "comparison.selections=[none, all]"]
    )
    World(20, 20).write_jsonl(tmp_path / "data")
    monkeypatch.setattr("pharmacist_ray.testbed.guard.STEPS", 1)
    make_guard(model_folder, World(20, 20), tmp_path / "guard")
    check(Run(config))


def test_one_world_is_no_matrix(tmp_path):
    with pytest.raises(DataError, match=r"^a matrix over one world says nothing of another: give at least 2 numbers of worlds$"):
        matrix(tmp_path, worlds=[20, 20])
