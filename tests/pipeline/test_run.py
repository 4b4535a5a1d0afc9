from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config import Config
from pharmacist_ray.config.load import apply_override, parse_config
from pharmacist_ray.errors import ConfigError
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.variants import Variant

NAMES = ("alignment", "validation", "harmful", "benign", "task", "attacker", "eval_harmful", "eval_benign", "eval_task")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name in NAMES:
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = {name: {"path": f"{tmp_path}/{name}.jsonl"} for name in NAMES}
    attack = {"task": path["task"], "harmful": path["attacker"]}
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"candidates": path["alignment"], **{name: path[name] for name in ("validation", "harmful", "benign")}},
        "attacks": [{"name": "weak", **attack}, {"name": "strong", **attack, "harmful_share": 0.5}],
        "evaluation": {
            "harmful_prompts": path["eval_harmful"], "benign_prompts": path["eval_benign"], "task": {"source": path["eval_task"]},
        },
        "comparison": {"selections": ["all", "random", "pharmacist"], "seeds": [0, 1]},
    }  # fmt: skip


def config_of(values: dict[str, Any], *overrides: str) -> Config:
    changed = copy.deepcopy(values)
    for override in overrides:
        apply_override(changed, override)
    return parse_config(changed, where="test")


def prints(values: dict[str, Any], *overrides: str) -> dict[str, str]:
    """Return the fingerprint of every artifact of a run, by a name of its own."""
    run = Run(config_of(values, *overrides))
    found = {f"ingest {name}": run.ingested(name).fingerprint for name in run.sources}
    found |= {"fit": run.fitted.fingerprint, "score": run.scored.fingerprint}
    found |= {f"select {arm}": run.selected(arm).fingerprint for arm in run.arms}
    for variant in run.variants:
        found[f"align {variant.name}"] = run.trained(variant).fingerprint
        found |= {f"attack {one.name}": run.trained(one).fingerprint for one in run.attacks_on(variant)}
    if run.config.evaluation is not None:
        found["evaluate"] = run.evaluated.fingerprint
        found |= {
            f"answer {one.name}": run.answers(one).name for variant in run.variants for one in (variant, *run.attacks_on(variant))
        }
    return found


def changed_by(values: dict[str, Any], *overrides: str) -> set[str]:
    """Return the stages of which some artifact that was there before is made anew."""
    before, after = prints(values), prints(values, *overrides)
    return {name.split()[0] for name in before if before[name] != after.get(name)}


def cells_in(names: set[str]) -> set[str]:
    """Return the defences of the cells that artifacts are of, with ``-`` for what belongs to no cell."""
    return {place[1] if len(place := name.split(".")) > 1 else "-" for name in names}


AFTER_ALIGN = {"attack", "answer", "evaluate"}
AFTER_FIT = {"score", "select", "align", *AFTER_ALIGN}
DEFENCES = "comparison.defences=[sft, vaccine, repnoise, booster, booster+vaccine]"


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("resources.workers=2", set()),
        ("resources.parallel_runs=4", set()),
        ("run_dir=/elsewhere", set()),
        ("tracking.to=[tensorboard]", set()),
        ("selection.export=[trl, axolotl]", set()),
        ("evaluation.bootstrap_draws=7", {"evaluate"}),
        ("evaluation.max_new_tokens=5", {"answer", "evaluate"}),
        ("evaluation.judge=testbed", {"answer", "evaluate"}),
        ("attacks.0.train.lr=1e-4", AFTER_ALIGN),
        ("attacks.1.harmful_share=0.2", AFTER_ALIGN),
        ("alignment.train.steps=3", {"align", *AFTER_ALIGN}),
        ("alignment.train.epochs=2", {"align", *AFTER_ALIGN}),
        ("alignment.replay=5", {"align", *AFTER_ALIGN}),
        ("selection.ratio=0.3", {"select", "align", *AFTER_ALIGN}),
        ("scoring.method=ghost", AFTER_FIT),
        ("selector.intensity=0.2", {"fit", *AFTER_FIT}),
        ("seed=1", {"fit", *AFTER_FIT}),
        ("data.candidates.layout=messages", {"ingest", "fit", *AFTER_FIT}),
        ("model.max_length=64", {"ingest", "fit", *AFTER_FIT}),
    ],
)
def test_a_setting_makes_anew_what_depends_on_it_and_nothing_else(values, override, stages):
    assert changed_by(values, override) == stages


ENDPOINT = "{kind: endpoint, url: http://h/v1, model: m, template: harmbench%s}"


@pytest.mark.parametrize(
    ("more", "stages"),
    [
        (", concurrency: 2, timeout_s: 5, patience_s: 9, key_variable: KEY", set()),
        (", url: http://other/v1", set()),
        (", threshold: 0.4", {"answer", "evaluate"}),
        (", parameters: {seed: 1}", {"answer", "evaluate"}),
    ],
)
def test_how_an_endpoint_is_asked_makes_nothing_anew(values, more, stages):
    values = config_of(values, "evaluation.judge=" + ENDPOINT % "").model_dump(mode="json")
    assert changed_by(values, "evaluation.judge=" + ENDPOINT % more) == stages


def test_a_judges_template_is_known_by_its_content(values, tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text(text)
    judge = f"evaluation.judge=[phrases, {{kind: generative, path: org/judge, template_file: {tmp_path}/a/mine.yaml}}]"
    values = config_of(values, judge).model_dump(mode="json")
    assert changed_by(values, judge.replace("/a/mine", "/b/mine")) == set()
    assert changed_by(values, judge.replace("/a/mine", "/c/mine")) == {"answer", "evaluate"}
    assert changed_by(values, judge.replace("org/judge", "org/other")) == {"answer", "evaluate"}


def test_an_attacks_setting_leaves_the_other_attack_alone(values):
    before, after = prints(values), prints(values, "attacks.0.train.lr=1e-4")
    changed = {name for name in before if before[name] != after[name]}
    attacked = {name for name in before if name.startswith(("attack ", "answer ")) and name.endswith(".weak")}
    assert changed == {"evaluate", *attacked}
    assert len(attacked) == 2 * 10


def test_every_selection_is_crossed_with_every_defence(values):
    run = Run(
        config_of(
            values, "comparison.selections=[all,pharmacist]", "comparison.defences=[sft,vaccine,sft]", "comparison.seeds=[3]"
        )
    )
    assert run.config.defences == ["sft", "vaccine"]
    assert [variant.name for variant in run.variants] == [
        "all.sft.s3",
        "pharmacist.sft.s3",
        "all.vaccine.s3",
        "pharmacist.vaccine.s3",
    ]
    (weak, _), aligned = run.attacks_on(run.variants[3]), run.variants[3]
    assert (weak.name, weak.aligned) == ("pharmacist.vaccine.s3.weak", aligned)
    for variant in (aligned, weak):
        artifact = run.trained(variant)
        assert artifact.folder.name == f"{variant.name}-{artifact.fingerprint[:8]}"
    alone = Run(config_of(values, "alignment.objective=vaccine", "comparison.seeds=[3]"))
    assert alone.config.defences == ["vaccine"]
    assert alone.trained(aligned).fingerprint == run.trained(aligned).fingerprint


@pytest.mark.parametrize(
    ("overrides", "defences"),
    [
        (["alignment.parameters={vaccine: {rho: 1.5}}"], {"vaccine", "booster+vaccine"}),
        (["alignment.parameters={booster: {lambda: 1.5}}"], {"booster", "booster+vaccine"}),
        (["alignment.parameters={repnoise: {alpha: 0.5}}"], {"repnoise"}),
        (["alignment.parameters={t_vaccine: {rho: 1.5}}"], set()),
        (["alignment.objective=booster"], set()),
        (["alignment.harmful={path: x.jsonl}"], {"repnoise", "booster", "booster+vaccine"}),
        (["alignment.train.lr=0.5"], {"sft", "vaccine", "repnoise", "booster", "booster+vaccine"}),
    ],
)
def test_a_defences_setting_makes_its_own_cells_anew_and_no_others(values, overrides, defences):
    before, after = prints(values, DEFENCES), prints(values, DEFENCES, *overrides)
    changed = {name for name in before if before[name] != after[name]}
    assert cells_in(changed) - {"-"} == defences
    assert {name for name in changed if "." not in name} == ({"evaluate"} if defences else set())
    for defence in defences:
        mine = {name for name in before if f".{defence}." in name}
        assert mine <= changed
        assert len(mine) == 10 + 2 * 10 + 3 * 10  # aligned, attacked twice, all of them answering


def test_the_harm_that_defences_look_at_is_a_source_of_its_own_and_the_selectors_stays(values, tmp_path):
    before = prints(values, DEFENCES, f"alignment.harmful.path={tmp_path}/benign.jsonl")
    (tmp_path / "harmful.jsonl").write_text("something else")
    after = prints(values, DEFENCES, f"alignment.harmful.path={tmp_path}/benign.jsonl")
    assert before["ingest align-harmful"] == after["ingest align-harmful"]
    assert before["ingest harmful"] != after["ingest harmful"]
    for more, alignments, services in (
        ([], "harmful", "harmful"),
        (["alignment.harmful.path=x"], "align-harmful", "align-harmful"),
        (["finetune.harmful.path=x"], "harmful", "finetune-harmful"),
    ):
        run = Run(config_of(values, *more))
        assert (run.harmful(), run.harmful(service=True)) == (alignments, services)


def test_a_models_answers_have_one_folder_whatever_else_is_compared(values):
    one, more = (
        Run(config_of(values)),
        Run(config_of(values, "comparison.seeds=[5,0,1]", DEFENCES, "evaluation.bootstrap_draws=9")),
    )
    folders = [
        run.answers(variant) for run in (one, more) for variant in run.variants if variant.seed != 5 and variant.defence == "sft"
    ]
    assert folders[: len(one.variants)] == folders[len(one.variants) :]
    every = [more.answers(each) for variant in more.variants for each in (variant, *more.attacks_on(variant))]
    assert len(set(every)) == len(every) == 3 * 15 * 5
    assert {folder.parent for folder in every} == {more.root / "answers"}


def test_the_arm_of_all_rows_does_not_depend_on_the_rule(values):
    before, after = prints(values), prints(values, "selection.ratio=0.3", "selection.jsonl=true")
    for name in ("select all", "align all.sft.s0", "attack all.sft.s1.weak", "answer all.sft.s1.weak"):
        assert before[name] == after[name]
    for name in ("select pharmacist", "select random_1", "align pharmacist.sft.s0"):
        assert before[name] != after[name]


@pytest.mark.parametrize(
    "more",
    [
        "comparison.seeds=[0,1,2]", "comparison.selections=[all,random,pharmacist,loss_gap]", "comparison.seeds=[1,0]",
        "comparison.defences=[sft,vaccine]", "comparison.defences=[booster,sft]",
    ],
)  # fmt: skip
def test_a_larger_comparison_keeps_the_cells_that_are_there(values, more):
    before, after = prints(values), prints(values, more)
    assert len(after) >= len(before)
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("alignment", {"ingest", "fit", *AFTER_FIT}),
        ("benign", {"ingest", "fit", *AFTER_FIT}),
        ("attacker", {"ingest", *AFTER_ALIGN}),
        ("eval_task", {"ingest", "answer", "evaluate"}),
    ],
)
def test_a_changed_file_makes_anew_what_was_read_from_it(values, tmp_path, name, stages):
    before = prints(values)
    (tmp_path / f"{name}.jsonl").write_text("something else")
    after = prints(values)
    assert {artifact.split()[0] for artifact in before if before[artifact] != after[artifact]} == stages


def test_a_changed_model_makes_everything_anew(values, tmp_path):
    before = prints(values)
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    after = prints(values)
    assert all(before[name] != after[name] for name in before)


def test_a_run_agrees_with_itself_when_a_file_changes_meanwhile(values, tmp_path):
    run = Run(config_of(values))
    before = run.ingested("candidates").fingerprint
    (tmp_path / "alignment.jsonl").write_text("something else")
    assert run.ingested("candidates").fingerprint == before
    assert Run(config_of(values)).ingested("candidates").fingerprint != before


def test_a_calibrated_selection_holds_rows_out_of_the_fit_and_a_list_of_scores_does_not(values):
    plain, calibrated = prints(values), prints(values, "comparison.selections=[all, random, pharmacist, calibrated]")
    assert {name for name in plain if name.startswith("ingest")} <= {name for name in plain if plain[name] == calibrated[name]}
    assert plain["fit"] != calibrated["fit"]
    run = Run(config_of(values, "selection.scorer=calibrated"))
    assert run.main_selection.folder == run.root / "selections" / "calibrated"
    assert run.trusted.folders["harmful"] == str(run.root / "planted" / "fit" / "harmful.parquet")
    assert Run(config_of(values)).planted is None
    trial = Run(config_of(values, "selection.scorer=calibrated", "selector.trusted_rows=50"), base=run)
    assert trial.planted.folder == run.root / "search" / "planted" / trial.planted.fingerprint[:8]
    same = Run(config_of(values, "selection.scorer=calibrated", "selection.ratio=0.1"), base=run)
    assert same.planted.folder == run.root / "planted"

    listed = Run(config_of(values, "selection.scorer=[pharmacist, loss_gap]"))
    assert listed.scored.fingerprint == plain["score"]
    assert listed.main_selection.folder.name == "pharmacist-loss_gap"
    assert listed.main_selection.config["weights"] == {"pharmacist": 1.0, "loss_gap": 1.0}
    assert listed.selected("pharmacist").fingerprint == plain["select pharmacist"]


def test_random_stands_for_its_draws_and_names_occur_once(values):
    run = Run(config_of(values, "scoring.random_draws=2", "comparison.selections=[random, all, random]", "comparison.seeds=[3]"))
    assert run.arms == ["random_0", "random_1", "all"]
    assert [variant.name for variant in run.variants] == ["random_0.sft.s3", "random_1.sft.s3", "all.sft.s3"]
    assert [variant.name for variant in run.attacks_on(run.variants[2])] == ["all.sft.s3.weak", "all.sft.s3.strong"]
    assert Run(config_of(values, "selection.scorer=random")).main_selection.folder.name == "random_0"


def test_the_groups_of_coverage_take_turns_and_change_nothing_of_the_other_scores(values):
    scorers = "scoring.scorers=[pharmacist, loss_gap, coverage, random]"
    run = Run(config_of(values, scorers, "selector.coverage.groups=3", "comparison.selections=[trusted+coverage, random]"))
    assert "coverage" in run.selections
    columns = ("coverage_0", "coverage_1", "coverage_2")
    assert {arm: run.turns(arm) for arm in run.selections} == dict.fromkeys(run.selections, ()) | {"coverage": columns}
    assert "groups" in run.parts
    assert "groups" not in Run(config_of(values)).parts
    assert Run(config_of(values, "selector.coverage.groups=4")).fitted.fingerprint == Run(config_of(values)).fitted.fingerprint
    with pytest.raises(ConfigError, match=r"^.*selection\.scorer lists 'coverage', which has no rank to add up"):
        config_of(values, scorers, "selection.scorer=[pharmacist, coverage]")


def test_sources_are_what_the_configuration_names(values):
    run = Run(config_of(values))
    assert list(run.sources) == [
        "candidates", "validation", "harmful", "benign", "attack-weak-task", "attack-weak-harmful", "attack-strong-task",
        "attack-strong-harmful", "eval-harmful", "eval-benign", "eval-task",
    ]  # fmt: skip
    assert [name for name, (_, answered) in run.sources.items() if not answered] == ["eval-harmful", "eval-benign"]


def test_a_model_is_the_base_with_the_adapters_of_its_cell(values):
    run = Run(config_of(values, "attacks.1.adapter=same"))
    weak, strong = run.attacks_on(Variant("all", "sft", 0))
    aligned = str(run.trained(Variant("all", "sft", 0)).folder / "run" / "adapter")
    assert run.model_of(Variant("all", "sft", 0)).adapters == (aligned,)
    assert run.model_of(weak).adapters == (aligned, str(run.trained(weak).folder / "run" / "adapter"))
    assert run.model_of(strong).adapters == (str(run.trained(strong).folder / "run" / "adapter"),)
    assert {run.model_of(variant).path for variant in (weak, strong)} == {run.config.model.path}


def test_full_weights_are_a_model_of_their_own(values):
    run = Run(config_of(values, "alignment.train.weights=full", "attacks.1.train.weights=full"))
    weak, strong = run.attacks_on(Variant("all", "sft", 0))
    aligned = str(run.trained(Variant("all", "sft", 0)).folder / "run" / "model")
    assert (run.model_of(Variant("all", "sft", 0)).path, run.model_of(Variant("all", "sft", 0)).adapters) == (aligned, ())
    assert (run.model_of(weak).path, len(run.model_of(weak).adapters)) == (aligned, 1)
    assert run.model_of(strong).path == str(run.trained(strong).folder / "run" / "model")


def test_a_run_without_evaluation_says_so(values):
    with pytest.raises(ConfigError, match="there is no `evaluation` section in the configuration; `pharmacist init` shows one"):
        _ = Run(config_of(values, "evaluation=null")).evaluated


def test_weights_concern_the_arms_whose_score_tells_rows_apart(values):
    values["comparison"]["selections"] = [
        "all",
        "random",
        "pharmacist",
        "trusted",
        "trusted+pharmacist",
        "trusted+random",
        "none",
    ]
    before, after = prints(values), prints(values, "alignment.weighted=true")
    anew = {name for name in before if before[name] != after[name] and name.startswith("align")}
    assert anew == {f"align {arm}.sft.s{seed}" for arm in ("pharmacist", "trusted+pharmacist") for seed in (0, 1)}
    assert "weighted" not in Run(config_of(values)).alignment("sft")
