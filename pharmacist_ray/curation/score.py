"""Score every candidate, a shard at a time, on stateless Ray Data actors.

The unit of work is a shard of the ingested candidates, and a shard's output is one Parquet file of the same name, published by a
rename. So a lost actor costs one shard, a rerun does what is missing and appends nothing, and the result does not depend on how many
actors there were or in which order they worked. The driver sees a few numbers per shard.

A row that cannot be scored, because it makes the scorer raise or ends its process, has null in every column (so that no selection
takes it) and stands in ``quarantine/`` beside the folder of the scores; `curation.poison` finds it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pharmacist_ray.config.schema import ResourcesConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.curation.calibrate import calibration_columns
from pharmacist_ray.curation.poison import Isolation, attempt_file
from pharmacist_ray.curation.scorers import SCORERS, columns_of, needs_model, parts_of, parts_of_score, scored_by
from pharmacist_ray.curation.scorers.guard import check_guard
from pharmacist_ray.curation.scorers.signals import Probe, ProbeSpec, Signals
from pharmacist_ray.curation.scorers.trusted import TrustedSets
from pharmacist_ray.curation.selector import AT_CHECKPOINTS, DIRECTIONS, checkpoint_name
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.data.schema import ROW_SCHEMA, Row, rows_from_table, uniform
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.plugins import blaming
from pharmacist_ray.runtime.actors import on_actors
from pharmacist_ray.runtime.cores import use_cores
from pharmacist_ray.runtime.imports import importing
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.usage import Usage, put_together
from pharmacist_ray.storage import StoragePath, parquet_metadata, read_table, row_count, storage_path, write_parquet

RETRIES = 100
"""Times that Ray starts a shard anew after its worker's death; far above what finding its bad rows takes, whose own bounds name
the rows (ours)."""


@dataclass(frozen=True)
class ScoreReport:
    """What scoring did."""

    rows: int
    """Candidates: those with scores and the quarantined ones."""
    shards: int
    columns: list[str]
    seconds: float
    """Wall time of this call; shards found finished take none of it."""
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined rows by reason: ``scorer_error``, ``crashed_scorer`` or ``out_of_memory``."""
    usage: dict[str, float] = field(default_factory=dict)
    """``tokens_per_s`` of an actor, ``padding``, its share of what went through the model, and ``peak_bytes`` of the largest; empty where
    nothing was left to score."""


def score(
    *,
    model: ModelRef,
    selector: SelectorConfig,
    scoring: ScoringConfig,
    resources: ResourcesConfig,
    candidates: StoragePath,
    trusted: TrustedSets,
    fit: StoragePath | None,
    out: StoragePath,
    planted: StoragePath | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ScoreReport:
    """Write ``out/part-*.parquet`` with ``id`` and one float64 column per score, and ``quarantine/part-*.parquet`` beside ``out``.

    Args:
        model: The model to harden.
        selector: The selector's section.
        scoring: The scoring section.
        resources: Actors and what each may use.
        candidates: Folder of the candidates' shards.
        trusted: The trusted rows, for scorers that read them as text.
        fit: The selector's folder; None where no scorer needs one.
        out: Folder to fill.
        planted: Folder of planted rows; scored as the candidates are, into `planted_scores`.
        progress: Called with (shards done, shards in all).
        say: Called with a line of text about workers that died and rows that cannot be scored.

    Raises:
        ConfigError: An unknown scorer, or one that the settings cannot give.
        ArtifactError: The selector is incomplete, or the output does not hold each candidate once.
        ModelError: So many rows make the scorer raise that it is not their fault.
        ResourceError: The same with rows that end its process, or workers die of something else.
        DataError: No row can be scored.
    """
    check_scorers(scoring, selector)
    started = time.perf_counter()
    shards = parquet_files(candidates)
    beside = parquet_files(planted) if planted else []
    units = _missing(shards, out) + (_missing(beside, planted_scores(out), planted=True) if beside else [])
    total = len(shards) + len(beside)
    done, taken = total - len(units), list[dict[str, Any]]()
    if progress:
        progress(done, total)
    if units:
        for name in scoring.scorers:
            if name != "random" and (prepare := SCORERS[name].prepare):
                with blaming(SCORERS.plugin(name)):
                    trusted.fitted(prepare)
        arguments = {
            "spec": probe_spec(model, selector, scoring, resources, fit),
            "scoring": scoring,
            "selector": selector,
            "out": str(out),
            "threads": max(1, int(resources.cpus_per_worker)),
            "trusted": trusted,
        }
        how: dict[str, Any] = {"attempts": RETRIES, "resources": resources, "what": "scoring"}
        work: Callable[..., Iterator[dict[str, Any]]] = on_actors
        if resources.workers_per_actor > 1:
            from pharmacist_ray.runtime.groups import on_groups  # with Ray Train, which an actor would import for nothing

            work = partial(on_groups, storage=out.with_name("ray"))
        for scored in work(ShardScorer, arguments, units, **how):
            done += 1
            taken.append(scored)
            if say and scored["attempt"] > 1:
                say(f"score: a worker died over {scored['shard']}; it was scored again (attempt {scored['attempt']})")
            if say and scored["quarantined"]:
                say(f"score: {scored['quarantined']} of the {scored['rows']} rows of {scored['shard']} cannot be scored")
            if progress:
                progress(done, total)
    if beside:
        _check_complete(beside, planted_scores(out))
    rows, reasons = _check_complete(shards, out)
    quarantined = reasons.total()
    if quarantined and say:
        broken = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        say(f"score: {rows} rows in = {rows - quarantined} scored + {quarantined} quarantined ({broken}; see {_quarantine(out)})")
    if quarantined and quarantined == rows:
        raise DataError(f"none of the {rows} candidates can be scored; {_quarantine(out)} has the reason of each")
    columns, seconds = columns_of(scoring, selector), time.perf_counter() - started
    return ScoreReport(rows, len(shards), columns, seconds, quarantined, dict(reasons), put_together(taken))


def planted_scores(out: StoragePath) -> StoragePath:
    """Return the folder of the planted rows' scores, beside that of the candidates'."""
    return out.with_name("planted") / "rows"


def _missing(shards: Sequence[StoragePath], out: StoragePath, planted: bool = False) -> list[dict[str, Any]]:
    """Make the folder of scores, and return what is still to be scored into it as work for a `ShardScorer`."""
    out.mkdir(parents=True, exist_ok=True)
    there = {file.name for file in out.glob("*.parquet")}
    return [{"shard": str(shard), "planted": planted} for shard in shards if shard.name not in there]


def check_scorers(scoring: ScoringConfig, selector: SelectorConfig) -> None:
    """Find what cannot work before anything runs.

    Raises:
        ConfigError: An unknown scorer; an oracle without labels; gradient norms asked of a method that has none.
    """
    for name in scoring.scorers:
        SCORERS.plugin(name)
    if "oracle" in scoring.scorers and scoring.planted is None:
        raise ConfigError(
            "the oracle scorer needs scoring.planted, for example {column: quality, good: [clean]}; it is for benchmarks"
        )
    if scoring.guard is not None:
        check_guard(scoring.guard)
    if scoring.refusal_teacher is not None:
        files = [Path(scoring.refusal_teacher) / name for name in ("config.json", "adapter_config.json")]
        if not any(file.exists() for file in files):
            raise ConfigError(
                f"scoring.refusal_teacher '{scoring.refusal_teacher}' is no folder of a model or of an adapter: it has neither "
                "config.json nor adapter_config.json"
            )
    if scoring.method != "hooks" and ("grad_norm" in scoring.scorers or selector.cosine):
        raise ConfigError(
            f"gradient norms (the grad_norm scorer, selector.cosine) need scoring.method=hooks, not '{scoring.method}'"
        )


def probe_spec(
    model: ModelRef, selector: SelectorConfig, scoring: ScoringConfig, resources: ResourcesConfig, fit: StoragePath | None
) -> ProbeSpec:
    """Return what an actor loads.

    Args:
        model: The model to harden.
        selector: The selector's section.
        scoring: The scoring section.
        resources: Whether there are GPUs.
        fit: The selector's folder; None where no scorer needs one.
    """
    parts = parts_of(scoring.scorers, selector)
    return ProbeSpec(
        model=model,
        fit=str(fit) if fit else "",
        checkpoints=tuple(checkpoint_name(step) for step in selector.checkpoints if {*AT_CHECKPOINTS} & {*parts}),
        directions=DIRECTIONS if "directions" in parts else (),
        groups=selector.coverage.groups if "groups" in parts else 0,
        method=scoring.method,
        tokens_per_batch=scoring.tokens_per_batch,
        cosine=selector.cosine,
        device="cuda" if resources.gpus_per_worker else "cpu",
        checkpointing=scoring.checkpointing,
        last_layers=scoring.last_layers,
        teacher=_teacher(model, scoring.refusal_teacher),
    )


def _teacher(model: ModelRef, folder: str | None) -> ModelRef | None:
    """Return the model whose states tell harmful prompts: what lies in a folder, or the one to harden with what lies there."""
    if folder is None:
        return None
    if (Path(folder) / "adapter_config.json").exists():
        return model.plus(folder)
    return replace(model, path=folder, adapters=())


class ShardScorer:
    """Loads the model once and scores the shards it is given; keeps nothing between them."""

    def __init__(
        self,
        spec: ProbeSpec,
        scoring: ScoringConfig,
        selector: SelectorConfig,
        out: str,
        threads: int,
        trusted: TrustedSets,
        group: Ranks | None = None,
    ) -> None:
        """Load the model and the selector.

        Args:
            spec: What to load.
            scoring: The scoring section.
            selector: The selector's; in mode ``iterative`` the `pharmacist` column is the learnt logit instead of the influence.
            out: Folder of the score files.
            threads: CPU threads of this actor.
            trusted: The trusted rows, for scorers that read them as text.
            group: This worker's place in the group that holds the model together and scores the same shards; None: it is alone.
        """
        use_cores(threads)
        self.group = group
        self.scoring = scoring
        self.selector = selector
        self.out = storage_path(out)
        self.spec = spec
        self.trusted = trusted

        self.needs_model = needs_model(scoring.scorers)
        self.loaded = False
        self.usage = Usage()

    @cached_property
    def probe(self) -> Probe:
        """The loaded model; not loaded if no scorer needs one."""
        with importing():
            import pharmacist_ray.models.load  # noqa: F401 - with PEFT, which only actors need
        return Probe(self.spec, self.group)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Score a shard, one of planted rows by the scores that are calibrated alone, and return what became of it."""
        self.usage.taken()
        shard = storage_path(str(unit["shard"]))
        rows = rows_from_table(read_table(shard, schema=ROW_SCHEMA))
        planted = unit.get("planted", False)
        folder = planted_scores(self.out) if planted else self.out
        out = folder / shard.name
        columns_by = partial(self._columns, calibration_columns(self.scoring.scorers) if planted else self.scoring.scorers)
        writes = self.group is None or self.group.first
        if not self.needs_model or not rows:
            columns = columns_by(rows)
            if writes:
                write_parquet(pa.table(_in_full(range(len(rows)), rows, columns)), out)
            return {"shard": shard.name, "rows": len(rows), "quarantined": 0, "attempt": 1} | self.usage.taken()
        isolation = Isolation(shard.name, rows, attempt_file(out), self.group)
        if not self.loaded:
            isolation.load(lambda: self.probe)
            self.loaded = True
            self.usage.taken()  # the pace is that of scoring
        self.probe.budget.tokens = min(self.probe.budget.tokens, self.spec.tokens_per_batch / 2**isolation.now.halvings)
        places, columns = isolation.run(columns_by)
        if writes:
            isolation.quarantine(_quarantine(folder) / shard.name)
            write_parquet(pa.table(_in_full(places, rows, columns)), out)
            isolation.done()
        quarantined = len(isolation.now.found)
        done = {"shard": shard.name, "rows": len(rows), "quarantined": quarantined, "attempt": isolation.now.number}
        return done | self.usage.taken()

    def _columns(self, scorers: Sequence[str], rows: Sequence[Row]) -> dict[str, Sequence[float]]:
        probe = self.probe if self.needs_model and rows else None
        signals = Signals(rows, probe=probe, trusted=self.trusted, planted=self.scoring.planted, guard=self.scoring.guard)
        before = (probe.budget.passed, probe.budget.padding) if probe else (0, 0)
        columns: dict[str, Sequence[float]] = {}
        for name in scorers:
            if name == "random":
                for draw in range(self.scoring.random_draws):
                    seed = self.scoring.seed + draw
                    columns[f"random_{draw}"] = [uniform(row.id, seed) for row in rows]
                continue
            parts = parts_of_score(name, self.scoring, self.selector)
            if not rows:
                columns |= dict.fromkeys(parts or [name], ())
                continue
            values = SCORERS[scored_by(name, self.selector.mode)].score(signals)
            columns |= (
                {part: column.tolist() for part, column in zip(parts, values.T, strict=True)}
                if parts
                else {name: values.tolist()}
            )
        if probe:
            self.usage.tokens += signals.tokens
            self.usage.passed += probe.budget.passed - before[0]
            self.usage.padding += probe.budget.padding - before[1]
        return columns


def _in_full(places: Sequence[int], rows: Sequence[Row], columns: dict[str, Sequence[float]]) -> dict[str, pa.Array]:
    """Return a shard's score table: null in every column, the random ones too, for rows that are not at ``places``."""
    table = {"id": pa.array([row.id for row in rows], pa.string())}
    for name, values in columns.items():
        known = dict(zip(places, values, strict=True))
        table[name] = pa.array([known.get(place) for place in range(len(rows))], pa.float64())
    return table


def _quarantine(out: StoragePath) -> StoragePath:
    """Return the folder of the rows that cannot be scored, beside that of the scores."""
    return out.with_name("quarantine")


def _check_complete(shards: Sequence[StoragePath], out: StoragePath) -> tuple[int, Counter[str]]:
    """Hold that every candidate has exactly one score row, and is in quarantine if and only if that row is empty.

    Shard by shard, with nothing beside it. Returns how many candidates there are, and how many are quarantined by reason.
    """
    extra = {file.name for file in out.glob("*.parquet")} - {shard.name for shard in shards}
    if extra:
        raise ArtifactError(f"{out} holds scores of other candidates ({', '.join(sorted(extra)[:3])}); remove the folder")
    aside = {file.name: file for file in _quarantine(out).glob("*.parquet")}

    def check(shard: StoragePath) -> tuple[int, list[str]]:
        rows, scored = (row_count(file) for file in (shard, out / shard.name))
        if rows != scored:
            raise ArtifactError(f"{out / shard.name} has {scored} scores for {rows} candidates; remove it and score again")
        found = read_table(aside[shard.name], columns=["reason"]).column(0).to_pylist() if shard.name in aside else []
        if any(nulls != len(found) for nulls in _nulls(parquet_metadata(out / shard.name))):
            raise ArtifactError(
                f"{out / shard.name} lacks other scores than those of the {len(found)} quarantined rows; remove it and score again"
            )
        return rows, found

    total, reasons = 0, Counter[str]()
    with ThreadPoolExecutor(16) as pool:  # an object store takes its time for each
        for rows, found in pool.map(check, shards):
            total += rows
            reasons.update(found)
    for file in out.glob(f"{attempt_file(out / '*.parquet').name}*"):
        file.unlink(missing_ok=True)  # of a worker that died just after it had finished
    return total, reasons


def _nulls(scores: pq.FileMetaData) -> list[int]:
    """Return how many rows of a score file are empty, column by column."""
    groups = [scores.row_group(index) for index in range(scores.num_row_groups)]
    columns = [index for index in range(scores.num_columns) if scores.schema.column(index).name != "id"]
    return [sum(group.column(column).statistics.null_count for group in groups if group.num_rows) for column in columns]
