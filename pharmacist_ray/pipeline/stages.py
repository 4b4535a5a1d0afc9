"""The stages, each a function of a run: it makes the artifacts that are missing from those of earlier stages.

A stage called by itself needs its inputs to be ready and says so if they are not; in order, they do only what is missing or whose
inputs changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.curation.fit import fit
from pharmacist_ray.curation.ingest import IngestReport, RenderSpec, Source, ingest
from pharmacist_ray.curation.score import check_scorers, columns_of, score
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.data.mixing import poisoned
from pharmacist_ray.data.rows import count_rows, sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import ConfigError, DataError, unknown_name
from pharmacist_ray.evaluation.answers import PROMPTS_PER_UNIT
from pharmacist_ray.evaluation.evaluate import EvaluatedModel, evaluate
from pharmacist_ray.evaluation.judges import JUDGES
from pharmacist_ray.models.load import empty_model
from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.console import bar, console, escaped, say, watch_training
from pharmacist_ray.pipeline.run import Run, Variant
from pharmacist_ray.pipeline.sharing import lock_missing, lock_missing_artifacts
from pharmacist_ray.report.page import write_page
from pharmacist_ray.report.table import write_report
from pharmacist_ray.storage import storage_path
from pharmacist_ray.training.objectives import OBJECTIVES, settings_of
from pharmacist_ray.training.runs import train_all
from pharmacist_ray.training.task import TrainTask, check_task
from pharmacist_ray.training.tracking import check_trackers

ATTACK_SEED = 100_003
"""Added to a cell's seed in its attack: with the alignment's own seed the fresh adapter would start in the alignment's subspace."""


def check(run: Run) -> None:
    """Find every mistake that can be known before work begins.

    Raises:
        ConfigError: An unknown scorer, objective or judge; a selection rule that makes no sense; a judge without its model.
    """
    config = run.config
    check_scorers(config.scoring, config.selector)
    _rule(run, config.selection.scorer)
    check_trackers(config.tracking.to)
    for name in config.alignment.parameters:
        if name not in {section for objective in OBJECTIVES.values() for section in objective.settings}:
            raise unknown_name("section of alignment.parameters", name, [n for n, o in OBJECTIVES.items() if n in o.settings])
    shape = cache(lambda: empty_model(config.model.path, trust_remote_code=config.model.trust_remote_code))
    for defence in config.defences:
        settings = settings_of(defence, config.alignment.parameters)
        check_task(_align_task(run, replace(run.variants[0], defence=defence)))
        if fits := OBJECTIVES[defence].fits:
            fits(shape(), settings)
    if config.evaluation is not None and config.evaluation.judge not in JUDGES:
        raise unknown_name("judge", config.evaluation.judge, list(JUDGES))
    if config.evaluation is not None and config.evaluation.judge != "phrases" and not config.evaluation.judge_path:
        raise ConfigError(f"judge '{config.evaluation.judge}' needs evaluation.judge_path")


def run_ingest(run: Run, *, strict: bool = False) -> None:
    """Read, check, deduplicate and shard every source.

    Args:
        run: The run.
        strict: A broken row is an error.
    """
    model = run.config.model
    for name, (source, has_answer) in run.sources.items():
        artifact = run.ingested(name)
        with lock_missing_artifacts(run, artifact) as missing:
            if missing:
                made = ingest(
                    Source(source.path, source.layout, source.columns, source.category_column, source.split),
                    artifact.begin(),
                    shards=run.config.data.shards if name == "candidates" else 1,
                    render=RenderSpec(model.path, model.template, model.max_length),
                    strict=strict,
                    require_response=has_answer,
                )
                artifact.finish(asdict(made))
        report = IngestReport(**artifact.manifest()["summary"])
        if strict and report.quarantined:
            raise DataError(f"{name}: {report.quarantined} rows are quarantined in {artifact.folder / 'quarantine'} (--strict)")
        if name == "candidates" or report.quarantined or report.duplicates:
            quarantine = escaped(artifact.folder / "quarantine")
            reasons = ", ".join(f"{count} {escaped(reason)}" for reason, count in sorted(report.reasons.items()))
            say(
                f"  {name}: {report.rows_in} rows in = {report.rows_out} out + {report.duplicates} duplicates + "
                f"{report.quarantined} quarantined" + (f" ({reasons}; see {quarantine})" if reasons else "")
            )
        if not report.rows_out:
            raise DataError(f"{name}: no usable row in {', '.join(source.path)}; see {artifact.folder / 'quarantine'}")


def run_fit(run: Run) -> None:
    """Fit the selector."""
    artifact, config = run.fitted, run.config
    sets = {
        name: run.ingested(name).require() / "rows"
        for name in ("candidates", "validation", "harmful", "benign")
        if name in run.sources
    }
    with lock_missing_artifacts(run, artifact) as missing:
        if not missing:
            return
        folder = artifact.begin()
        selector = config.selector
        watched: list[tuple[str, TrainConfig]] = [("warmup", selector.warmup)]
        if selector.reference is not None and "benign" in sets:
            watched.append(("reference", selector.reference))
        with watch_training("fit", [folder / name for name, _ in watched], [train.steps for _, train in watched]):
            summary = fit(
                model=run.model,
                lora=config.model.lora,
                template=config.model.template,
                max_length=config.model.max_length,
                selector=selector,
                resources=config.resources,
                seed=config.seed,
                candidates=sets["candidates"],
                validation=sets["validation"],
                harmful=sets["harmful"],
                benign=sets.get("benign"),
                out=folder,
            )
        artifact.finish(summary)


def run_score(run: Run) -> None:
    """Score every candidate."""
    artifact, config = run.scored, run.config
    candidates, fitted = run.ingested("candidates").require(), run.fitted.require()
    with lock_missing_artifacts(run, artifact) as missing:
        if not missing:
            return
        folder = artifact.begin()
        with bar("score (shards)") as show:
            report = score(
                model=run.model,
                template=config.model.template,
                max_length=config.model.max_length,
                selector=config.selector,
                scoring=config.scoring,
                resources=config.resources,
                candidates=candidates / "rows",
                fit=fitted,
                out=folder / "rows",
                progress=show,
                say=lambda line: say(f"  {escaped(line)}"),
            )
        artifact.finish(asdict(report))
    say(f"  {report.rows - report.quarantined} rows scored by {', '.join(report.columns)} in {report.seconds:.1f} s")


def run_select(run: Run) -> None:
    """Write the curated subset, and the other arms of the comparison."""
    scored = run.scored.require() / "rows"
    candidates = run.ingested("candidates").require()
    for arm in dict.fromkeys([run.main_arm, *run.arms]):
        artifact = run.selected(arm)
        with lock_missing_artifacts(run, artifact) as missing:
            if not missing:
                continue
            jsonl = run.config.selection.jsonl and arm != "all"
            report = write_selection(
                candidates, scored, _rule(run, arm), artifact.folder, provenance=artifact.record(), jsonl=jsonl
            )
            artifact.finish(
                {"kept": report.kept, "candidates": report.candidates, "cut": report.cut, "categories": report.categories}
            )
    main = run.main_selection
    summary = main.manifest()["summary"]
    say(f"  kept {summary['kept']} of {summary['candidates']} rows: {escaped(main.folder)}")


def _rule(run: Run, arm: str) -> Rule:
    selection = run.config.selection
    if arm == "all":
        # Every row has a random score, so with ratio 1 by it nothing is left out.
        columns = columns_of(run.config.scoring)
        return Rule("random_0" if "random_0" in columns else columns[0], ratio=1.0)
    return Rule(arm, selection.ratio, selection.count, selection.threshold, quotas=selection.quotas)


def run_align(run: Run) -> None:
    """Align the base on every arm, once per seed."""
    config = run.config
    for arm in run.arms:
        run.selected(arm).require()
    if any(OBJECTIVES[defence].harmful != "none" for defence in config.defences):
        run.ingested(run.harmful).require()

    @cache
    def replay() -> tuple[str, ...]:
        if not config.alignment.replay:
            return ()
        rows = sample_rows(run.ingested("benign").require() / "rows", config.alignment.replay, config.seed)
        if len(rows) < config.alignment.replay:
            raise DataError(f"alignment.replay={config.alignment.replay} but data.benign has {len(rows)} usable rows")
        file = run.root / "align" / f"replay{_mark(run, rows)}.parquet"
        write_rows(rows, file)
        return (str(file),)

    def task(variant: Variant) -> TrainTask:
        described = _align_task(run, variant)
        share = config.alignment.replay_share if config.alignment.replay else 0.0
        train = _in_steps(config.alignment.train, count_rows(run.selected(variant.selection).folder / "rows"), share)
        return replace(described, train=train, replay=replay())

    _train(run, run.variants, "align", task)


def _align_task(run: Run, variant: Variant) -> TrainTask:
    """Describe an alignment, all but its replay rows and its steps."""
    config = run.config
    return TrainTask(
        name=variant.name,
        out="",
        model=run.model,
        rows=(str(run.selected(variant.selection).folder / "rows"),),
        replay_share=config.alignment.replay_share,
        train=config.alignment.train,
        seed=variant.seed,
        objective=variant.defence,
        parameters=run.alignment(variant.defence)["parameters"],
        harmful=(str(run.ingested(run.harmful).folder / "rows"),) if OBJECTIVES[variant.defence].harmful != "none" else (),
        lora=config.model.lora,
        template=config.model.template,
        max_length=config.model.max_length,
        tracking=config.tracking,
    )


def _in_steps(train: TrainConfig, rows: int, replay_share: float = 0.0) -> TrainConfig:
    """Return the settings with steps in the place of epochs."""
    if train.epochs is None:
        return train
    per_step = train.batch_size - round(replay_share * train.batch_size)
    return train.model_copy(update={"steps": max(1, math.ceil(train.epochs * rows / per_step)), "epochs": None})


def run_attack(run: Run) -> None:
    """Fine-tune every aligned model on a user's task with harmful rows mixed in."""
    config = run.config
    if not config.attacks:
        say("  no attack is configured; `pharmacist init` shows how one is")
        return
    for variant in run.variants:
        run.trained(variant).require()
    for attack in config.attacks:
        for name in ("task", "harmful"):
            run.ingested(f"attack-{attack.name}-{name}").require()

    @cache
    def rows_of(attack: str, seed: int) -> str:
        """Write the rows of an attack, the same ones for every arm: what differs between arms is the alignment alone."""
        settings = next(one for one in config.attacks if one.name == attack)
        rows = poisoned(
            run.ingested(f"attack-{attack}-task").folder / "rows",
            run.ingested(f"attack-{attack}-harmful").folder / "rows",
            rows=settings.rows,
            harmful_share=settings.harmful_share,
            seed=seed,
        )
        file = run.root / "attack" / f"{attack}.s{seed}{_mark(run, rows)}.parquet"
        write_rows(rows, file)
        return str(file)

    def task(variant: Variant) -> TrainTask:
        assert variant.attack is not None
        before = variant.aligned
        same = variant.attack.adapter == "same"
        return TrainTask(
            name=variant.name,
            out="",
            model=run.model if same else run.model_of(before),
            rows=(rows_of(variant.attack.name, variant.seed),),
            train=_in_steps(variant.attack.train, variant.attack.rows),
            seed=variant.seed + ATTACK_SEED,
            lora=config.model.lora,
            start_adapter=str(run.trained(before).folder / "run" / "adapter") if same else None,
            template=config.model.template,
            max_length=config.model.max_length,
            tracking=config.tracking,
        )

    _train(run, [attacked for variant in run.variants for attacked in run.attacks_on(variant)], "attack", task)


def _mark(run: Run, rows: list[Row]) -> str:
    """Return what tells a trial's file of drawn rows from another trial's; a plain run has one draw by a name."""
    return f"-{digest(sorted(row.id for row in rows))[:8]}" if run.base else ""


def _train(run: Run, variants: list[Variant], stage: str, task: Callable[[Variant], TrainTask]) -> None:
    with lock_missing(
        run, variants, lambda variant: run.trained(variant).folder, lambda variant: run.trained(variant).ready
    ) as missing:
        if not missing:
            return
        tasks = []
        for variant in missing:
            folder = run.trained(variant).begin() / "run"
            described = task(variant)
            tasks.append(replace(described, out=str(folder)))
        what = f"{stage} {len(missing)} models (steps)"
        with watch_training(what, [storage_path(t.out) for t in tasks], [t.train.steps for t in tasks]):
            results = train_all(tasks, name=stage, storage=run.root / stage / ".ray", resources=run.config.resources)
        for variant, result in zip(missing, results, strict=True):
            run.trained(variant).finish(result)


def run_evaluate(run: Run) -> None:
    """Let every model answer, judge the answers, and write ``evaluation/summary.json``."""
    config, artifact = run.config, run.evaluated
    prompts = {name: run.ingested(f"eval-{name}").require() / "rows" for name in ("harmful", "benign", "task")}
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
                    kept=count_rows(run.selected(one.selection).folder / "rows"),
                    align_seconds=float(run.trained(variant).manifest()["summary"]["seconds"]),
                )
            )
    settings = config.evaluation
    assert settings is not None  # or there would be no artifact
    units = sum(math.ceil(count_rows(rows) / PROMPTS_PER_UNIT) for rows in prompts.values())

    def answered(subject: EvaluatedModel) -> bool:
        return len(list(subject.answers.glob("*.parquet"))) >= units

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
                template=config.model.template,
                max_length=config.model.max_length,
                resources=config.resources,
                out=folder,
                progress=show,
            )
        artifact.finish(summary)


def run_report(run: Run) -> None:
    """Print the comparison and write it to ``report/``, with a page of whatever part of the run there is."""
    if run.config.evaluation is None or not run.evaluated.manifest():
        if not (run.root / "search" / "trials.parquet").exists():
            say("  nothing is compared yet: the page has no comparison; `pharmacist evaluate` makes it")
    else:
        write_report(run.evaluated.require(), run.root / "report", console)
    say(f"  report: {escaped(write_page(run.root, run.root / 'report'))}")


STAGES: dict[str, Callable[[Run], None]] = {
    "ingest": run_ingest,
    "fit": run_fit,
    "score": run_score,
    "select": run_select,
    "align": run_align,
    "attack": run_attack,
    "evaluate": run_evaluate,
    "report": run_report,
}
"""In the order in which they run."""


def made_by(run: Run, name: str) -> list[Artifact]:
    """Return what a stage makes; of the report, which is written anew every time, nothing."""
    artifacts: dict[str, Callable[[], list[Artifact]]] = {
        "ingest": lambda: [run.ingested(source) for source in run.sources],
        "fit": lambda: [run.fitted],
        "score": lambda: [run.scored],
        "select": lambda: [run.selected(arm) for arm in dict.fromkeys([run.main_arm, *run.arms])],
        "align": lambda: [run.trained(variant) for variant in run.variants],
        "attack": lambda: [run.trained(attacked) for variant in run.variants for attacked in run.attacks_on(variant)],
        "evaluate": lambda: [run.evaluated],
    }
    return artifacts[name]() if name in artifacts else []


def reused(run: Run, name: str) -> str:
    """Return how much of what a stage makes was made before, in words that follow its name; nothing if none of it."""
    wanted = made_by(run, name)
    ready = sum(artifact.ready for artifact in wanted)
    return "" if not ready else f": {ready} of {len(wanted)} there already" if ready < len(wanted) else ": there already"
