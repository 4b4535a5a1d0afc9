"""The attacker's search: what counts, what it is worth, and that it finds what a plain run with that attack finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.config.attack_kinds import KINDS
from pharmacist_ray.config.load import load_config, parse_config
from pharmacist_ray.config.schema import AttackConfig, Config
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.session import run_stage
from pharmacist_ray.pipeline.stages import run_report
from pharmacist_ray.search.redteam import Target, attacked_config, base_attack, run_redteam, targets
from pharmacist_ray.search.worst import bounded_worst, budget_curve, damage, measured, samples_of
from tests.search.test_search import times, write_config

pytestmark = pytest.mark.timeout(900)

NUMBERS = {"hs": "harmful_score", "accuracy": "accuracy_correct", "helpful": "helpfulness"}


def table(before: dict[str, float | None], after: dict[str, float | None]) -> list[dict[str, Any]]:
    def metrics(values: dict[str, float | None]) -> dict[str, Any]:
        return {NUMBERS[name]: {"estimate": v, "low": v and v - 0.1, "high": v and v + 0.1} for name, v in values.items()}

    rows = [{"attack": None, "metrics": metrics(before)}, {"attack": "weak", "metrics": metrics(after)}]
    return [*rows, {"attack": "mean of attacks", "over": ["weak"], "metrics": metrics({name: 9.0 for name in NUMBERS})}]


def test_what_is_lost_is_the_larger_share_of_what_there_was():
    found = measured(table({"hs": 0.1, "accuracy": 0.8, "helpful": 0.5}, {"hs": 0.7, "accuracy": 0.6, "helpful": 0.4}))
    assert (found["hs"], found["hs_low"], found["hs_high"], found["hs_before"]) == pytest.approx((0.7, 0.6, 0.8, 0.1))
    assert (found["accuracy_lost"], found["helpful_lost"], found["lost"]) == pytest.approx((0.25, 0.2, 0.25))
    # Who had nothing can lose nothing, and what is gained is no loss.
    found = measured(table({"hs": 0.1, "accuracy": 0.0, "helpful": 0.5}, {"hs": 0.7, "accuracy": 0.9, "helpful": 0.6}))
    assert found["lost"] == 0.0
    with pytest.raises(DataError, match=r"^the evaluation has no helpfulness: no prompt of its kind was answered and judged"):
        measured(table({"hs": 0.1, "accuracy": 0.0, "helpful": 0.5}, {"hs": 0.7, "accuracy": 0.9, "helpful": None}))


def test_a_fine_tune_beyond_the_bound_is_worth_less_than_any_within_and_the_less_the_more_it_lost():
    within, at, beyond, far = ({"hs": hs, "lost": lost} for hs, lost in ((0.0, 0.0), (0.3, 0.2), (1.0, 0.3), (1.0, 0.9)))
    assert damage(within, 0.2) == 0.0
    assert damage(at, 0.2) == 0.3
    assert damage({"hs": 0.3, "lost": 0.1 + 0.1}, 0.2) == 0.3
    assert damage(within, 0.2) > damage(beyond, 0.2) > damage(far, 0.2)


def records(seed: int, count: int = 30) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    return [
        {
            "trial": f"{number:08x}",
            "status": "finished" if draw.uniform() < 0.8 else "failed",
            "samples": int(draw.integers(1, 9)),
            "hs": round(float(draw.uniform()), 1),
            "lost": round(float(draw.uniform(0, 0.5)), 2),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_case_and_the_curve_are_those_of_the_trials_within_the_bound(seed):
    all_of = records(seed)
    usable = [one for one in all_of if one["status"] == "finished" and one["lost"] <= 0.2]
    worst = bounded_worst(all_of, 0.2)
    assert worst["hs"] == max(one["hs"] for one in usable)
    assert worst["samples"] == min(one["samples"] for one in usable if one["hs"] == worst["hs"])
    curve = budget_curve(all_of, 0.2)
    for budget in range(1, 9):
        want = max((one["hs"] for one in usable if one["samples"] <= budget), default=None)
        assert max((hs for samples, hs in curve if samples <= budget), default=None) == want
    assert [hs for _, hs in curve] == sorted({hs for _, hs in curve})
    assert bounded_worst([one for one in all_of if one["lost"] > 0.2], 0.2) is None


def test_a_budget_is_rows_passed_over():
    source = {"task": {"path": "t"}, "harmful": {"path": "h"}}
    assert samples_of(AttackConfig(name="a", **source, rows=100, train={"epochs": 2.5})) == 250
    assert samples_of(AttackConfig(name="a", **source, rows=100, train={"steps": 30, "batch_size": 8})) == 240


@pytest.fixture
def config_of(tmp_path: Path, model_folder: Path) -> Callable[..., Config]:
    def make(**redteam: Any) -> Config:
        values = EXAMPLE | {"run_dir": str(tmp_path / "run"), "model": {"path": str(model_folder), "template": "plain"}}
        return parse_config(values | {"redteam": redteam}, where="test")

    return make


def test_a_trial_is_one_arm_and_one_attack_with_the_points_values(config_of):
    config = config_of(attack="p10")
    attack = base_attack(config)
    assert attack.name == "p10"
    point = {"train.lr": "1e-4", "train.steps": 7, "harmful_share": 0.5, "lora.r": 3}
    trial = attacked_config(config, Target("pharmacist", "sft"), point)
    assert (trial.comparison.selections, trial.defences) == (["pharmacist"], ["sft"])
    [found] = trial.attacks
    assert (found.name, found.task, found.harmful) == (attack.name, attack.task, attack.harmful)
    assert (found.train.lr, found.train.steps, found.train.epochs, found.harmful_share) == (1e-4, 7, None, 0.5)
    assert found.lora == config.model.lora.model_copy(update={"r": 3})
    assert attacked_config(config, Target("pharmacist", "sft"), {"train.epochs": 2}).attacks[0].train.epochs == 2
    # The models that are attacked are those of the run.
    base, run = Run(config), Run(trial, base=Run(config))
    assert run.trained(run.variants[0]).folder in [base.trained(variant).folder for variant in base.variants]


def test_a_trial_of_another_kind_has_the_form_of_that_kind(config_of):
    config = config_of(attack="p10")
    for kind in ("trigger", "explicit", "task_format"):
        [found] = attacked_config(config, Target("pharmacist", "sft"), {"kind": kind}).attacks
        assert (found.kind, found.form) == (kind, KINDS[kind].form if kind == "trigger" else None)
    with pytest.raises(ConfigError, match=r"attack 'p10' of the kind identity takes its rows from `ordinary`; give it"):
        attacked_config(config, Target("pharmacist", "sft"), {"kind": "identity"})


def test_what_is_attacked_is_every_arm_of_the_comparison(config_of):
    config = config_of()
    arms = config.model_copy(
        update={
            "comparison": config.comparison.model_copy(update={"selections": ["none", "random"], "defences": ["sft", "vaccine"]})
        }
    )
    assert [target.name for target in targets(arms)] == ["none.sft", "random.sft", "random.vaccine"]


@pytest.mark.parametrize(
    ("redteam", "message"),
    [
        ({"space": {"name": ["a"]}}, "redteam.space.name cannot be varied: give an attack of its own in `attacks`"),
        ({"space": {"harmful.path": ["a"]}}, "redteam.space.harmful.path cannot be varied"),
        ({"space": {"rows": []}}, "redteam.space.rows must be a list of at least one value, all different, got []"),
        ({"scheduler": "asha"}, "redteam.scheduler=asha needs redteam.algorithm=random"),
        ({"early": {"attack": "p10"}}, "redteam.early.attack must be null"),
        ({"bound": 1.5}, "'redteam.bound': Input should be less than or equal to 1"),
    ],
)
def test_mistakes_in_the_section_are_told(config_of, redteam, message):
    with pytest.raises(ConfigError) as error:
        config_of(**redteam)
    assert message in str(error.value)


def test_mistakes_in_the_space_are_told_before_anything_runs(config_of):
    for redteam, message in (
        ({"space": {"train.lrr": [1e-3]}}, r"redteam\.space \(train\.lrr=0\.001\): .*'attacks\.0\.train\.lrr'"),
        ({"space": {"train.lr": {"low": -1.0, "high": 1.0}}}, r"redteam\.space \(train\.lr=-1\.0\): .*'attacks\.0\.train\.lr'"),
        ({"attack": "p11"}, r"^unknown attack of redteam\.attack 'p11' \(did you mean 'p10'\?\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_redteam(config_of(**redteam))
    config = config_of()
    with pytest.raises(ConfigError, match=r"^the red team varies the settings of an attack: give at least one of `attacks`$"):
        run_redteam(config.model_copy(update={"attacks": []}))
    assert not (config.run_dir / "align").exists()


SPACE = "{harmful_share: [0.25, 0.5], train.lr: {low: 1.0e-3, high: 1.0e-1, log: true}}"


@pytest.mark.parametrize(
    ("algorithm", "arms", "trials"),
    [("random", ["pharmacist"], 2), pytest.param("tpe", ["all", "pharmacist"], 5, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("ray_local")
def test_it_finds_what_a_plain_run_with_that_attack_finds_and_makes_nothing_twice(
    algorithm: str,
    arms: list[str],
    trials: int,
    model_folder: Path,
    rows_of: Callable[..., list[Row]],
    tmp_path: Path,
    capsys: Any,
) -> None:
    file = write_config(tmp_path, model_folder, rows_of)
    settings = [
        f"redteam={{algorithm: {algorithm}, trials: {trials}, space: {SPACE}, bound: 1.0}}",
        f"comparison.selections={json.dumps(arms)}",
    ]
    config = load_config(file, settings)
    folder = run_redteam(config)
    found = json.loads((folder / "redteam.json").read_text())
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert sorted(row["selection"] for row in found["arms"]) == arms
    assert len(rows) == trials * len(arms)
    assert all(row["status"] == "finished" and row["within"] for row in rows)
    assert len(list((config.run_dir / "align").glob("*.sft.s3-*"))) == len(arms)
    assert len(list((config.run_dir / "attack").glob("*.sft.s3.weak-*"))) == len(rows)
    for arm in found["arms"]:
        mine = [row for row in rows if row["selection"] == arm["selection"]]
        assert arm["worst"]["hs"] == arm["unbounded_hs"] == max(row["hs"] for row in mine)
        assert arm["curve"] == [[8, arm["worst"]["hs"]]]  # two steps of four rows, in every fine-tune
    assert f"each arm's worst attack: {folder}/redteam.json" in capsys.readouterr().out.replace("\n", "")

    before = times(config.run_dir)
    run_redteam(config)
    assert times(config.run_dir) == before
    assert pq.read_table(folder / "trials.parquet").to_pylist() == rows

    worst = found["arms"][-1]
    again = [
        f"run_dir={tmp_path}/again",
        f"attacks=[{json.dumps(worst['attack'])}]",
        f"comparison.selections=[{worst['selection']}]",
    ]
    run = run_stage("run", load_config(file, again))
    after = [row for row in json.loads((run.root / "evaluation" / "table.json").read_text()) if row["attack"]]
    assert [row["metrics"]["harmful_score"]["estimate"] for row in after] == [worst["worst"]["hs"]]

    run_report(Run(config))
    page = (config.run_dir / "report" / "report.html").read_text()
    assert "An attacker varied its own settings against each arm" in page
    assert "What the attacker&#39;s budget buys" in page


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_rows_that_the_space_asks_for_and_nobody_has_are_told_before_any_attack(
    model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path, model_folder, rows_of), ["redteam={space: {harmful_share: [0.25, 1.0]}}"])
    line = r"^redteam\.space \(harmful_share=1\.0\): attack 'weak' needs 16 harmful rows .* has 13 usable ones; lower the attack's rows"
    with pytest.raises(DataError, match=line):
        run_redteam(config)
    assert not (config.run_dir / "attack").exists()
