"""The stage in which every model answers and is judged."""

from __future__ import annotations

import math
from pathlib import Path

from pharmacist_ray.config.finetune import UNREPAIRED
from pharmacist_ray.data.rows import count_rows
from pharmacist_ray.evaluation.answers import PROMPTS_PER_UNIT, sets_of
from pharmacist_ray.evaluation.engine import check_engine
from pharmacist_ray.evaluation.evaluate import EvaluatedModel, evaluate
from pharmacist_ray.pipeline.attacks import asked_in
from pharmacist_ray.pipeline.console import bar, escaped, say
from pharmacist_ray.pipeline.elsewhere import run_elsewhere
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.secrets import existing_secret
from pharmacist_ray.pipeline.sharing import lock_missing, lock_missing_artifacts
from pharmacist_ray.training.objectives import OBJECTIVES


def run_evaluate(run: Run) -> None:
    """Let every model answer, judge the answers, and write ``evaluation/summary.json``; then what other evaluators are asked for."""
    _evaluate(run)
    run_elsewhere(run)


def served_from(run: Run) -> Path | None:
    """Return the folder of the adapters that an endpoint is given, where one answers."""
    folder = run.root / "served"
    return folder if run.config.evaluation and run.config.evaluation.engine and isinstance(folder, Path) else None


def check_served(run: Run, *, ready: bool = False) -> None:
    """Find out whether an endpoint that is to answer can serve every model of the run.

    Args:
        run: The run.
        ready: It is about to be asked.

    Raises:
        ConfigError: It cannot.
    """
    evaluation = run.config.evaluation
    if evaluation is None or evaluation.engine is None:
        return
    whole = "has all its weights trained"
    models = [("alignment", whole if run.config.alignment.train.weights == "full" else "")]
    models += [(f"attack '{attack.name}'", whole if attack.train.weights == "full" else "") for attack in run.config.attacks]
    prompts = {
        one.stages.repair for one in run.variants if one.stages.repair != UNREPAIRED and OBJECTIVES[one.stages.repair].prompt
    }
    models += [(repair, "leaves a trained prompt") for repair in sorted(prompts)]
    check_engine(evaluation.engine, models, run.root, ready=ready)


def _evaluate(run: Run) -> None:
    config, artifact = run.config, run.evaluated
    prompts = {name: run.ingested(f"eval-{name}").require() / "rows" for name in ("harmful", "benign", "task")}
    forms = {attack.name: asked_in(run, attack) for attack in config.attacks}
    subjects = []
    for variant in run.variants:
        for one in (variant, *run.attacks_on(variant)):
            trained = run.trained(one)
            trained.require()
            subjects.append(
                EvaluatedModel(
                    name=trained.folder.name,
                    model=run.model_of(one),
                    answers=run.answers(one),
                    selection=one.selection,
                    defence=one.defence,
                    seed=one.seed,
                    attack=one.attack.name if one.attack else None,
                    kept=run.kept(one.selection),
                    align_seconds=float(run.trained(variant).manifest()["summary"]["seconds"]),
                    attack_loss=trained.manifest()["summary"].get("watched_loss"),
                    form=forms[one.attack.name] if one.attack else None,
                    secret=existing_secret(run, one),
                )
            )
    settings = config.evaluation
    assert settings is not None  # or there would be no artifact
    check_served(run, ready=True)
    units = {name: math.ceil(count_rows(rows) / PROMPTS_PER_UNIT) for name, rows in prompts.items()}

    def answered(subject: EvaluatedModel) -> bool:
        wanted = sum(units[kind] for _, kind, *_ in sets_of(prompts, subject.form, subject.secret))
        return len(list(subject.answers.glob("*.parquet"))) >= wanted

    with (
        lock_missing_artifacts(run, artifact) as missing,
        lock_missing(run, subjects if missing else [], lambda one: one.answers, answered),
    ):
        if not missing:
            return
        folder = artifact.begin()
        with bar("evaluate (models)") as show:
            summary = evaluate(
                subjects,
                prompts,
                settings=settings,
                resources=config.resources,
                out=folder,
                judgements=run.judgements,
                served=served_from(run),
                progress=show,
            )
        artifact.finish(summary)
    if warnings := summary["warnings"]:
        more = f" (and {len(warnings) - 1} more like that: see the report)" if len(warnings) > 1 else ""
        say(f"  [yellow]warning[/]: {escaped(warnings[0])}{more}")
