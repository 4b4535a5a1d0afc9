"""Fit the selector: warm-up, checkpoints, directions (or learnt logits), and the loss gap's reference, on Ray Train workers.

Output folder: ``warmup/step-000020/`` (adapters θ_k), ``directions/step-000020.safetensors`` (v by parameter name, one row per
direction), ``reference/adapter``, in iterative mode ``logits.parquet``, and ``selector.json`` last. Whatever is there already is not
computed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, SelectorConfig
from pharmacist_ray.curation.selector import DIRECTIONS, IterativeSelector, Point, attacked_direction, checkpoint_name
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.data.rows import count_rows, iterate_rows, read_rows, row_at, sample_rows, write_rows
from pharmacist_ray.errors import ConfigError, DataError
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


def fit(
    *,
    model: ModelRef,
    lora: LoraConfig,
    selector: SelectorConfig,
    resources: ResourcesConfig,
    seed: int,
    sets: Mapping[str, StoragePath],
    out: StoragePath,
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

    Raises:
        ConfigError: Iterative mode without an inner learning rate, or over too many candidates.
        DataError: A set is empty.
    """
    if selector.mode == "iterative" and not selector.inner_lr:
        raise ConfigError("selector.mode=iterative needs selector.inner_lr above 0: with no inner step no logit ever moves")
    if selector.mode == "iterative" and count_rows(sets["candidates"]) > MAX_ITERATIVE:
        raise ConfigError(
            f"selector.mode=iterative holds one logit per candidate on every worker and is limited to {MAX_ITERATIVE:,} rows; "
            "use one_shot"
        )
    out.mkdir(parents=True, exist_ok=True)
    warmup = sample_rows(sets["candidates"], selector.warmup.steps * selector.warmup.batch_size, seed)
    write_rows(warmup, out / "rows" / "warmup.parquet")
    for name in ("validation", "harmful", "benign"):
        if name in sets:
            rows = sample_rows(sets[name], selector.trusted_rows, seed)
            if not rows:
                raise DataError(f"data.{name} has no rows left after ingestion; the selector cannot do without")
            write_rows(rows, out / "rows" / f"{name}.parquet")
    common = {"model": model, "lora": lora, "seed": seed}
    tasks = [
        TrainTask(
            name="warm-up",
            out=str(out / "warmup"),
            rows=(str(out / "rows" / "warmup.parquet"),),
            train=selector.warmup,
            checkpoints=tuple(selector.checkpoints),
            **common,  # type: ignore[arg-type]
        )
    ]
    if selector.reference is not None and "benign" in sets:
        tasks.append(
            TrainTask(
                name="reference",
                out=str(out / "reference"),
                rows=(str(out / "rows" / "validation.parquet"), str(out / "rows" / "benign.parquet")),
                train=selector.reference,
                **common,  # type: ignore[arg-type]
            )
        )
    job = FitJob(
        out=str(out),
        candidates=str(sets["candidates"]),
        validation=str(out / "rows" / "validation.parquet"),
        harmful=str(out / "rows" / "harmful.parquet"),
        selector=selector,
        **common,  # type: ignore[arg-type]
    )
    run_on_workers(_work, (tasks, job), name="fit", storage=out / "ray", resources=resources)
    summary = {
        "mode": selector.mode,
        "checkpoints": selector.checkpoints,
        "directions": list(DIRECTIONS),
        "intensity": selector.intensity,
        "warmup_rows": len(warmup),
        "reference": len(tasks) > 1,
    }
    write_text(json.dumps(summary, indent=1), out / "selector.json")
    return summary


def _work(payload: tuple[Sequence[TrainTask], FitJob], ranks: Ranks) -> None:
    tasks, job = payload
    for task in tasks:
        run_task(task, ranks)
    with disk_full_errors(storage_path(job.out)):
        for step in job.selector.checkpoints:
            _directions(job, step, ranks)
        if job.selector.mode == "iterative":
            _learn_logits(job, ranks)


def _open(job: FitJob, step: int, ranks: Ranks) -> tuple[Point, Renderer, list[Rendered], list[Rendered]]:
    renderer = job.model.renderer()
    model = job.model.load(str(ranks.device), adapter=storage_path(job.out) / "warmup" / checkpoint_name(step))
    point = Point.at(model, renderer.collate, job.selector.batch_size, ranks)
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
    table = read_rows([job.candidates])

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
