"""Score every candidate, a shard at a time, on stateless Ray Data actors.

The unit of work is a shard of the ingested candidates, and a shard's output is one Parquet file of the same name, published by a
rename. So a lost actor costs one shard, a rerun does what is missing and appends nothing, and the result does not depend on how many
actors there were or in which order they worked. The driver sees a few numbers per shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from pharmacist_ray.config.schema import ResourcesConfig, ScoringConfig, SelectorConfig
from pharmacist_ray.curation.fit import DIRECTIONS, checkpoint_name
from pharmacist_ray.curation.scorers import SCORER_NAMES, SCORERS
from pharmacist_ray.curation.scorers.signals import Probe, ProbeSpec, Signals
from pharmacist_ray.data.render import Template
from pharmacist_ray.data.rows import parquet_files
from pharmacist_ray.data.schema import ROW_SCHEMA, rows_from_table, uniform
from pharmacist_ray.errors import ArtifactError, ConfigError, one_of
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.storage import Place, place, read_table, row_count, write_parquet
from pharmacist_ray.training.remote import check_room, per_worker, plain_errors


@dataclass(frozen=True)
class ScoreReport:
    """What scoring did."""

    rows: int
    shards: int
    columns: list[str]
    seconds: float
    """Wall time of this call; shards found finished take none of it."""


def score(
    *,
    model: ModelRef,
    template: Template,
    max_length: int,
    selector: SelectorConfig,
    scoring: ScoringConfig,
    resources: ResourcesConfig,
    candidates: Place,
    fit: Place,
    out: Place,
    progress: Callable[[int, int], None] | None = None,
) -> ScoreReport:
    """Write ``out/part-*.parquet`` with ``id`` and one float64 column per score.

    Args:
        model: The model to harden.
        template: Prompt template.
        max_length: Longest sequence in tokens.
        selector: The selector's section.
        scoring: The scoring section.
        resources: Actors and what each may use.
        candidates: Folder of the candidates' shards.
        fit: The selector's folder.
        out: Folder to fill.
        progress: Called with (shards done, shards in all).

    Raises:
        ConfigError: An unknown scorer, or one that the settings cannot give.
        ArtifactError: The selector is incomplete, or the output does not hold each candidate once.
    """
    check_scorers(scoring, selector)
    started = time.perf_counter()
    shards = parquet_files(candidates)
    out.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if not (out / shard.name).exists()]
    if progress:
        progress(len(shards) - len(missing), len(shards))
    if missing:
        _score_shards(missing, len(shards), model, template, max_length, selector, scoring, resources, fit, out, progress)
    rows = _check_complete(shards, out)
    return ScoreReport(rows, len(shards), columns_of(scoring), time.perf_counter() - started)


def check_scorers(scoring: ScoringConfig, selector: SelectorConfig) -> None:
    """Find what cannot work before anything runs.

    Raises:
        ConfigError: An unknown scorer; gradient norms asked of a method that has none.
    """
    for name in scoring.scorers:
        if name not in SCORER_NAMES:
            raise one_of("scorer", name, SCORER_NAMES)
    if scoring.method != "hooks" and ("grad_norm" in scoring.scorers or selector.cosine):
        raise ConfigError(
            f"gradient norms (the grad_norm scorer, selector.cosine) need scoring.method=hooks, not '{scoring.method}'"
        )


def columns_of(scoring: ScoringConfig) -> list[str]:
    """Return the names of the score columns, in order."""
    draws = [f"random_{draw}" for draw in range(scoring.random_draws)]
    return [column for name in scoring.scorers for column in (draws if name == "random" else [name])]


def _score_shards(
    missing: Sequence[Place],
    total: int,
    model: ModelRef,
    template: Template,
    max_length: int,
    selector: SelectorConfig,
    scoring: ScoringConfig,
    resources: ResourcesConfig,
    fit: Place,
    out: Place,
    progress: Callable[[int, int], None] | None,
) -> None:
    spec = ProbeSpec(
        model=model,
        template=template,
        max_length=max_length,
        fit=str(fit),
        checkpoints=tuple(checkpoint_name(step) for step in selector.checkpoints),
        directions=DIRECTIONS,
        method=scoring.method,
        tokens_per_batch=scoring.tokens_per_batch,
        cosine=selector.cosine,
        device="cuda" if resources.gpus_per_worker else "cpu",
    )
    check_room(per_worker(resources), 1)
    done = total - len(missing)
    work = ray.data.from_items([{"shard": str(shard)} for shard in missing], override_num_blocks=len(missing)).map_batches(
        ShardScorer,
        fn_constructor_kwargs={
            "spec": spec,
            "scoring": scoring,
            "iterative": selector.mode == "iterative",
            "out": str(out),
            "threads": max(1, int(resources.cpus_per_worker)),
        },
        batch_size=1,
        batch_format="numpy",
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(resources.actors, len(missing))),
    )
    with plain_errors():
        for _ in work.iter_rows():
            done += 1
            if progress:
                progress(done, total)


class ShardScorer:
    """Loads the model once and scores the shards it is given; keeps nothing between them."""

    def __init__(self, spec: ProbeSpec, scoring: ScoringConfig, iterative: bool, out: str, threads: int) -> None:
        """Load the model and the selector.

        Args:
            spec: What to load.
            scoring: The scoring section.
            iterative: The `pharmacist` column is the learnt logit instead of the influence.
            out: Folder of the score files.
            threads: CPU threads of this actor.
        """
        torch.set_num_threads(threads)
        self.scoring = scoring
        self.iterative = iterative
        self.out = place(out)
        self.spec = spec

    @property
    def probe(self) -> Probe:
        """The loaded model; not loaded if only random scores are asked for."""
        return _probe(self.spec)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Score the shards of a batch and return how many rows each had."""
        counts = [self._score(place(str(shard))) for shard in batch["shard"]]
        return {"rows": np.array(counts)}

    def _score(self, shard: Place) -> int:
        rows = rows_from_table(read_table(shard, schema=ROW_SCHEMA))
        table = {"id": pa.array([row.id for row in rows], pa.string())}
        models = [name for name in self.scoring.scorers if name != "random"]
        signals = Signals(self.probe, rows) if models and rows else None
        for name in self.scoring.scorers:
            if name == "random":
                for draw in range(self.scoring.random_draws):
                    seed = self.scoring.seed + draw
                    table[f"random_{draw}"] = pa.array([uniform(row.id, seed) for row in rows], pa.float64())
            elif signals is None:
                table[name] = pa.array([], pa.float64())
            elif name == "pharmacist" and self.iterative:
                file = place(self.spec.fit) / "logits.parquet"
                logits = _logits(file)
                if strange := [row.id for row in rows if row.id not in logits]:
                    raise ArtifactError(f"{file} has no logit for row {strange[0]}: it was fitted on other candidates; fit again")
                table[name] = pa.array([logits[row.id] for row in rows], pa.float64())
            else:
                table[name] = pa.array(SCORERS[name](signals), pa.float64())
        write_parquet(pa.table(table), self.out / shard.name)
        return len(rows)


@cache
def _probe(spec: ProbeSpec) -> Probe:
    return Probe(spec)


@cache
def _logits(file: Place) -> dict[str, float]:
    if not file.exists():
        raise ArtifactError(f"the selector is incomplete: {file} is missing; fit it with selector.mode=iterative")
    table = read_table(file)
    return dict(zip(table.column("id").to_pylist(), table.column("logit").to_pylist(), strict=True))


def _check_complete(shards: Sequence[Place], out: Place) -> int:
    """Hold that every candidate has exactly one score row: the same count, shard by shard, with nothing beside it."""
    extra = {file.name for file in out.glob("*.parquet")} - {shard.name for shard in shards}
    if extra:
        raise ArtifactError(f"{out} holds scores of other candidates ({', '.join(sorted(extra)[:3])}); remove the folder")
    total = 0
    for shard in shards:
        rows, scored = (row_count(file) for file in (shard, out / shard.name))
        if rows != scored:
            raise ArtifactError(f"{out / shard.name} has {scored} scores for {rows} candidates; remove it and score again")
        total += rows
    return total
