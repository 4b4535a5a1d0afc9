"""Fit the selector: warm-up, checkpoints, directions, learnt logits and reference models, on Ray Train workers.

Output folder: ``warmup/step-000020/`` (adapters θ_k), ``directions/step-000020.safetensors`` (v by parameter name, one row per
direction), ``reference/adapter``, ``tov/adapter``, ``logits.parquet``, and ``selector.json`` last. Only the parts that scorers ask
for are made (`PARTS`), and whatever is there already is not computed again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, SelectorConfig, TrainConfig
from pharmacist_ray.curation.selector import (
    DIRECTIONS,
    PARTS,
    IterativeSelector,
    Point,
    attacked_direction,
    batch_rows,
    checkpoint_name,
    part_files,
)
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.data.rows import count_rows, iterate_rows, read_rows, row_at, sample_rows, write_rows
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import StoragePath, disk_full_errors, local_copy, replacing, storage_path, write_parquet, write_text
from pharmacist_ray.training.loop import run_task
from pharmacist_ray.training.task import TrainTask, progress_file

MAX_ITERATIVE = 5_000_000
"""More candidates than this do not fit the iterative mode, which holds a logit for each on every worker."""

SAVE_EVERY = 20
"""Iterations between two saved states."""


@dataclass(frozen=True)
class FitJob:
    """What the workers need to know."""

    model: ModelRef
    lora: LoraConfig
    selector: SelectorConfig
    seed: int
    out: str
    candidates: str
    validation: str
    harmful: str
    parts: tuple[str, ...]


def fit(
    *,
    model: ModelRef,
    lora: LoraConfig,
    selector: SelectorConfig,
    resources: ResourcesConfig,
    seed: int,
    sets: Mapping[str, StoragePath],
    out: StoragePath,
    parts: Collection[str],
) -> dict[str, Any]:
    """Fit the selector and return the contents of ``selector.json``.

    Args:
        model: The model to harden.
        lora: The adapter in whose space influences are taken.
        selector: The selector's section.
        resources: Workers.
        seed: Seeds the adapter's initialisation and the order of rows.
        sets: Folders of canonical rows: the ``candidates``, ``validation`` (trusted safety rows), ``harmful`` (for the simulated
            attack), and perhaps ``benign`` (trusted, for the loss gap's reference).
        out: Folder to fill.
        parts: Which of `PARTS` to make; what is there from an earlier call with the same settings stays.

    Raises:
        ConfigError: Logits without an inner learning rate, over too many candidates, or in less than an epoch.
        DataError: A set is empty.
    """
    if "logits" in parts:
        check_iterative(selector, count_rows(sets["candidates"]), resources.workers)
    out.mkdir(parents=True, exist_ok=True)
    trainings = trainings_of(selector, parts)
    used = {name for name, (_, names) in trainings.items() for name in names} | {"validation"}
    used |= {"harmful"} if "warmup" in trainings else set()
    counts: dict[str, int] = {}
    for name in sorted(used):
        warmup = name == "warmup"
        limit = selector.warmup.steps * selector.warmup.batch_size if warmup else selector.trusted_rows
        rows = sample_rows(sets["candidates" if warmup else name], limit, seed)
        if not rows and not warmup:
            raise DataError(f"data.{name} has no rows left after ingestion; the selector cannot do without")
        write_rows(rows, out / "rows" / f"{name}.parquet")
        counts[name] = len(rows)
    common = {"model": model, "lora": lora, "seed": seed}
    tasks = [
        TrainTask(
            name="warm-up" if name == "warmup" else name,
            out=str(out / name),
            rows=tuple(str(out / "rows" / f"{rows}.parquet") for rows in names),
            train=train,
            checkpoints=tuple(selector.checkpoints) if name == "warmup" else (),
            **common,  # type: ignore[arg-type]
        )
        for name, (train, names) in trainings.items()
    ]
    job = FitJob(
        out=str(out),
        candidates=str(sets["candidates"]),
        validation=str(out / "rows" / "validation.parquet"),
        harmful=str(out / "rows" / "harmful.parquet"),
        parts=tuple(sorted(parts)),
        selector=selector,
        **common,  # type: ignore[arg-type]
    )
    run_on_workers(_work, (tasks, job), name="fit", storage=out / "ray", resources=resources)
    summary = {
        "mode": selector.mode,
        "checkpoints": selector.checkpoints,
        "directions": list(DIRECTIONS),
        "intensity": selector.intensity,
        "warmup_rows": counts.get("warmup", 0),
        "parts": [part for part in PARTS if all((out / file).exists() for file in part_files(selector, part))],
    }
    write_text(json.dumps(summary, indent=1), out / "selector.json")
    return summary


def trainings_of(selector: SelectorConfig, parts: Collection[str]) -> dict[str, tuple[TrainConfig, tuple[str, ...]]]:
    """Return the trainings that parts need: folder → settings and the sets of rows."""
    found: dict[str, tuple[TrainConfig, tuple[str, ...]]] = {}
    if "directions" in parts or "logits" in parts:
        found["warmup"] = (selector.warmup, ("warmup",))
    if "reference" in parts and selector.reference is not None:
        found["reference"] = (selector.reference, ("validation", "benign"))
    if "tov" in parts:
        found["tov"] = (selector.tov, ("validation",))
    return found


def check_iterative(selector: SelectorConfig, candidates: int, workers: int) -> None:
    """Find out whether the iterative selector can meet every candidate.

    Args:
        selector: The selector's section.
        candidates: Their number.
        workers: Workers, which share a batch evenly.

    Raises:
        ConfigError: There is no inner learning rate, there are too many candidates, or they take more iterations: a row that is
            never met keeps the logit 0 and would rank in the middle, whatever it is worth.
    """
    if not selector.inner_lr:
        raise ConfigError("the iterative selector needs selector.inner_lr above 0: with no inner step no logit ever moves")
    if candidates > MAX_ITERATIVE:
        raise ConfigError(
            f"the iterative selector holds one logit per candidate on every worker and is limited to {MAX_ITERATIVE:,} rows; "
            "use the one-shot score"
        )
    size = batch_rows(candidates, selector.batch_size, max(1, workers))
    if candidates and selector.iterations * size < candidates:
        raise ConfigError(
            f"selector.iterations={selector.iterations} with {size} rows each meet {selector.iterations * size:,} of the {candidates:,} "
            f"candidates, and the others would keep a logit of 0; one epoch takes selector.iterations={math.ceil(candidates / size)}"
        )


def _work(payload: tuple[Sequence[TrainTask], FitJob], ranks: Ranks) -> None:
    tasks, job = payload
    for task in tasks:
        run_task(task, ranks)
    with disk_full_errors(storage_path(job.out)):
        for step in job.selector.checkpoints if "directions" in job.parts else ():
            _directions(job, step, ranks)
        if "logits" in job.parts:
            _learn_logits(job, ranks)


def _open(job: FitJob, step: int, ranks: Ranks) -> tuple[Point, Renderer, list[Rendered], list[Rendered]]:
    renderer = job.model.renderer()
    model = job.model.load(str(ranks.device), adapter=storage_path(job.out) / "warmup" / checkpoint_name(step))
    if job.selector.warmup.checkpointing:  # what the warm-up needs, the directions need too: the same model on the same worker
        enable_checkpointing(model)
    point = Point.at(model, renderer.collate, job.selector.tokens_per_batch, ranks)
    sets = [[renderer.render(row) for row in iterate_rows(path)] for path in (job.validation, job.harmful)]
    return point, renderer, sets[0], sets[1]


def _directions(job: FitJob, step: int, ranks: Ranks) -> None:
    file = storage_path(job.out) / "directions" / f"{checkpoint_name(step)}.safetensors"
    if file.exists():
        return
    point, renderer, validation, harmful = _open(job, step, ranks)
    inner = None
    if job.selector.inner_lr:
        rows = sample_rows(storage_path(job.out) / "rows" / "warmup.parquet", job.selector.trusted_rows, job.seed)
        inner = point.gradient([renderer.render(row) for row in rows])
    directions = [
        attacked_direction(
            point,
            validation=validation,
            harmful=harmful,
            inner=inner,
            inner_lr=job.selector.inner_lr,
            intensity=intensity,
            normalised=job.selector.normalised,
        )
        for intensity in (job.selector.intensity, 0.0)
    ]
    if ranks.first:
        stacked = {name: torch.stack(rows) for name, *rows in zip(point.parameters, *directions, strict=True)}
        _save({name: tensor.cpu() for name, tensor in stacked.items()}, file)
    ranks.barrier()


def _learn_logits(job: FitJob, ranks: Ranks) -> None:
    out = storage_path(job.out)
    if (out / "logits.parquet").exists():
        return
    point, renderer, validation, harmful = _open(job, job.selector.checkpoints[0], ranks)
    table = read_rows([job.candidates], raw=False)

    @lru_cache(maxsize=65536)
    def candidate(index: int) -> Rendered:
        return renderer.render(row_at(table, index))

    selector = IterativeSelector(table.num_rows, job.selector, job.seed)
    if (out / "logits.safetensors").exists():
        selector.load(load_file(local_copy(out / "logits.safetensors")))
    ranks.barrier()
    while selector.iteration < job.selector.iterations:
        values = selector.iterate(point, candidate, validation, harmful)
        if ranks.first and (selector.iteration % SAVE_EVERY == 0 or selector.iteration == job.selector.iterations):
            _save(selector.state(), out / "logits.safetensors")
            told = {"name": "selector", "step": selector.iteration, "total": job.selector.iterations, **values}
            write_text(json.dumps(told), progress_file(out / "logits"))
    if ranks.first:
        columns = {"id": table.column("id"), "logit": pa.array(selector.logits.numpy())}
        write_parquet(pa.table(columns), out / "logits.parquet")
        progress_file(out / "logits").unlink(missing_ok=True)
    ranks.barrier()


def _save(tensors: dict[str, torch.Tensor], file: StoragePath) -> None:
    with replacing(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
