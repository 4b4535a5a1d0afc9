"""Fit the selector: warm-up, checkpoints, directions, learnt logits and reference models, on Ray Train workers.

Output folder: ``warmup/step-000020/`` (adapters θ_k), ``directions/step-000020.safetensors`` (v by parameter name, one row per
direction), ``groups.json`` (ids of the validation rows by group) and ``groups/step-000020.safetensors``, ``last_layers/`` (how both are
weighed over the last layers alone), ``reference/adapter``, ``tov/adapter``, ``logits.parquet``, ``seal.parquet``, and ``selector.json``
last. Only the parts that scorers ask for are made (`PARTS`), and whatever is there already is not computed again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from pharmacist_ray.config.schema import LoraConfig, ResourcesConfig, SelectorConfig, TrainConfig
from pharmacist_ray.curation.groups import group_rows
from pharmacist_ray.curation.last_layers import SAMPLE, agreements, find_weights
from pharmacist_ray.curation.seal import BilevelSelector
from pharmacist_ray.curation.selector import (
    AT_CHECKPOINTS,
    DIRECTIONS,
    LEARNT,
    OF_LAST_LAYERS,
    PARTS,
    IterativeSelector,
    Point,
    attacked,
    attacked_direction,
    batch_rows,
    checkpoint_name,
    part_files,
)
from pharmacist_ray.data.render import Rendered, Renderer
from pharmacist_ray.data.rows import count_rows, iterate_rows, read_rows, sample_rows, write_rows
from pharmacist_ray.data.samples import Samples
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.models.modes import enable_checkpointing
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.imports import importing
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.usage import peak_bytes
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import StoragePath, disk_full_errors, local_copy, replacing, storage_path, write_parquet, write_text
from pharmacist_ray.training.task import TrainTask, progress_file

MAX_LEARNT = 5_000_000
"""More candidates than this do not fit what learns a logit for each, on every worker."""

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
    sample: str
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
    check_learnt(parts, selector, lambda: count_rows(sets["candidates"]), resources.workers)
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
    if {*OF_LAST_LAYERS} & {*parts}:
        most = min(SAMPLE, math.ceil(count_rows(sets["candidates"]) / 2))
        sample = sample_rows(sets["candidates"], most, seed + 1)  # drawn apart from the warm-up's
        write_rows(sample, out / "rows" / "last_layers.parquet")
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
        sample=str(out / "rows" / "last_layers.parquet"),
        parts=tuple(sorted(parts)),
        selector=selector,
        **common,  # type: ignore[arg-type]
    )
    # A model that is spread over the workers is not let go of by DeepSpeed while they live: each has workers of its own.
    spread = selector.warmup.zero_stage == 3 and resources.workers
    pieces: list[tuple[list[TrainTask], FitJob | None]] = (
        [*(([task], None) for task in tasks), ([], job)] if spread else [(tasks, job)]
    )
    peak = max(run_on_workers(_work, piece, name="fit", storage=out / "ray", resources=resources) for piece in pieces)
    summary = {
        "mode": selector.mode,
        "checkpoints": selector.checkpoints,
        "directions": list(DIRECTIONS),
        "intensity": selector.intensity,
        "warmup_rows": counts.get("warmup", 0),
        "usage": {"peak_bytes": peak},
        "parts": [part for part in PARTS if all((out / file).exists() for file in part_files(selector, part))],
        "last_layers": agreements(out),
    }
    write_text(json.dumps(summary, indent=1), out / "selector.json")
    return summary


def trainings_of(selector: SelectorConfig, parts: Collection[str]) -> dict[str, tuple[TrainConfig, tuple[str, ...]]]:
    """Return the trainings that parts need: folder → settings and the sets of rows."""
    found: dict[str, tuple[TrainConfig, tuple[str, ...]]] = {}
    if {"directions", "groups", "logits"} & {*parts}:
        found["warmup"] = (selector.warmup, ("warmup",))
    if "reference" in parts and selector.reference is not None:
        found["reference"] = (selector.reference, ("validation", "benign"))
    if "tov" in parts:
        found["tov"] = (selector.tov, ("validation",))
    return found


def check_learnt(parts: Collection[str], selector: SelectorConfig, candidates: Callable[[], int], workers: int) -> None:
    """Find out whether the parts that learn a logit for each candidate can meet every one.

    Args:
        parts: Which of `PARTS` are to be made.
        selector: The selector's section.
        candidates: Returns their number; asked only where it matters.
        workers: Workers, which share a batch evenly.

    Raises:
        ConfigError: There is no inner learning rate, there are too many candidates, or they take more iterations: a row that is
            never met keeps the logit 0 and would rank in the middle, whatever it is worth.
    """
    if "logits" in parts and not selector.inner_lr:
        raise ConfigError("the iterative selector needs selector.inner_lr above 0: with no inner step no logit ever moves")
    learners = {
        "logits": ("the iterative selector", "selector.iterations", selector.iterations, selector.batch_size),
        "seal": ("seal", "selector.seal.steps", selector.seal.steps, selector.seal.batch_size),
    }
    for name, key, steps, batch_size in (learners[part] for part in LEARNT if part in parts):
        count = candidates()
        if count > MAX_LEARNT:
            raise ConfigError(
                f"{name} holds one logit per candidate on every worker and is limited to {MAX_LEARNT:,} rows; use the one-shot score"
            )
        size = batch_rows(count, batch_size, max(1, workers))
        if count and steps * size < count:
            raise ConfigError(
                f"{key}={steps} with {size} rows each meet {steps * size:,} of the {count:,} candidates, and the others would keep a "
                f"logit of 0; one epoch takes {key}={math.ceil(count / size)}"
            )


def _work(payload: tuple[Sequence[TrainTask], FitJob | None], ranks: Ranks) -> int:
    """Make what is missing, and return the most memory that a worker held."""
    with importing():
        from pharmacist_ray.training.loop import run_task  # with DeepSpeed, which only workers need

    tasks, job = payload
    for task in tasks:
        run_task(task, ranks)
    if job:
        with disk_full_errors(storage_path(job.out)):
            opened = _Opened(job, ranks)
            for step in job.selector.checkpoints if {*AT_CHECKPOINTS} & {*job.parts} else ():
                _directions(job, step, opened)
            for part in OF_LAST_LAYERS:
                if part in job.parts:
                    _weigh_last_layers(job, part, opened)
            for part in LEARNT:
                if part in job.parts and not (storage_path(job.out) / f"{part}.parquet").exists():
                    _learn(job, part, opened)
    return int(ranks.gather(torch.tensor([peak_bytes()], dtype=torch.float64, device=ranks.device)).max())


class _Opened:
    """The model on this worker, loaded when it is first needed, and the rows as it reads them."""

    def __init__(self, job: FitJob, ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self._point: Point | None = None

    @cached_property
    def renderer(self) -> Renderer:
        return self.job.model.renderer()

    @cached_property
    def validation(self) -> list[Rendered]:
        return self._rendered(self.job.validation)

    @cached_property
    def sample(self) -> list[Rendered]:
        return self._rendered(self.job.sample)

    @cached_property
    def harmful(self) -> list[Rendered]:
        return self._rendered(self.job.harmful)

    def at(self, step: int) -> Point:
        """Return the point of a step of the warm-up."""
        from peft import set_peft_model_state_dict

        adapter = local_copy(storage_path(self.job.out) / "warmup" / checkpoint_name(step))
        if self._point is None:
            self._point = self._point_of(self._loaded(adapter))
        else:
            set_peft_model_state_dict(self._point.model, load_file(adapter / "adapter_model.safetensors"))
        return self._point

    def fresh(self) -> Point:
        """Return the point of a new adapter, which changes nothing yet."""
        from pharmacist_ray.models.load import add_lora

        self._point = None  # one model at a time
        return self._point_of(add_lora(self._loaded(), self.job.lora, seed=self.job.seed))

    def _loaded(self, adapter: StoragePath | None = None) -> Any:
        """Return the model, spread over the workers where the warm-up's is: a model that did not fit there does not fit here."""
        if self.job.selector.warmup.zero_stage == 3:
            from pharmacist_ray.training.sharded import load_sharded

            return load_sharded(self.job.model, self.ranks, adapter=adapter)
        return self.job.model.load(str(self.ranks.device), adapter=adapter)

    def _point_of(self, model: Any) -> Point:
        if (
            self.job.selector.warmup.checkpointing
        ):  # what the warm-up needs, the directions need too: the same model on the same worker
            enable_checkpointing(model)
        return Point.at(model, self.renderer.collate, self.job.selector.tokens_per_batch, self.ranks)

    def _rendered(self, path: str) -> list[Rendered]:
        return self.renderer.render_all(list(iterate_rows(path)))


def _directions(job: FitJob, step: int, opened: _Opened) -> None:
    ranks = opened.ranks
    files = {part: storage_path(job.out) / part / f"{checkpoint_name(step)}.safetensors" for part in AT_CHECKPOINTS}
    missing = [part for part, file in files.items() if part in job.parts and not file.exists()]
    ranks.barrier()  # before one of them makes what another has not yet missed
    if not missing:
        return
    point, validation, selector = opened.at(step), opened.validation, job.selector
    at: dict[str, Any] = {
        "harmful": opened.harmful,
        "inner": None,
        "inner_lr": selector.inner_lr,
        "normalised": selector.normalised,
    }
    if selector.inner_lr:
        rows = sample_rows(storage_path(job.out) / "rows" / "warmup.parquet", selector.trusted_rows, job.seed)
        at["inner"] = point.gradient(opened.renderer.render_all(rows))
    for part in missing:
        if part == "directions":
            intensities = (selector.intensity, 0.0)
            found = [attacked_direction(point, validation=validation, intensity=intensity, **at) for intensity in intensities]
        else:
            groups = _groups(job, point, validation)
            with attacked(point, intensity=selector.intensity, **at):
                found = [point.gradient([validation[place] for place in group]) for group in groups]
        if ranks.first:
            stacked = {name: torch.stack(rows) for name, *rows in zip(point.parameters, *found, strict=True)}
            _save({name: tensor.cpu() for name, tensor in stacked.items()}, files[part])
    ranks.barrier()


def _groups(job: FitJob, point: Point, validation: Sequence[Rendered]) -> list[list[int]]:
    """Return the places of each group's validation rows: the same at every checkpoint, found at the first."""
    rows = list(iterate_rows(job.validation))
    file = storage_path(job.out) / "groups.json"
    if not file.exists():
        groups = group_rows(point, rows, validation, job.selector.coverage, job.seed)
        point.ranks.barrier()
        if point.ranks.first:
            write_text(json.dumps([[rows[place].id for place in group] for group in groups]), file)
        return groups
    places = {row.id: place for place, row in enumerate(rows)}
    return [[places[id] for id in group] for group in json.loads(file.read_text(encoding="utf-8"))]


def _weigh_last_layers(job: FitJob, part: str, opened: _Opened) -> None:
    """Find out how directions are weighed over the last layers alone; see `curation.last_layers`."""
    out, ranks, selector = storage_path(job.out), opened.ranks, job.selector
    file = out / f"{part}.safetensors"
    missing = not file.exists()
    ranks.barrier()
    if not missing:
        return
    files = {step: out / OF_LAST_LAYERS[part] / f"{checkpoint_name(step)}.safetensors" for step in selector.checkpoints}
    points = ((opened.at(step), load_file(local_copy(file), device=str(ranks.device))) for step, file in files.items())
    weights = find_weights(points, opened.sample, selector.cosine)
    if ranks.first:
        _save(weights, file)
    ranks.barrier()


def _learn(job: FitJob, part: str, opened: _Opened) -> None:
    """Learn a logit for each candidate, going on from the last saved state."""
    out, config, ranks = storage_path(job.out), job.selector, opened.ranks
    table = read_rows([job.candidates], raw=False)
    candidates = Samples(table, opened.renderer)
    selector: IterativeSelector | BilevelSelector
    iterate: Callable[[], dict[str, float]]
    if part == "logits":
        selector, total = IterativeSelector(table.num_rows, config, job.seed), config.iterations
        point = opened.at(config.checkpoints[0])
        iterate = partial(selector.iterate, point, candidates.__getitem__, opened.validation, opened.harmful)
    else:
        point = opened.fresh()
        selector, total = BilevelSelector(point, table.num_rows, config.seal, job.seed), config.seal.steps
        iterate = partial(selector.iterate, point, candidates.__getitem__, opened.validation)

    saved = out / f"{part}.safetensors"
    if saved.exists():
        selector.load(load_file(local_copy(saved)))
    ranks.barrier()
    while selector.iteration < total:
        values = iterate()
        if ranks.first and (selector.iteration % SAVE_EVERY == 0 or selector.iteration == total):
            _save(selector.state(), saved)
            told = {"name": "selector", "step": selector.iteration, "total": total, **values}
            write_text(json.dumps(told), progress_file(out / part))
    if ranks.first:
        columns = {"id": table.column("id"), "logit": pa.array(selector.logits.numpy())}
        write_parquet(pa.table(columns), out / f"{part}.parquet")
        progress_file(out / part).unlink(missing_ok=True)
    ranks.barrier()


def _save(tensors: dict[str, torch.Tensor], file: StoragePath) -> None:
    with replacing(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
