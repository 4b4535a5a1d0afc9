"""What other evaluators make of a run's models: tasks of lm-evaluation-harness, and the answers as logs of inspect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pharmacist_ray.evaluation.harness import check_harness, measure_by_tasks
from pharmacist_ray.evaluation.inspect_logs import check_inspect, write_logs
from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.console import bar, escaped, say
from pharmacist_ray.pipeline.identity import file_identity
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing_artifacts
from pharmacist_ray.pipeline.variants import Variant
from pharmacist_ray.storage import StoragePath, json_of


def check_elsewhere(run: Run) -> None:
    """Check that what is asked for can be had; raises as `check_harness` and `check_inspect` do."""
    if run.config.evaluation is not None and not run.base:
        check_harness(run.config.evaluation.lm_eval)
        if run.config.evaluation.inspect:
            check_inspect()


def measured(run: Run) -> list[tuple[Variant, Artifact]]:
    """Return the models that are measured by tasks, each once, with the artifact of what came out; none in a search's trial."""
    settings = run.config.evaluation
    if settings is None or not settings.lm_eval.tasks or run.base:
        return []
    harness, model = settings.lm_eval, run.config.model
    config: dict[str, Any] = {"tasks": harness.tasks, "limit": harness.limit}
    if harness.include:
        config["include"] = file_identity(harness.include)
    prompting = digest([model.template, model.system, model.template_arguments])
    found: dict[StoragePath, tuple[Variant, Artifact]] = {}
    for variant in _models(run):
        trained = run.trained(variant)
        artifact = Artifact(
            run.root / "lm_eval" / variant.name, "evaluate", config, {"model": trained.fingerprint, "prompting": prompting}
        )
        artifact.folder = artifact.folder.with_name(f"{variant.name}-{artifact.fingerprint[:8]}")
        found.setdefault(trained.folder, (variant, artifact))
    return list(found.values())


def run_elsewhere(run: Run) -> None:
    """Measure by tasks what is missing, and write logs of what has been answered."""
    settings = run.config.evaluation
    if settings is None or run.base:
        return
    wanted = {artifact.folder: (variant, artifact) for variant, artifact in measured(run)}
    with lock_missing_artifacts(run, *(artifact for _, artifact in wanted.values())) as missing:
        if missing:
            models = {artifact.begin(): run.model_of(wanted[artifact.folder][0]) for artifact in missing}
            with bar("lm_eval (models)") as show:
                measure_by_tasks(models, settings=settings.lm_eval, resources=run.config.resources, progress=show)
            for artifact in missing:
                made = json_of(artifact.folder / "results.json")
                artifact.finish({"name": wanted[artifact.folder][0].name, **made})
    for variant, artifact in wanted.values():
        results = artifact.manifest()["summary"]["results"]
        figures = (f"{task} {name.partition(',')[0]} {value:.3g}" for task, name, value in _figures(results))
        say(f"  lm_eval: {escaped(variant.name)}: {escaped(', '.join(figures))}")
    if settings.inspect:
        _write_logs(run)


def _figures(results: dict[str, dict[str, float]]) -> Iterator[tuple[str, str, float]]:
    for task, metrics in results.items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                yield task, name, value


def _models(run: Run) -> Iterator[Variant]:
    for variant in run.variants:
        yield from (variant, *run.attacks_on(variant))


def _write_logs(run: Run) -> None:
    settings = run.config.require_evaluation()
    made_at = str(run.evaluated.manifest()["made_at"])
    for answers, variant in {run.answers(variant): variant for variant in _models(run)}.items():
        about = {"selection": variant.selection, "defence": variant.defence, "seed": variant.seed}
        about["attack"] = variant.attack.name if variant.attack else None
        judges = [judge.called for judge in settings.judges]
        out = run.root / "inspect" / answers.name
        write_logs(answers, out, model=variant.name, judges=judges, made_at=made_at, about=about)
    say(f"  inspect: `inspect view --log-dir {escaped(run.root / 'inspect')}` shows the answers and verdicts")
