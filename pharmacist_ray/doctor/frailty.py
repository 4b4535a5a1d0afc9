"""What of a layout breaks first: which stage runs out of memory as rows grow longer, and what else is near its end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pharmacist_ray.curation.fit import MAX_LEARNT
from pharmacist_ray.curation.selector import LEARNT
from pharmacist_ray.doctor.estimate import Item, memory, setup_of, total
from pharmacist_ray.doctor.hours import batch_seconds, step_seconds, token_seconds
from pharmacist_ray.doctor.layout import Layout, objectives_of, takes_directions, with_values
from pharmacist_ray.doctor.passes import answer_memory, fit_memory, score_memory
from pharmacist_ray.doctor.shape import Shape
from pharmacist_ray.doctor.workload import Work
from pharmacist_ray.pipeline.run import Run

LONG_H = 24.0
"""Hours of a stage after which an interruption is to be expected (ours)."""


def held_by_stages(layout: Layout, shape: Shape, work: Work) -> dict[str, list[Item]]:
    """Return what each stage holds on a GPU with a layout, by the stage's name, item by item.

    Args:
        layout: The layout.
        shape: The model.
        work: What there is to do.
    """
    config, found = layout.config, dict[str, list[Item]]()
    trained = [(one.section, one.objective) for one in work.trainings]
    for name, train in config.trainings().items():
        objectives = [objective for objective in objectives_of(config, name) if (name, objective) in trained]
        for objective in objectives:
            found[name if len(objectives) == 1 else f"{name} ({objective})"] = memory(shape, setup_of(config, train, objective))
    if takes_directions(config):
        found["fit: directions"] = fit_memory(shape, config)
    if items := score_memory(shape, config, layout.group):
        found["score"] = items
    if config.evaluation is not None and (items := answer_memory(shape, config, layout.group)):
        found["evaluate"] = items
    return found


def first_to_break(layout: Layout, shape: Shape, work: Work, room: float) -> tuple[int, str, float] | None:
    """Return the length of rows, by doubling, at which a stage first needs more than there is: the length, the stage, the bytes.

    Stages that halve their batches by themselves count with a single row.

    Args:
        layout: A layout in which everything fits.
        shape: The model.
        work: What there is to do.
        room: Bytes of a GPU.
    """
    length = layout.config.model.max_length
    for _ in range(8):
        length *= 2
        longer = {"model.max_length": length, "scoring.tokens_per_batch": length, "selector.tokens_per_batch": length}
        if layout.config.evaluation is not None:
            longer["evaluation.batch_size"] = 1
        tried = Layout(with_values(layout.config, longer), layout.pool, {}, {}, layout.group)
        held = {name: total(items) for name, items in held_by_stages(tried, shape, work).items()}
        worst = max(held, key=lambda name: held[name])
        if held[worst] > room:
            return length, worst, held[worst]
    return None


def frailties(run: Run, layout: Layout, shape: Shape, work: Work, room: float) -> Iterator[str]:
    """Yield a line for each thing that is near its end, the nearest first.

    Args:
        run: The run.
        layout: The layout.
        shape: The model.
        work: What there is to do.
        room: Bytes of a GPU.
    """
    config, pool = layout.config, layout.pool
    held = {name: total(items) for name, items in held_by_stages(layout, shape, work).items()}
    tightest = max(held, key=lambda name: held[name])
    yield f"memory: {tightest} is the tightest, {held[tightest] / 2**30:.1f} of {room / 2**30:.1f} GiB"
    if broken := first_to_break(layout, shape, work, room):
        length, name, needed = broken
        yield f"longer rows: at model.max_length={length} {name} would take {needed / 2**30:.1f} GiB; half of that still fits"
    away = max(total(items, host=True) for items in held_by_stages(layout, shape, work).values())
    if away:
        node = away * min(pool.per_node, config.resources.workers * config.resources.parallel_runs) / 2**30
        yield f"CPU memory: offloaded parts take {node:,.0f} GiB of a node's while it trains, besides what loading the weights takes"
    sizes = sorted({train.batch_size for train in config.trainings().values()})
    shared, models = math.gcd(*sizes), max((one.runs for one in work.trainings), default=0)
    if 0 < shared * models < pool.gpus:
        waiting, batches = pool.gpus - shared * models, ", ".join(map(str, sizes))
        trained = f"{models} {'models are' if models > 1 else 'model is'} trained; other batch sizes use more"
        yield (
            f"training: {waiting} of {pool.gpus} GPUs wait, for batches of {batches} rows are shared evenly by {shared} at most, "
            f"and {trained}"
        )
    for one in work.trainings:
        setup = setup_of(config, config.trainings()[one.section], one.objective)
        parts = step_seconds(shape, setup, pool)
        waits = sum(item.amount for item in parts if item.what != "arithmetic") / total(parts)
        if waits > 0.3:
            yield f"{one.section}: {waits:.0%} of a step is traffic, not arithmetic: a faster link mends that, or more rows a micro-batch"
    if layout.group > 1:
        parts = batch_seconds(shape, config, work, pool, layout.group)
        waits = sum(item.amount for item in parts if item.what != "arithmetic") / total(parts)
        if waits > 0.1:
            yield f"score: {waits:.0%} of a batch is gathering weights; a larger scoring.tokens_per_batch mends that"
        if config.evaluation is not None and config.evaluation.engine is None:
            token = token_seconds(shape, config, pool, layout.group)
            gathers = token[-1].amount / total(token)
            yield (
                f"evaluate: a token takes {total(token):.2g} s, {gathers:.0%} of it gathering weights; an endpoint with tensor parallelism "
                "(evaluation.engine) answers sooner"
            )
    for stage, seconds in layout.seconds.items():
        if seconds > LONG_H * 3600:
            yield (
                f"{stage} takes {seconds / 86400:.1f} days: nodes will be lost on the way; what is finished is kept, and the same command "
                "goes on"
            )
    if {*LEARNT} & {*run.parts} and work.rows > MAX_LEARNT:
        yield f"fit: a logit for each of {work.rows:,.0f} candidates, and at most {MAX_LEARNT:,} are learnt; take the one_shot scorers"
