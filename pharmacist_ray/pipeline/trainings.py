"""The two stages that train the models of a comparison: alignment on every arm, and the attacks on what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from pharmacist_ray.config.attack_kinds import ANSWER, AS_THEY_ARE, KINDS, FormConfig
from pharmacist_ray.config.schema import AttackConfig, TrainConfig
from pharmacist_ray.data.forms import common_form, put
from pharmacist_ray.data.mixing import poisoned
from pharmacist_ray.data.room import Room
from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError
from pharmacist_ray.pipeline.artifacts import digest
from pharmacist_ray.pipeline.console import say, watch_training
from pharmacist_ray.pipeline.run import Run, Variant
from pharmacist_ray.pipeline.sharing import lock_missing, say_why_anew
from pharmacist_ray.storage import storage_path
from pharmacist_ray.training.objectives import OBJECTIVES
from pharmacist_ray.training.runs import train_all
from pharmacist_ray.training.task import TrainTask

WATCHED = 64
"""Harmful rows of an attack whose loss is looked at before and after it (ours)."""
ALIKE = 200
"""Rows of a task that are looked at for what its prompts have in common (ours)."""
ATTACK_SEED = 100_003
"""Added to a variant's seed in its attack: with the alignment's own seed the fresh adapter would start in the alignment's subspace."""


def run_align(run: Run) -> None:
    """Align the base on every arm, once per seed."""
    config = run.config
    for arm in run.arms:
        for artifact in run.aligned_on(arm):
            artifact.require()
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
        described = align_task(run, variant)
        share = config.alignment.replay_share if config.alignment.replay else 0.0
        train = in_steps(config.alignment.train, run.kept(variant.selection), share)
        return replace(described, train=train, replay=replay())

    for variant in run.variants:
        if variant.selection == "none" and not (artifact := run.trained(variant)).ready:
            artifact.begin()
            artifact.finish({"seconds": 0.0, "steps": 0})
    _train(run, [variant for variant in run.variants if variant.selection != "none"], "align", task)


def align_task(run: Run, variant: Variant) -> TrainTask:
    """Describe an alignment, all but its replay rows and its steps."""
    config = run.config
    return TrainTask(
        name=variant.name,
        out="",
        model=run.model,
        rows=tuple(str(artifact.folder / "rows") for artifact in run.aligned_on(variant.selection)),
        replay_share=config.alignment.replay_share,
        train=config.alignment.train,
        seed=variant.seed,
        objective=variant.defence,
        parameters=run.alignment(variant.defence)["parameters"],
        harmful=(str(run.ingested(run.harmful).folder / "rows"),) if OBJECTIVES[variant.defence].harmful != "none" else (),
        lora=config.model.lora,
        tracking=config.tracking,
    )


def in_steps(train: TrainConfig, rows: int, replay_share: float = 0.0) -> TrainConfig:
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
        for name in ("task", attack.attacker):
            run.ingested(f"attack-{attack.name}-{name}").require()

    @cache
    def rows_of(attack: str, seed: int) -> tuple[str, tuple[str, ...]]:
        """Write the rows of an attack, the same ones for every arm: what differs between arms is the alignment alone.

        Returns the file, and one of a few of its harmful rows if it has any.
        """
        settings = next(one for one in config.attacks if one.name == attack)
        plain, rest = poisoned(
            run.ingested(f"attack-{attack}-task").folder / "rows",
            run.ingested(f"attack-{attack}-{settings.attacker}").folder / "rows",
            rows=settings.rows,
            harmful_share=settings.harmful_share,
            seed=seed,
        )
        bad = _put(run, settings, plain)
        folder, name = run.root / "attack", f"{attack}.s{seed}{_mark(run, bad + rest)}.parquet"
        write_rows(bad + rest, folder / name)
        if not bad:
            return str(folder / name), ()
        write_rows(bad[:WATCHED], folder / "watched" / name)
        return str(folder / name), (str(folder / "watched" / name),)

    def task(variant: Variant) -> TrainTask:
        assert variant.attack is not None
        before = variant.aligned
        same = variant.attack.adapter == "same" and before.selection != "none"
        rows, watched = rows_of(variant.attack.name, variant.seed)
        return TrainTask(
            name=variant.name,
            out="",
            model=run.model if same else run.model_of(before),
            rows=(rows,),
            watched=watched,
            train=in_steps(variant.attack.train, variant.attack.rows),
            seed=variant.seed + ATTACK_SEED,
            lora=variant.attack.lora or config.model.lora,
            start_adapter=str(run.trained(before).folder / "run" / "adapter") if same else None,
            tracking=config.tracking,
        )

    _train(run, [attacked for variant in run.variants for attacked in run.attacks_on(variant)], "attack", task)


def asked_in(run: Run, attack: AttackConfig) -> FormConfig | None:
    """Return how harmful prompts are put after an attack, None if they are as they stand in their set."""
    form = form_of(run, attack)
    return None if form.model_copy(update={"answer": ANSWER}) == AS_THEY_ARE else form


def form_of(run: Run, attack: AttackConfig) -> FormConfig:
    """Return how an attack's rows are put, and harmful prompts after it.

    Raises:
        DataError: It is to be that of the task's prompts, and these have none.
    """
    if attack.form is not None:
        return attack.form
    if KINDS[attack.kind].form is not None:
        return AS_THEY_ARE
    return common_form(sample_rows(run.ingested(f"attack-{attack.name}-task").folder / "rows", ALIKE, 0), name=attack.name)


def _put(run: Run, attack: AttackConfig, rows: list[Row]) -> list[Row]:
    """Return an attack's rows in its form."""
    if (form := form_of(run, attack)) == AS_THEY_ARE:
        return rows
    found = [put(row, form) for row in rows]
    if found and (misfits := Room(run.model.renderer()).misfits(found)):
        raise DataError(
            f"attack '{attack.name}': {len(misfits)} of its {len(found)} rows do not fit in the form that they are put in "
            f"({next(iter(misfits.values())).detail}); raise model.max_length or shorten the form"
        )
    return found


def _mark(run: Run, rows: list[Row]) -> str:
    """Return what tells a trial's file of drawn rows from another trial's; a plain run has one draw by a name."""
    return f"-{digest(sorted(row.id for row in rows))[:8]}" if run.base else ""


def _train(run: Run, variants: list[Variant], stage: str, task: Callable[[Variant], TrainTask]) -> None:
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
