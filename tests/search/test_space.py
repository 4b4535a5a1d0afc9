from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config import Config
from pharmacist_ray.config.load import dump_config, parse_config
from pharmacist_ray.config.template import EXAMPLE
from pharmacist_ray.errors import ConfigError, ResourceError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.search import search as module
from pharmacist_ray.search.search import check_trial_room
from pharmacist_ray.search.space import check_space, decoded, domains, early_attack, listed, resolved, trial_config, trial_name


@pytest.fixture
def config_of(model_folder: Path, tmp_path: Path):
    """Return a maker of configurations: config_of(space, algorithm="random", trials=5)."""

    def make(space: dict[str, Any], more: dict[str, Any] | None = None, **search: Any) -> Config:
        values = EXAMPLE | {"run_dir": str(tmp_path / "run"), "model": {"path": str(model_folder), "template": "plain"}}
        return parse_config(values | {"search": {"space": space, **search}} | (more or {}), where="test")

    return make


def points_of(config: Config) -> list[dict[str, Any]]:
    return check_space(Run(config))


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        points_of(config)
    return str(error.value)


def test_a_grid_is_every_combination_once_in_the_order_of_the_file(config_of):
    space = {"selection.ratio": [0.2, 0.4], "alignment.objective": ["sft", "vaccine"], "comparison.seeds": [[0], [1, 2]]}
    points = points_of(config_of(space))
    assert len(points) == 8
    assert points[1] == {"selection.ratio": 0.2, "alignment.objective": "sft", "comparison.seeds": [1, 2]}
    assert len({trial_name(point) for point in points}) == 8


def test_a_trial_aligns_one_selection_by_one_defence_and_keeps_the_rest(config_of):
    config = config_of(
        {"selection.ratio": [0.2]}, {"comparison": {"selections": ["all"], "defences": ["sft", "vaccine"], "seeds": [7]}}
    )
    trial = trial_config(config, {"selection.ratio": 0.2, "alignment.objective": "booster", "attacks.0.train.lr": 5e-4})
    assert (trial.selection.ratio, trial.defences, trial.attacks[0].train.lr) == (0.2, ["booster"], 5e-4)
    assert (trial.comparison.selections, trial.comparison.seeds, trial.search) == (["calibrated"], [7], None)
    assert trial.attacks[0].task == config.attacks[0].task
    assert trial_config(config, {"selection.scorer": "loss_gap"}).comparison.selections == ["loss_gap"]
    listed = trial_config(config, {"selection.scorer": ["pharmacist", "loss_gap"]})
    assert listed.comparison.selections == ["pharmacist-loss_gap"]
    everything = config_of({"selection.ratio": [0.2]}, selection="all")
    assert trial_config(everything, {}).comparison.selections == ["all"]


def test_values_are_named_as_the_configuration_holds_them(config_of):
    config = config_of({"attacks.0.train.lr": ["1e-4"], "alignment.parameters.vaccine.rho": ["2e0"]})
    point, trial = resolved(config, {"attacks.0.train.lr": "1e-4", "alignment.parameters.vaccine.rho": "2e0"})
    assert point == {"attacks.0.train.lr": 1e-4, "alignment.parameters.vaccine.rho": 2.0}
    assert resolved(config, point) == (point, trial)
    assert trial_name(point) == trial_name(dict(reversed(point.items())))


def test_random_draws_are_the_same_for_a_seed_all_different_and_inside(config_of):
    space: dict[str, Any] = {
        "selection.ratio": {"low": 0.1, "high": 0.9, "step": 0.1},
        "attacks.0.train.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "alignment.train.steps": {"low": 2, "high": 4},
        "alignment.objective": ["sft", "vaccine"],
    }
    config = config_of(space, algorithm="random", trials=40, seed=5)
    points = points_of(config)
    assert points == points_of(config) != points_of(config_of(space, algorithm="random", trials=40, seed=6))
    assert len({trial_name(point) for point in points}) == 40
    assert {point["alignment.train.steps"] for point in points} == {2, 3, 4}  # both ends
    assert {round(point["selection.ratio"] * 10, 9) for point in points} <= set(range(1, 10))
    assert {point["selection.ratio"] for point in points} >= {0.3}  # not 0.30000000000000004
    rates = [point["attacks.0.train.lr"] for point in points]
    assert min(rates) >= 1e-5
    assert max(rates) <= 1e-3
    assert 0.3 < sum(rate < 1e-4 for rate in rates) / 40 < 0.7  # even on the logarithmic scale


def test_a_small_space_ends_a_random_search_early(config_of):
    assert len(listed(config_of({"selection.ratio": [0.2, 0.4, 0.6]}, algorithm="random", trials=50).search)) == 3


def test_optuna_draws_a_list_by_place(config_of):
    search = config_of({"comparison.seeds": [[0], [1]], "selection.ratio": [0.2]}, algorithm="tpe", trials=5).search
    assert listed(search) == []
    assert domains(search)["comparison.seeds"].categories == [0, 1]
    assert decoded(search, {"comparison.seeds": 1, "selection.ratio": 0}) == {"comparison.seeds": [1], "selection.ratio": 0.2}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"selection.ratoi": [0.1]}, "unknown key 'selection.ratoi' (did you mean 'ratio'?)"),
        ({"attacks.3.rows": [10]}, "search.space: 'attacks.3.rows': 'attacks' is a list of 1; use a number below that, not '3'"),
        ({"selection.ratio": [0.5, 1.5]}, "search.space (selection.ratio=1.5): 'selection.ratio': Input should be less than or equal to 1"),
        ({"alignment.objective": ["sft", "vacine"]}, "unknown objective 'vacine' (did you mean 'vaccine'?)"),
        ({"alignment.parameters.vaccine.rhoo": [1.0]}, "vaccine.rhoo: Extra inputs are not permitted; vaccine has rho"),
        ({"alignment.parameters.vacine.rho": [1.0]}, "unknown section of alignment.parameters 'vacine'"),
        ({"selection.scorer": ["less"]}, "selection 'less' is not among scoring.scorers"),
        ({"selection.count": [10]}, "set exactly one of selection.ratio, selection.count and selection.threshold"),
        ({"selection": [3]}, "'selection': Input should be a valid dictionary"),
        ({"resources.workers": [1, 2]}, "search.space: 'resources.workers' cannot be varied: trials share them"),
        ({"comparison.selections": [["all"]]}, "vary selection.scorer, or set search.selection"),
        ({"search.seed": [1]}, "search.space: 'search.seed' cannot be varied"),
    ],
)  # fmt: skip
def test_mistakes_in_the_space_are_found_before_anything_starts(config_of, space, message):
    assert message in refused(config_of(space))


def test_each_end_of_a_range_and_each_value_is_checked_also_where_points_are_drawn_later(config_of):
    drawn = {"algorithm": "nsga2", "trials": 4}
    assert points_of(config_of({"selection.ratio": {"low": 0.1, "high": 1.0}}, **drawn)) == []
    assert "selection.ratio=1.5" in refused(config_of({"selection.ratio": {"low": 0.1, "high": 1.5}}, **drawn))
    space = {"selection.ratio": {"low": 0.1, "high": 0.5}, "selector.mode": ["one_shot", "iterative"]}
    assert "selector.mode=iterative needs selector.inner_lr above 0" in refused(config_of(space, **drawn))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {}}, "'search.space': Dictionary should have at least 1 item"),
        ({"space": {"seed": []}}, "search.space.seed must be a list of at least one value, all different, got []"),
        ({"space": {"seed": [1, 2, 1]}}, "all different, got [1, 2, 1]"),
        ({"space": {"seed": {"low": 1, "high": 2}}}, "grid needs lists of values, but search.space.seed is a range"),
        ({"space": {"seed": [1]}, "trials": 4}, "search.trials must be null: a grid tries every combination"),
        ({"space": {"seed": [1]}, "algorithm": "tpe"}, "with search.algorithm=tpe, search.trials must be set"),
        (
            {"space": {"seed": [1, 2]}, "algorithm": "nsga2", "trials": 2, "scheduler": "asha"},
            "search.scheduler=asha stops trials by one number, but search.algorithm=nsga2 weighs four against each other; set "
            "search.scheduler=none, or algorithm=grid or random",
        ),
        ({"space": {"seed": [1]}, "early": {"prompts": 0}}, "'search.early.prompts': Input should be greater than 0"),
        ({"space": {"seed": {"low": 2, "high": 2}}, "algorithm": "random", "trials": 1}, "needs low < high"),
        ({"space": {"seed": {"low": 0, "high": 2, "log": True}}, "algorithm": "random", "trials": 1}, "needs low above 0"),
        ({"space": {"seed": {"low": 1, "high": 4, "step": 2}}, "algorithm": "random", "trials": 1}, "multiples of its step"),
    ],
)
def test_mistakes_in_the_section_are_told(config_of, search, message):
    with pytest.raises(ConfigError) as error:
        config_of(**search)
    assert message in str(error.value)


def test_the_attack_of_the_early_look_must_be_one_of_the_suite(config_of):
    found = refused(config_of({"selection.ratio": [0.2]}, early={"attack": "p11"}))
    assert "unknown attack of search.early.attack 'p11' (did you mean 'p10'?)" in found
    config = config_of({"selection.ratio": [0.2]})
    assert early_attack(config.search.early, config).name == "p10"


def test_a_search_needs_its_section_and_something_to_judge_by(config_of):
    with pytest.raises(ConfigError, match="there is no `search` section in the configuration"):
        module.run_search(config_of({"seed": [1]}).model_copy(update={"search": None}))
    for lacking in ({"attacks": []}, {"evaluation": None}):
        assert "give `evaluation` and at least one of `attacks`" in refused(config_of({"seed": [1]}, lacking))


def test_the_section_survives_being_written_and_read(config_of):
    config = config_of({"selection.ratio": {"low": 0.1, "high": 1.0}, "seed": [1, 2]}, algorithm="tpe", trials=3)
    import yaml

    assert parse_config(yaml.safe_load(dump_config(config)), where="again") == config


def test_trials_lie_apart_and_share_what_is_the_same(config_of):
    config = config_of({"selection.ratio": [0.2]})
    base = Run(config)
    usual, less, other = (
        Run(trial_config(config, point), base=base) for point in ({}, {"selection.ratio": 0.2}, {"selector.intensity": 0.5})
    )
    for run in (usual, less):
        assert run.fitted.folder == base.fitted.folder
        assert run.scored.folder == base.scored.folder
    assert other.fitted.folder == base.root / "search" / "fit" / other.fitted.fingerprint[:8]
    assert other.ingested("candidates").folder == base.ingested("candidates").folder
    selected = {run.selected("pharmacist").folder for run in (usual, less, other)}
    assert len(selected) == 3
    assert {folder.parent for folder in selected} == {base.root / "selections"}
    assert base.selected("pharmacist").folder not in selected
    assert len({run.evaluated.folder for run in (base, usual, less, other)}) == 4
    variant = usual.variants[0]
    assert usual.trained(variant).folder == base.trained(variant).folder
    assert usual.selected("pharmacist").fingerprint == base.selected("pharmacist").fingerprint


@pytest.mark.parametrize(
    ("resources", "trials", "message"),
    [
        ({"workers": 2, "cpus_per_worker": 1.5}, 2, "2 trials at a time need 6.2 CPU but the cluster has 6"),
        ({"actors": 5}, 1, "1 trials at a time need 6.1 CPU but the cluster has 6"),
        ({"gpus_per_worker": 1.0}, 1, "1 trials at a time need 1 GPU but the cluster has 0"),
    ],
)
def test_trials_that_would_wait_for_each_other_do_not_start(config_of, monkeypatch, resources, trials, message):
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 6.0})
    found = config_of({"seed": [1]}, {"resources": resources}).resources
    with pytest.raises(ResourceError, match=message):
        check_trial_room(found, trials)
    monkeypatch.setenv("PHARMACIST_AUTOSCALING", "1")
    check_trial_room(found, trials)


def test_a_folder_of_another_search_is_not_taken_unasked(config_of):
    first, second = config_of({"seed": [1, 2]}), config_of({"seed": [1, 2, 3]})
    module._claim(Run(first), first.search, False)
    module._claim(Run(first), first.search.model_copy(update={"concurrent": 3, "scheduler": "asha"}), False)
    with pytest.raises(
        module.ArtifactError, match="holds the trials of another `search` section; pass --resume to go on with this one"
    ):
        module._claim(Run(second), second.search, False)
    module._claim(Run(second), second.search, True)
    module._claim(Run(second), second.search, False)
