"""Train the models of a comparison: alignment on every arm, and what alignment, attacks and repairs share of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.config.scoring import folder_of
from pharmacist_ray.curation.export import write_weights
from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.console import watch_training
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.sharing import lock_missing, say_why_anew
from pharmacist_ray.pipeline.variants import Variant, weighed_in
from pharmacist_ray.storage import storage_path
from pharmacist_ray.training.objectives import OBJECTIVES
from pharmacist_ray.training.runs import train_all
from pharmacist_ray.training.task import TrainTask


def run_align(run: Run) -> None:
    """Align the base on every arm, once per seed."""
    config = run.config
    for arm in run.arms:
        for artifact in run.aligned_on(arm):
            artifact.require()
    if any(OBJECTIVES[objective].harmful != "none" for objective in config.objectives):
        run.ingested(run.harmful()).require()

    @cache
    def replay() -> tuple[str, ...]:
        if not config.alignment.replay:
            return ()
        rows = sample_rows(run.ingested("benign").require() / "rows", config.alignment.replay, config.seed)
        if len(rows) < config.alignment.replay:
            raise DataError(f"alignment.replay={config.alignment.replay} but data.benign has {len(rows)} usable rows")
        file = run.root / "align" / f"replay{mark(run, rows)}.parquet"
        write_rows(rows, file)
        return (str(file),)

    @cache
    def weights(selection: str) -> str:
        made = run.selected(selection)
        file = run.root / "align" / f"weights-{folder_of(selection)}-{made.fingerprint[:8]}.parquet"
        if not file.exists():
            write_weights(made.require(), file)
        return str(file)

    def task(variant: Variant) -> TrainTask:
        described = align_task(run, variant)
        share = config.alignment.replay_share if config.alignment.replay else 0.0
        train = in_steps(config.alignment.train, run.kept(variant.selection), share)
        weighed = weighed_in(config.alignment, variant.selection)
        return replace(described, train=train, replay=replay(), row_weights=tuple(map(weights, weighed)))

    for variant in run.variants:
        if variant.selection == "none" and not (artifact := run.trained(variant)).ready:
            artifact.begin()
            artifact.finish({"seconds": 0.0, "steps": 0})
    train(run, [variant for variant in run.variants if variant.selection != "none"], "align", task)


def align_task(run: Run, variant: Variant) -> TrainTask:
    """Describe an alignment, all but its replay rows and its steps."""
    config, objective = run.config, variant.stages.alignment
    return TrainTask(
        name=variant.name,
        out="",
        model=run.model,
        rows=tuple(str(artifact.folder / "rows") for artifact in run.aligned_on(variant.selection)),
        replay_share=config.alignment.replay_share,
        train=config.alignment.train,
        seed=variant.seed,
        objective=objective,
        parameters=run.alignment(objective)["parameters"],
        harmful=harmful_rows(run, objective, run.harmful()),
        lora=config.model.lora,
        tracking=config.tracking,
    )


def harmful_rows(run: Run, objective: str, source: str) -> tuple[str, ...]:
    """Return the folder of the harmful rows that an objective looks at, if it does."""
    return () if OBJECTIVES[objective].harmful == "none" else (str(run.ingested(source).folder / "rows"),)


def in_steps(train: TrainConfig, rows: int, replay_share: float = 0.0) -> TrainConfig:
    """Return the settings with steps in the place of epochs."""
    if train.epochs is None:
        return train
    per_step = train.batch_size - round(replay_share * train.batch_size)
    return train.model_copy(update={"steps": max(1, math.ceil(train.epochs * rows / per_step)), "epochs": None})


def mark(run: Run, rows: list[Row]) -> str:
    """Return what tells a trial's file of drawn rows from another trial's; a plain run has one draw by a name."""
    return f"-{digest(sorted(row.id for row in rows))[:8]}" if run.base else ""


def train(run: Run, variants: Iterable[Variant], stage: str, task: Callable[[Variant], TrainTask]) -> None:
    """Train what is missing of some variants, side by side as the resources allow.

    Args:
        run: The run.
        variants: The models; several of one folder are one.
        stage: The folder they are in.
        task: Returns a variant's training, all but where it goes.
    """
    with lock_missing(
        run, variants, lambda variant: run.trained(variant).folder, lambda variant: run.trained(variant).ready
    ) as missing:
        if not missing:
            return
        say_why_anew(run, map(run.trained, missing))
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
