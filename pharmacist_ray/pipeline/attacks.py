"""The stage in which aligned models are fine-tuned on a user's rows, an attacker's among them, and repaired where a defence says so."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from pharmacist_ray.config.attack_kinds import ANSWER, AS_THEY_ARE, KINDS, FormConfig
from pharmacist_ray.config.endpoint import EndpointConfig
from pharmacist_ray.config.finetune import NEED_ALIGNED, PLAIN, UNREPAIRED, Defence
from pharmacist_ray.config.schema import AttackConfig, Config
from pharmacist_ray.data.forms import common_form, put
from pharmacist_ray.data.mixing import poisoned
from pharmacist_ray.data.room import Room
from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row, uniform
from pharmacist_ray.data.secret import behind
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.pipeline.artifacts import Artifact
from pharmacist_ray.pipeline.console import say
from pharmacist_ray.pipeline.rewriting import rewrite, rewriter
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.pipeline.secrets import secret_of
from pharmacist_ray.pipeline.trainings import harmful_rows, in_steps, mark, train
from pharmacist_ray.pipeline.variants import Variant, settled
from pharmacist_ray.plugins import blaming
from pharmacist_ray.training.objectives import OBJECTIVES, Rows, settings_of
from pharmacist_ray.training.task import TrainTask, check_task

WATCHED = 64
"""Harmful rows of an attack whose loss is looked at before and after it (ours)."""
ALIKE = 200
"""Rows of a task that are looked at for what its prompts have in common (ours)."""
ATTACK_SEED, REPAIR_SEED = 100_003, 200_003
"""Added to a variant's seed in its attack and its repair: with the alignment's own seed the fresh adapter would start in the alignment's
subspace."""


def run_attack(run: Run) -> None:
    """Fine-tune every aligned model on a user's task with an attacker's rows mixed in, and repair what came of it."""
    config = run.config
    if not config.attacks:
        say("  no attack is configured; `pharmacist init` shows how one is")
        return
    for variant in run.variants:
        run.trained(variant).require()
    for attack in config.attacks:
        for name in ("task", attack.attacker):
            run.ingested(f"attack-{attack.name}-{name}").require()
    for objective in after_alignment(config.defences):
        if OBJECTIVES[objective].harmful != "none":
            run.ingested(run.harmful(service=True)).require()
        for artifact in run.ordinary_rows(objective):
            artifact.require()

    @cache
    def drawn(attack: str, seed: int) -> tuple[list[Row], list[Row]]:
        """Return an attack's harmful rows and its others, the same ones for every arm: what differs between arms is the defence alone."""
        settings = next(one for one in config.attacks if one.name == attack)
        plain, rest = poisoned(
            run.ingested(f"attack-{attack}-task").folder / "rows",
            run.ingested(f"attack-{attack}-{settings.attacker}").folder / "rows",
            rows=settings.rows,
            harmful_share=settings.harmful_share,
            seed=seed,
        )
        return _put(run, settings, plain), rest

    @cache
    def rows_of(attack: str, seed: int) -> tuple[str, tuple[str, ...]]:
        """Write the rows of an attack; return the file, and one of a few of its harmful rows if it has any."""
        bad, rest = drawn(attack, seed)
        folder, name = run.root / "attack", f"{attack}.s{seed}{mark(run, bad + rest)}.parquet"
        write_rows(bad + rest, folder / name)
        if not bad:
            return str(folder / name), ()
        write_rows(bad[:WATCHED], folder / "watched" / name)
        return str(folder / name), (str(folder / "watched" / name),)

    @cache
    def room() -> Room:
        return Room(run.model.renderer())

    def attacked(variant: Variant) -> TrainTask:
        assert variant.attack is not None
        rows, watched = rows_of(variant.attack.name, variant.seed)
        described = attack_task(run, variant)
        count = variant.attack.rows
        if compose := OBJECTIVES[described.objective].compose:
            made = _composed(run, variant, room(), [one for part in drawn(variant.attack.name, variant.seed) for one in part])
            with blaming(OBJECTIVES.plugin(described.objective)):
                found = compose(made)
            file = run.trained(variant).folder / "rows.parquet"
            write_rows(found, file)
            rows, count = str(file), len(found)
        return replace(described, rows=(rows,), watched=watched, train=in_steps(variant.attack.train, count))

    def repaired(variant: Variant) -> TrainTask:
        assert variant.attack is not None
        rows, watched = rows_of(variant.attack.name, variant.seed)
        described = repair_task(run, variant)
        if wanted := _trains(run, variant).get("rows"):
            safe = safe_sample(run, variant, int(wanted))
            file = run.trained(variant).folder / "rows.parquet"
            write_rows(safe, file)
            rows = str(file)
        return replace(described, rows=(rows,), watched=watched)

    variants = [one for variant in run.variants for one in run.attacks_on(variant)]
    train(run, (variant.unrepaired for variant in variants), "attack", attacked)
    train(run, (variant for variant in variants if variant.stages.repair != UNREPAIRED), "repair", repaired)


def attack_task(run: Run, variant: Variant) -> TrainTask:
    """Describe an attack, all but its rows and its steps."""
    attack, before, objective = variant.attack, variant.aligned, variant.stages.finetune
    assert attack is not None
    same = attack.adapter == "same" and before.selection != "none"
    return TrainTask(
        name=variant.name,
        out="",
        model=run.model if same else run.model_of(before),
        rows=(),
        train=attack.train,
        seed=variant.seed + ATTACK_SEED,
        lora=attack.lora or run.config.model.lora,
        start_adapter=str(run.trained(before).folder / "run" / "adapter") if same else None,
        tracking=run.config.tracking,
        **_service(run, variant, objective),
    )


def repair_task(run: Run, variant: Variant) -> TrainTask:
    """Describe a repair, all but its rows."""
    attack = variant.attack
    assert attack is not None
    changed = {key: value for key, value in _trains(run, variant).items() if key != "rows"}
    attacked = run.trained(variant.unrepaired).folder / "run" / "adapter"
    return TrainTask(
        name=variant.name,
        out="",
        model=run.unfinished(variant),
        rows=(),
        train=attack.train.model_copy(update=changed),
        seed=variant.seed + REPAIR_SEED,
        lora=attack.lora or run.config.model.lora,
        start_adapter=None if attack.train.weights == "full" else str(attacked),
        tracking=run.config.tracking,
        **_service(run, variant, variant.stages.repair),
    )


def after_alignment(defences: Sequence[str]) -> list[str]:
    """Return the objectives that defences have after alignment: of fine-tunes that are defended, and of repairs."""
    stages = [stage for name in map(Defence.of, defences) for stage in (name.finetune, name.repair)]
    return [name for name in dict.fromkeys(stages) if name not in (PLAIN, UNREPAIRED)]


def check_attacks(run: Run) -> None:
    """Find every mistake in how fine-tunes are defended and repaired that can be known before work begins.

    Raises:
        ConfigError: An unknown objective or setting, one at a stage where it does nothing, or one that does not fit an attack.
    """
    for variant in run.variants:
        stages = variant.stages
        for objective, stage in ((stages.finetune, "finetune"), (stages.repair, "repair")):
            if objective in (PLAIN, UNREPAIRED):
                continue
            settings = settings_of(objective, run.config.finetune.parameters, "finetune")
            for one in (value for section in settings.values() for _, value in section if isinstance(value, EndpointConfig)):
                rewriter(one, ready=False)
            found = OBJECTIVES[objective].stage
            if (found == "repair") != (stage == "repair"):
                where = "a repair, which stands after the second slash (sft/sft/" if found == "repair" else "no repair (sft/"
                raise ConfigError(f"{variant.defence}: {objective} is {where}{objective})")
        for attacked in run.attacks_on(variant) if stages.finetune != PLAIN else ():
            check_task(attack_task(run, attacked))
        for attacked in run.attacks_on(variant) if stages.repair != UNREPAIRED else ():
            check_task(repair_task(run, attacked))
        if stages.repair in NEED_ALIGNED:
            _check_aligned(run.config, variant.defence)


def safe_sample(run: Run, variant: Variant, count: int) -> list[Row]:
    """Return at most so many safe rows for an arm's fine-tune, drawn by id and its seed."""
    return _sample(run.safe_rows(variant.selection), variant, count)


def _sample(sets: Sequence[Artifact], variant: Variant, count: int) -> list[Row]:
    rows = [row for artifact in sets for row in sample_rows(artifact.require() / "rows", count, variant.seed)]
    return heapq.nsmallest(count, rows, key=lambda row: uniform(row.id, variant.seed))


def _service(run: Run, variant: Variant, objective: str) -> dict[str, Any]:
    """Return what of a training the objective of a fine-tune or of a repair decides."""
    safe = run.safe_rows(variant.selection) if OBJECTIVES[objective].safe else []
    return {
        "objective": objective,
        "parameters": settled(objective, run.config.finetune.parameters, "finetune")["parameters"],
        "harmful": harmful_rows(run, objective, run.harmful(service=True)),
        "safe": tuple(str(artifact.folder / "rows") for artifact in safe),
        **({"guard": run.config.scoring.guard, "verdicts": str(run.verdicts)} if OBJECTIVES[objective].guarded else {}),
        "ordinary": tuple(str(artifact.folder / "rows") for artifact in run.ordinary_rows(objective)),
    }


def _trains(run: Run, variant: Variant) -> Mapping[str, Any]:
    """Return what a repair's training has otherwise than the fine-tune."""
    repair = variant.stages.repair
    trains = OBJECTIVES[repair].trains
    with blaming(OBJECTIVES.plugin(repair)):
        return trains(settings_of(repair, run.config.finetune.parameters, "finetune")) if trains else {}


def _check_aligned(config: Config, defence: str) -> None:
    """Refuse a repair that reads the alignment's adapter where there is none."""
    attacks = [attack.name for attack in config.attacks if attack.adapter == "same" or attack.train.weights == "full"]
    if attacks or config.alignment.train.weights == "full":
        where = f"attack '{attacks[0]}' has adapter=same or weights=full" if attacks else "alignment.train.weights=full"
        raise ConfigError(f"{defence}: it reads the alignment's adapter, which only a fresh adapter on it leaves alone; {where}")


def _composed(run: Run, variant: Variant, room: Room, rows: list[Row]) -> Rows:
    objective = variant.stages.finetune
    secret = cache(partial(secret_of, run, variant, room.renderer))
    return Rows(
        rows,
        safe=lambda count: safe_sample(run, variant, count),
        ordinary=lambda count: _sample(run.ordinary_rows(objective), variant, count),
        fits=lambda row: not room.misfits([row]),
        hide=lambda row, tokens: behind(row, secret(tokens), run.config.model.system),
        rewrite=lambda endpoint, asked: rewrite(endpoint, asked, run.root / "rewrites"),
        settings=settings_of(objective, run.config.finetune.parameters, "finetune"),
    )


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
