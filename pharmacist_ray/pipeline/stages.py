"""The stages, each a function of a run: it makes the artifacts that are missing from those of earlier stages.

A stage called by itself needs its inputs to be ready and says so if they are not; in order, they do only what is missing or whose
inputs changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

from pharmacist_ray.config.data import NamedConfig
from pharmacist_ray.config.scoring import CALIBRATED, tells_rows_apart
from pharmacist_ray.curation.calibrate import PlantedScores, calibration_columns, kept_in_words
from pharmacist_ray.curation.cascade import FOLDER, score_by_cascade
from pharmacist_ray.curation.export import write_export
from pharmacist_ray.curation.fit import check_learnt, fit, trainings_of
from pharmacist_ray.curation.ingest import IngestReport, Source, ingest
from pharmacist_ray.curation.last_layers import in_words as last_layers_in_words
from pharmacist_ray.curation.missed import in_words
from pharmacist_ray.curation.overlap import find_overlaps, refuse_trained
from pharmacist_ray.curation.overlap import in_words as overlap_in_words
from pharmacist_ray.curation.planted import hold_out
from pharmacist_ray.curation.score import check_scorers, planted_scores, score
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.curation.trainers import EXPORTS
from pharmacist_ray.data.mixing import check_counts
from pharmacist_ray.data.rows import count_rows
from pharmacist_ray.errors import ConfigError, DataError, unknown_name
from pharmacist_ray.evaluation.judges import check_judges
from pharmacist_ray.models.precision import check_attention
from pharmacist_ray.models.quantized import check_quantization
from pharmacist_ray.pipeline.artifacts import Artifact
from pharmacist_ray.pipeline.attacks import after_alignment, check_attacks, run_attack
from pharmacist_ray.pipeline.console import bar, console, escaped, say, watch_training
from pharmacist_ray.pipeline.elsewhere import check_elsewhere, measured
from pharmacist_ray.pipeline.evaluations import check_served, run_evaluate
from pharmacist_ray.pipeline.proxied import check_proxy, for_every_row, passing_arms
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing_artifacts
from pharmacist_ray.pipeline.trainings import align_task, run_align
from pharmacist_ray.plugins import blaming
from pharmacist_ray.report.table import write_report
from pharmacist_ray.storage import StoragePath, remove_tree
from pharmacist_ray.training.objectives import OBJECTIVES, sections_of, settings_of
from pharmacist_ray.training.task import check_task
from pharmacist_ray.training.tracking import check_trackers


def check(run: Run) -> None:
    """Find every mistake that can be known before work begins.

    Raises:
        ConfigError: An unknown scorer, objective or judge; a selection rule that makes no sense; a judge without its model.
    """
    config = run.config
    if problem := next(config.too_coarse(), None):
        raise ConfigError(problem)
    check_attention(config.model.attn, config.resources.gpus_per_worker)
    check_quantization(config)
    check_scorers(config.scoring, config.selector)
    check_proxy(config, run.selections)
    if run.ingested("candidates").ready:
        candidates = run.ingested("candidates").folder / "rows"
        check_learnt(run.parts, config.selector, lambda: count_rows(candidates), config.resources.workers)
    _rule(run, run.main_arm)
    for name in config.selection.export:
        EXPORTS.plugin(name)
    if config.calibrated:
        calibration_columns(config.scoring.scorers)
    check_trackers(config.tracking.to)
    for where, parameters, sections in (
        ("alignment", config.alignment.parameters, sections_of(config.objectives)),
        ("finetune", config.finetune.parameters, sections_of(after_alignment(config.defences), OBJECTIVES)),
    ):
        for name in parameters:
            if name not in sections:
                raise unknown_name(f"section of {where}.parameters", name, list(sections))

    @cache
    def shape() -> Any:
        from pharmacist_ray.models.load import empty_model  # with transformers' models, which take seconds

        return empty_model(config.model.path, trust_remote_code=config.model.trust_remote_code)

    for defence in config.objectives:
        settings = settings_of(defence, config.alignment.parameters)
        if OBJECTIVES[defence].stage != "any":
            raise ConfigError(f"{defence} aligns nothing: it defends a fine-tune; write sft/{defence}, or set finetune.objective")
        check_task(align_task(run, replace(run.variants[0], defence=defence)))
        if fits := OBJECTIVES[defence].fits:
            with blaming(OBJECTIVES.plugin(defence)):
                fits(shape(), settings)
    check_attacks(run)
    if config.evaluation is not None:
        check_judges(config.evaluation.judges)
    check_served(run)
    check_elsewhere(run)


def run_ingest(run: Run, *, strict: bool = False, connect: Callable[[], object] | None = None) -> None:
    """Read, check, deduplicate and shard every source.

    Args:
        run: The run.
        strict: A broken row is an error.
        connect: Called before Ray is needed, where it is; by default it is connected.
    """
    usable: dict[str, int] = {}
    for name, (source, has_answer) in run.sources.items():
        artifact = run.ingested(name)
        with lock_missing_artifacts(run, artifact) as missing:
            if missing:
                named = source.name if isinstance(source, NamedConfig) else None
                with bar(f"ingest {name} (tasks)") as show:
                    made = ingest(
                        Source(source.path, source.layout, source.columns, source.category_column, source.split, named),
                        artifact.begin(),
                        shards=run.config.data.shards if name == "candidates" else 1,
                        model=run.model,
                        strict=strict,
                        require_response=has_answer,
                        progress=show,
                        connect=connect,
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
        usable[name] = report.rows_out
    for attack in run.config.attacks:
        there = {what: usable[f"attack-{attack.name}-{what}"] for what in (*attack.attackers, "task")}
        check_counts(attack.name, there, rows=attack.rows, harmful_share=attack.harmful_share, attacker=attack.attacker)
    _overlap(run)
    _hold_out(run)


def _overlap(run: Run) -> None:
    """Find out which sets share prompts, say so, and refuse an evaluation on prompts that are trained on."""
    if run.config.evaluation is None:
        return
    with lock_missing_artifacts(run, run.overlap) as missing:
        if missing:
            sets = {name: run.ingested(name).require() / "rows" for name in run.sources}
            run.overlap.finish(find_overlaps(sets, run.overlap.begin()))
    pairs = run.overlap.manifest()["summary"]["pairs"]
    if pairs:
        say(f"  prompts that several sets have: {'; '.join(map(overlap_in_words, pairs))}")
    if not run.config.evaluation.allow_trained_prompts:
        refuse_trained(pairs)


def _hold_out(run: Run) -> None:
    """Keep half of the trusted rows out of the fit and make planted rows of it, if a calibrated selection is asked for."""
    if run.planted is None:
        return
    with lock_missing_artifacts(run, run.planted) as missing:
        if missing:
            sets = {name: run.ingested(name).require() / "rows" for name in run.trusted_names}
            limit, seed = run.config.selector.trusted_rows, run.config.seed
            run.planted.finish(hold_out(sets, run.planted.begin(), limit=limit, seed=seed))
    planted = run.planted.manifest()["summary"]["planted"]
    say(f"  half of the trusted rows is held out; planted of it: {', '.join(f'{n} {kind}' for kind, n in planted.items())}")


def run_fit(run: Run) -> None:
    """Fit the selector, if a scorer needs one, and that of a cascade's proxy."""
    _fit(run)
    if run.proxied:
        say("  [dim]the same for the proxy[/]")
        _fit(run.proxied)


def _fit(run: Run) -> None:
    if not run.needs_selector:
        say(f"  no selector is fitted: {', '.join(run.config.scoring.scorers)} need none")
        return
    artifact, config = run.fitted, run.config
    sets: dict[str, StoragePath] = {"candidates": run.ingested("candidates").require() / "rows"}
    for name in run.trusted_names:
        (run.planted or run.ingested(name)).require()
        sets[name] = run.trusted_rows(name)
    with lock_missing_artifacts(run, artifact) as missing:
        if not missing:
            return
        folder = artifact.begin()
        selector = config.selector
        trainings = trainings_of(selector, run.parts)
        with watch_training("fit", [folder / name for name in trainings], [train.steps for train, _ in trainings.values()]):
            summary = fit(
                model=run.model,
                lora=config.model.lora,
                selector=selector,
                resources=config.resources,
                seed=config.seed,
                sets=sets,
                out=folder,
                parts=run.parts,
            )
        artifact.finish(summary)


def run_score(run: Run) -> None:
    """Score every candidate; of a cascade, all by its proxy first."""
    if run.proxied:
        say("  [dim]by the proxy[/]")
        run_score(run.proxied)
    artifact, config = run.scored, run.config
    candidates = run.ingested("candidates").require()
    fitted = run.fitted.require() if run.needs_selector else None
    if run.planted:
        run.planted.require()
    with lock_missing_artifacts(run, artifact) as missing:
        if not missing:
            return
        folder, facts = artifact.begin(), dict[str, Any]()
        by_model = partial(
            score,
            model=run.model,
            selector=config.selector,
            resources=config.resources,
            trusted=run.trusted,
            fit=fitted,
            say=lambda line: say(f"  {escaped(line)}"),
        )
        given: dict[str, Any] = {"scoring": config.scoring, "planted": run.planted_rows, "out": folder / "rows"}
        if run.proxied:
            report, facts["cascade"] = score_by_cascade(
                by_model,
                **given,
                selector=config.selector,
                candidates=candidates,
                proxy=run.proxied.scored.require() / "rows",
                rules={arm: _rule(run, arm) for arm in passing_arms(config, run.selections)},
                progress=bar,
            )
        else:
            with bar("score (shards)") as show:
                report = by_model(**given, candidates=candidates / "rows", progress=show)
        artifact.finish(asdict(report) | facts)
        remove_tree(folder / FOLDER)
    for line in in_words(facts["cascade"]) if facts else ():
        say(f"  {escaped(line)}")
    if config.scoring.last_layers is not None and (found := run.fitted.manifest()["summary"].get("last_layers")):
        say(f"  {last_layers_in_words(config.scoring.last_layers, found)}")
    say(f"  {report.rows - report.quarantined} rows scored by {', '.join(report.columns)} in {report.seconds:.1f} s")


def run_select(run: Run) -> None:
    """Write the curated subset, and the other arms of the comparison."""
    scored = run.scored.require() / "rows"
    candidates = run.ingested("candidates").require()
    for arm in run.selections:
        artifact = run.selected(arm)
        with lock_missing_artifacts(run, artifact) as missing:
            if not missing:
                continue
            jsonl = run.config.selection.jsonl and arm != "all"
            report = write_selection(
                candidates,
                scored,
                _rule(run, arm),
                artifact.folder,
                provenance=artifact.record(),
                jsonl=jsonl,
                planted=calibrated_on(run) if arm == CALIBRATED else None,
            )
            made = asdict(report)
            artifact.finish({name: made[name] for name in ("kept", "candidates", "cut", "categories", "left_out")})
    main = run.main_selection
    summary = main.manifest()["summary"]
    left_out = f", {summary['left_out']} near-duplicates left out" if summary.get("left_out") else ""
    say(f"  kept {summary['kept']} of {summary['candidates']} rows{left_out}: {escaped(main.folder)}")
    if CALIBRATED in run.selections:
        for line in kept_in_words(run.selected(CALIBRATED).manifest()["calibration"]):
            say(f"  calibrated: {escaped(line)}")
    for name in () if run.base else run.config.selection.export:  # a trial's selection is nobody's to train on elsewhere
        _export(run, name)


def _export(run: Run, name: str) -> None:
    artifact, model = run.exported(name), run.config.model
    with lock_missing_artifacts(run, artifact) as missing:
        if missing:
            weighed = tells_rows_apart(run.main_arm)
            source, plain = run.main_selection.require(), model.template == "plain"
            artifact.finish(write_export(source, name, artifact.begin(), weighed=weighed, system=model.system, plain=plain))
    made = artifact.manifest()["summary"]
    left_out = f", {made['left_out']} left out, whose turns it has no place for" if made["left_out"] else ""
    say(f"  for {escaped(name)}: {made['rows']} rows{left_out}: {escaped(artifact.folder)}")


def _rule(run: Run, arm: str) -> Rule:
    selection = run.config.selection
    if arm == "all":
        # Every row has a random score, so with ratio 1 by it nothing is left out.
        return Rule(for_every_row(run.config), ratio=1.0)
    return Rule(
        arm,
        selection.ratio,
        selection.count,
        selection.threshold,
        quotas=selection.quotas,
        weights=selection.sums.get(arm, {}),
        turns=run.turns(arm),
        near_duplicates=selection.near_duplicates,
    )


def calibrated_on(run: Run) -> PlantedScores | None:
    """Return the scores of the planted rows, which a calibrated selection weighs scores by; None where there is none."""
    if run.planted is None:
        return None
    scores = planted_scores(run.scored.folder / "rows")
    return PlantedScores(run.planted.require() / "rows", scores, calibration_columns(run.config.scoring.scorers))


def run_report(run: Run) -> None:
    """Print the comparison and write it to ``report/``, with a page of whatever part of the run there is."""
    from pharmacist_ray.report.page import write_page  # with Matplotlib

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
        "ingest": lambda: [
            *(run.ingested(source) for source in run.sources),
            *([run.overlap] if run.config.evaluation else []),
            *([run.planted] if run.planted else []),
        ],
        "fit": lambda: [one.fitted for one in (run, run.proxied) if one and one.needs_selector],
        "score": lambda: [one.scored for one in (run.proxied, run) if one],
        "select": lambda: [
            *(run.selected(arm) for arm in run.selections),
            *(run.exported(name) for name in (() if run.base else run.config.selection.export)),
        ],
        "align": lambda: [run.trained(variant) for variant in run.variants],
        "attack": lambda: [run.trained(one) for variant in run.variants for one in run.attacks_on(variant)],
        "evaluate": lambda: [run.evaluated, *(artifact for _, artifact in measured(run))],
    }
    return artifacts[name]() if name in artifacts else []


def reused(run: Run, name: str) -> str:
    """Return how much of what a stage makes was made before, in words that follow its name; nothing if none of it."""
    wanted = made_by(run, name)
    ready = sum(artifact.ready for artifact in wanted)
    return "" if not ready else f": {ready} of {len(wanted)} there already" if ready < len(wanted) else ": there already"
