"""What stages check and describe before anything is trained; no Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.load import apply_override, parse_config
from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.rows import count_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ArtifactError, ConfigError, ModelError
from pharmacist_ray.pipeline import attacks, stages, trainings
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.stages import check
from pharmacist_ray.pipeline.trainings import in_steps
from pharmacist_ray.training.objectives import ALIGNING, OBJECTIVES
from pharmacist_ray.training.task import TrainTask

TRAIN = {"steps": 2, "batch_size": 4}
KEPT = {"all": 40, "pharmacist": 14}


@pytest.fixture
def run_of(model_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a maker of runs whose files need not be there."""
    source = {"path": str(tmp_path / "none.jsonl")}
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model_folder), "template": "plain", "max_length": 32},
        "data": {name: source for name in ("candidates", "validation", "harmful", "benign")},
        "selector": {"warmup": TRAIN, "checkpoints": [2], "reference": None},
        "scoring": {"scorers": ["pharmacist", "random"]},
        "alignment": {"train": TRAIN},
        "attacks": [{"name": "weak", "task": source, "harmful": source, "rows": 10, "train": TRAIN}],
        "comparison": {"selections": list(KEPT), "seeds": [3]},
    }

    def make(*overrides: str) -> Run:
        changed = json.loads(json.dumps(values))
        for override in overrides:
            apply_override(changed, override)
        return Run(parse_config(changed, where="test"))

    return make


@pytest.fixture
def trained(rows_of: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, TrainTask]]:
    """Return a function that gives the tasks of aligning and attacking, by name, with every input made up."""

    def described(run: Run) -> dict[str, TrainTask]:
        tasks: list[TrainTask] = []

        def pretend(given: list[TrainTask], **_: Any) -> list[dict[str, Any]]:
            tasks.extend(given)
            return [{"seconds": 1.0} for _ in given]

        monkeypatch.setattr(trainings, "train_all", pretend)
        inputs = [(run.selected(arm), count) for arm, count in KEPT.items()]
        inputs += [(run.ingested(name), 12) for name in run.sources if name != "candidates"]
        for artifact, count in inputs:
            write_rows(rows_of(count), artifact.begin() / "rows" / "part.parquet")
            artifact.finish({})
        trainings.run_align(run)
        attacks.run_attack(run)
        return {task.name: task for task in tasks}

    return described


@pytest.mark.parametrize("epochs", [0.3, 1, 2, 2.5])
@pytest.mark.parametrize(("rows", "batch_size", "share"), [(40, 4, 0.0), (14, 4, 0.0), (7, 10, 0.0), (40, 10, 0.3), (9, 8, 0.5)])
def test_epochs_are_as_many_steps_as_it_takes_to_see_the_rows_so_often(rows, batch_size, share, epochs):
    train = in_steps(TrainConfig(steps=999, epochs=epochs, batch_size=batch_size), rows, share)
    order = BatchOrder(rows, batch_size, 0, 5 if share else 0, round(share * batch_size))
    drawn = [[row for row in order.batch(step) if row < rows] for step in range(train.steps)]
    assert sum(map(len, drawn[:-1])) < epochs * rows <= sum(map(len, drawn))
    assert min(Counter(row for batch in drawn for row in batch).values(), default=0) >= int(epochs)
    assert train.epochs is None


def test_steps_stay_where_no_epochs_are_given():
    train = TrainConfig(steps=7, batch_size=4)
    assert in_steps(train, 1000, 0.3) is train


def test_an_arm_of_fewer_rows_is_aligned_in_fewer_steps_and_replay_rows_do_not_count(run_of, trained, tmp_path):
    steps = {
        name: task.train.steps for name, task in trained(run_of("alignment.train.epochs=3", "attacks.0.train.epochs=2")).items()
    }
    assert steps == {
        "all.sft.s3": 30, "pharmacist.sft.s3": 11, "all.sft.s3.weak": 5, "pharmacist.sft.s3.weak": 5,
    }  # fmt: skip
    replayed = trained(
        run_of("alignment.train.epochs=3", "alignment.replay=8", "alignment.replay_share=0.5", f"run_dir={tmp_path}/replayed")
    )
    assert {name: task.train.steps for name, task in replayed.items() if "weak" not in name} == {
        "all.sft.s3": 60,
        "pharmacist.sft.s3": 21,
    }
    assert count_rows(Path(replayed["all.sft.s3"].replay[0])) == 8


def test_a_defence_gets_its_objective_its_own_settings_and_the_harm_it_may_look_at(run_of, trained):
    run = run_of(
        "comparison.defences=[sft, vaccine, booster]", "alignment.harmful.path=pairs.jsonl", "tracking.to=[tensorboard]",
        "alignment.parameters={vaccine: {rho: 1.5}, booster: {lambda: 2.0}}",
    )  # fmt: skip
    tasks = trained(run)
    aligned = {name: task for name, task in tasks.items() if "weak" not in name}
    assert list(aligned) == [f"{arm}.{defence}.s3" for defence in ("sft", "vaccine", "booster") for arm in KEPT]
    harm = (str(run.root / "ingest" / "align-harmful" / "rows"),)
    assert {
        task.objective: (task.parameters, task.harmful, task.seed, task.tracking.to) for task in aligned.values()
    } == {
        "sft": ({}, (), 3, ["tensorboard"]),
        "vaccine": ({"vaccine": {"rho": 1.5, "scope": "batch", "taps": "attention"}}, (), 3, ["tensorboard"]),
        "booster": ({"booster": {"lambda": 2.0, "alpha": 0.1}}, harm, 3, ["tensorboard"]),
    }  # fmt: skip
    attacked = {name: task for name, task in tasks.items() if "weak" in name}
    assert len(attacked) == 6
    assert {(task.objective, task.harmful, len(task.rows)) for task in attacked.values()} == {("sft", (), 1)}
    assert {task.rows for task in attacked.values()} == {(str(run.root / "attack" / "weak.s3.parquet"),)}
    for name, task in attacked.items():
        assert str(Path(tasks[name.removesuffix(".weak")].out) / "adapter") in task.model.adapters


def test_harm_that_was_not_ingested_is_asked_for_by_those_who_look_at_it_alone(run_of, trained):
    run = run_of("comparison.defences=[sft]")
    trained(run)
    looking = run_of("comparison.defences=[sft, booster]", "alignment.harmful.path=pairs.jsonl")
    with pytest.raises(ArtifactError, match=r"ingest/align-harmful is not there yet; run `pharmacist ingest` first"):
        trainings.run_align(looking)
    trainings.run_align(run_of("comparison.defences=[sft]", "alignment.harmful.path=pairs.jsonl"))


FULL = ("alignment.train.weights=full", "alignment.train.zero_stage=1", "model.dtype=bfloat16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["comparison.defences=[sft, vacine]"],
            f"unknown objective 'vacine' (did you mean 'vaccine'?); known: {', '.join(sorted(OBJECTIVES))}; "
            "one of another package is known once that is installed here and on every node (`pharmacist plugins` lists all); "
            "name one of your own as module:attribute",
        ),
        (
            ["comparison.defences=[vaccine]", "alignment.parameters={vaccine: {roh: 1}}"],
            "alignment.parameters.vaccine.roh: Extra inputs are not permitted; vaccine has rho, scope, taps",
        ),
        (
            ["alignment.objective=booster", "alignment.parameters={booster: {lambda: 0}}"],
            "alignment.parameters.booster.lambda: Input should be greater than 0; booster has lambda, alpha",
        ),
        (
            ["alignment.objective=booster+vaccine", "alignment.parameters={vaccine: {rho: much}}"],
            "alignment.parameters.vaccine.rho: Input should be a valid number, unable to parse string as a number; "
            "vaccine has rho, scope, taps",
        ),
        (
            ["alignment.parameters={vacine: {rho: 1}}"],
            "unknown section of alignment.parameters 'vacine' (did you mean 'vaccine'?); "
            f"known: {', '.join(sorted({section for name in ALIGNING for section in OBJECTIVES[name].settings}))}",
        ),
        (
            ["comparison.defences=[sft, t_vaccine]", "alignment.parameters={t_vaccine: {layers: 3}}"],
            "t_vaccine.layers=3 but the model has 2 layers; lower it",
        ),
        (
            ["comparison.defences=[sft, booster]", *FULL],
            "all.booster.s3: booster perturbs the weights by less than bfloat16 can hold; set model.dtype=float32 or train an adapter",
        ),
        (
            ["tracking.to=[tensorbord]"],
            "unknown tracker 'tensorbord' (did you mean 'tensorboard'?); known: mlflow, tensorboard, wandb; one of another package is "
            "known once that is installed here and on every node (`pharmacist plugins` lists all); name one of your own as "
            "module:attribute",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_defence_are_found_before_any_work(run_of, overrides, message):
    run = run_of(*overrides)
    with pytest.raises(ConfigError) as caught:
        check(run)
    assert str(caught.value) == message
    assert not run.root.exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "comparison.defences=[sft, vaccine, t_vaccine, repnoise, booster, booster+vaccine]",
            "alignment.parameters={t_vaccine: {layers: 2}}",
        ],
        ["comparison.defences=[sft, vaccine]", "alignment.parameters={t_vaccine: {layers: 99}}"],
        ["comparison.defences=[sft, vaccine]", *FULL],
        ["comparison.defences=[booster]", "model.dtype=bfloat16"],
        ["tracking.to=[tensorboard]"],
    ],
)  # fmt: skip
def test_what_fits_is_let_through(run_of, overrides):
    check(run_of(*overrides))


def test_a_model_that_is_not_there_is_missed_by_those_who_look_into_it(run_of, tmp_path):
    run = run_of("comparison.defences=[vaccine]", f"model.path={tmp_path}/nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        check(run)


def test_the_trusted_rows_are_an_arm_alone_and_beside_a_selection(run_of, trained):
    run = run_of("comparison.selections=[pharmacist, trusted, trusted+pharmacist, all]", "alignment.train.epochs=1")
    tasks = trained(run)
    selection, validation = (
        str(artifact.folder / "rows") for artifact in (run.selected("pharmacist"), run.ingested("validation"))
    )
    assert tasks["trusted.sft.s3"].rows == (validation,)
    assert tasks["trusted+pharmacist.sft.s3"].rows == (validation, selection)
    # an epoch of each: 12 trusted rows, and 14 more, by 4
    assert [tasks[f"{arm}.sft.s3"].train.steps for arm in ("trusted", "trusted+pharmacist", "pharmacist")] == [3, 7, 4]
    assert run.selections == ["pharmacist", "all"], "the trusted rows are ingested, not selected"


def test_the_base_itself_is_attacked_and_trained_by_nothing_before(run_of, trained):
    run = run_of("comparison.selections=[none, all]", "comparison.defences=[sft, vaccine]", "attacks.0.adapter=same")
    tasks = trained(run)
    assert [name for name in tasks if name.startswith("none")] == ["none.sft.s3.weak"], "the same base under every defence"
    attack = tasks["none.sft.s3.weak"]
    assert (attack.model, attack.start_adapter) == (run.model, None)
    base = run.variants[0]
    assert run.model_of(base) == run.model
    assert run.trained(base).manifest()["summary"] == {"seconds": 0.0, "steps": 0}
    assert run.kept("none") == 0


def test_an_arm_of_trusted_rows_and_something_unknown_is_refused(run_of):
    with pytest.raises(ConfigError, match=r"selection 'los_gap' is not among scoring\.scorers"):
        run_of("comparison.selections=[trusted+los_gap]")
    with pytest.raises(ConfigError, match=r"selection 'trusted' is not among scoring\.scorers"):
        run_of("selection.scorer=trusted")
    draws = run_of("comparison.selections=[trusted+random]").arms
    assert draws == ["trusted+random_0", "trusted+random_1", "trusted+random_2"]


def test_no_selector_is_fitted_where_no_scorer_needs_one(run_of, monkeypatch, capsys):
    monkeypatch.setattr(stages, "fit", lambda **_: pytest.fail("fitted"))
    run = run_of("scoring.scorers=[keyword, random]", "selection.scorer=keyword", "comparison.selections=[keyword]")
    stages.run_fit(run)
    assert "no selector is fitted: keyword, random need none" in capsys.readouterr().out
    inputs = run.scored.inputs
    assert "fit" not in inputs
    assert {"candidates", "validation", "harmful"} < inputs.keys()


def test_a_combination_of_scores_is_a_selection_by_its_name(run_of):
    combined = "selection.combinations={both: {pharmacist: 2, low_loss: 1}}"
    run = run_of("scoring.scorers=[pharmacist, low_loss]", combined, "comparison.selections=[both, pharmacist]")
    assert run.selections == ["pharmacist", "both"]
    assert stages._rule(run, "both").weights == {"pharmacist": 2, "low_loss": 1}
    alone = run_of("scoring.scorers=[pharmacist, low_loss]", "comparison.selections=[pharmacist]")
    assert run.selected("pharmacist").fingerprint == alone.selected("pharmacist").fingerprint
    with pytest.raises(ConfigError, match=r"selection\.combinations\.pharmacist must have a name of its own, and combine"):
        run_of("selection.combinations={pharmacist: {pharmacist: 1}}")
    with pytest.raises(ConfigError, match=r"among scoring\.scorers \(pharmacist\), got los_gap"):
        run_of("selection.combinations={both: {los_gap: 1}}")
