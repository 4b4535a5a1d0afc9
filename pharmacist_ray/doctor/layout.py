"""Choose how a run is laid out on GPUs: the quickest of the layouts that fit, by the arithmetic of `estimate`, `passes` and `hours`.

What a layout may change is what no result hangs on but for rounding: who computes what, and what is kept, sharded, moved or computed again.
Batch sizes, steps and learning rates stay. The one exception is `model.quantization`, taken only where nothing else fits, and said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any, TypeVar

from pharmacist_ray.config.finetune import Defence
from pharmacist_ray.config.schema import Config, TrainConfig
from pharmacist_ray.curation.selector import AT_CHECKPOINTS
from pharmacist_ray.doctor import groups
from pharmacist_ray.doctor.cluster import Cluster
from pharmacist_ray.doctor.estimate import FEW_BITS, Item, memory, setup_of, total
from pharmacist_ray.doctor.hours import Pool, batch_seconds, stage_seconds, step_seconds
from pharmacist_ray.doctor.passes import answer_memory, fit_memory, score_memory
from pharmacist_ray.doctor.shape import Shape
from pharmacist_ray.doctor.workload import Work
from pharmacist_ray.evaluation.answers import PROMPTS_PER_UNIT
from pharmacist_ray.training.objectives import OBJECTIVES

FILLED = 0.95
"""Share of a GPU's memory that a layout may take by estimates that are upper bounds (ours)."""
NEARLY = 1.05
"""A simpler layout is taken where it takes at most so many times the quickest one's time (ours)."""
LEAST = 1024
"""Tokens of a batch below which activations are computed again before it is made smaller (ours)."""
MOST = 65536
"""Tokens of a batch beyond which a group's gathers no longer matter (ours)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """What was chosen, and what is wrong with it."""

    config: Config
    """The configuration with the layout."""
    pool: Pool
    values: dict[str, Any]
    """Every key that the layout decides, by its dotted name."""
    seconds: dict[str, float]
    """Stage → seconds."""
    group: int = 1
    """GPUs that hold the model together while it scores."""
    problems: list[str] = field(default_factory=list)
    """What fits nowhere, and what to do."""


def best_layout(config: Config, shape: Shape, work: Work, cluster: Cluster) -> Layout:
    """Return the quickest layout on a cluster, or on some of its kinds of nodes: what lands on any GPU has to fit the least of them.

    Args:
        config: The configuration, its precision resolved.
        shape: Of its model.
        work: What there is to do.
        cluster: The nodes.
    """
    pools = [Pool(some) for size in range(len(cluster), 0, -1) for some in combinations(cluster, size)]
    found = [layout_on(config, shape, work, pool) for pool in pools]
    return min(found, key=lambda one: (len(one.problems), sum(one.seconds.values())))


def layout_on(config: Config, shape: Shape, work: Work, pool: Pool) -> Layout:
    """Return the quickest layout on a pool: with all bits of the base, else with as many as fit."""
    found = _at_precision(config, shape, work, pool)
    if not any(map(_is_about_weights, found.problems)) or config.model.quantization or config.model.trust_remote_code:
        return found
    if any(train.weights == "full" for train in config.trainings().values()):
        return found
    for bits in FEW_BITS:
        fewer = with_values(config, {"model.quantization": bits})
        tried = _at_precision(fewer, shape, work, pool)
        if len(tried.problems) < len(found.problems):
            found = replace(tried, values={"model.quantization": bits, **tried.values})
        if not tried.problems:
            break
    return found


def _is_about_weights(problem: str) -> bool:
    """Whether fewer bits are what is left to do about a problem; of answers an endpoint takes care at all bits."""
    return not problem.startswith("evaluate")


def _at_precision(config: Config, shape: Shape, work: Work, pool: Pool) -> Layout:
    problems, values = list[str](), dict[str, Any]({"resources.gpus_per_worker": 1})
    config = with_values(config, values)
    trained = _trainings(config, shape, work, pool)
    if trained is None and (trained := _trainings(config, shape, work, pool, directions=False)) is not None:
        problems.append(
            f"fit: no GPU of {pool.name} holds what the directions take, {_least(config, shape, 'fit')}; take larger GPUs"
        )
    if trained is None:
        problems.append(_too_large(config, shape, pool))
    else:
        values |= trained
        config = with_values(config, trained)
    scored, answered = _actors(config, shape, work, pool)
    if scored is None:
        how = "take larger GPUs, or more of them" if groups.may_share(config) else "take larger GPUs"
        problems.append(f"score: no GPU of {pool.name} holds what it takes, {_least(config, shape, 'score')}; {how}")
    if answered is None:
        problems.append(
            f"evaluate: no GPU of {pool.name} holds the model that answers; let an endpoint answer (evaluation.engine: {{url: …, model: "
            f"BASE}}, `vllm serve BASE --tensor-parallel-size {_tensor_parallel(shape, pool)} --enable-lora`)"
        )
    for keys in (scored[1] if scored else {}, answered or {}):
        values |= keys
        config = with_values(config, keys)
    cpus = _cpus(config, pool)
    values |= cpus
    config = with_values(config, cpus)
    return Layout(config, pool, values, stage_seconds(shape, config, work, pool), scored[0] if scored else 1, problems)


def room(pool: Pool) -> float:
    """Return the bytes of a GPU that are planned with."""
    return FILLED * pool.smallest.memory


# --- training


def _trainings(config: Config, shape: Shape, work: Work, pool: Pool, directions: bool = True) -> dict[str, Any] | None:
    """Return the keys of the quickest way to train; None where no way fits.

    Args:
        config: The configuration.
        shape: The model.
        work: What there is to do.
        pool: Where.
        directions: Whether `fit`'s directions have to fit too.
    """
    sizes = [train.batch_size for train in config.trainings().values()]
    runs = max([1, *(one.runs for one in work.trainings if one.stage != "fit")])
    found = []
    for workers in _divisors(math.gcd(*sizes)):
        if workers > pool.gpus:
            break
        beside = max(1, min(pool.gpus // workers, runs))
        values: dict[str, Any] = {"resources.workers": workers, "resources.parallel_runs": beside}
        tried = with_values(config, values)
        chosen = [_section(tried, shape, pool, name, directions) for name in config.trainings()]
        if directions:
            chosen.append(_directions(with_values(tried, *chosen), shape, pool))
        if all(one is not None for one in chosen):
            for one in chosen:
                values |= one or {}
            time = stage_seconds(shape, with_values(config, values), work, pool)
            found.append((sum(time.get(stage, 0.0) for stage in ("fit", "align", "attack")), beside, values))
    return simplest_of(found, lambda one: one[0], lambda one: one[1])[2] if found else None


def _section(config: Config, shape: Shape, pool: Pool, name: str, directions: bool) -> dict[str, Any] | None:
    """Return the keys of the quickest way that fits of one training section: ZeRO stage, offload, checkpointing, accumulation."""
    train, options = config.trainings()[name], []
    stages, alone = _stages(config, train, name), config.resources.workers == 1
    for zero, offload, again, accumulation in product(stages, ("none", "optimizer", "parameters"), (0, 1), _parts(config, train)):
        if zero < {"none": 0, "optimizer": 1, "parameters": 3}[offload] or (offload == "none" and alone and zero > stages[0]):
            continue
        keys = {"zero_stage": zero, "offload": offload, "checkpointing": bool(again), "accumulation": accumulation}
        tried = train.model_copy(update=keys)
        setups = [setup_of(config, tried, objective) for objective in objectives_of(config, name)]
        items = [memory(shape, setup) for setup in setups]
        if all(_fits(one, pool, config) for one in items) and (
            not directions or name != "selector.warmup" or _directions_fit(config, tried, shape, pool)
        ):
            time = sum(total(step_seconds(shape, setup, pool)) for setup in setups)
            effort = (("none", "optimizer", "parameters").index(offload), zero, accumulation, again)
            options.append((time, effort, {f"{name}.{key}": value for key, value in keys.items()}))
    return simplest_of(options, lambda one: one[0], lambda one: one[1])[2] if options else None


def objectives_of(config: Config, name: str) -> list[str]:
    """Return the objectives that a training section is run with."""
    if name == "alignment.train":
        return config.objectives
    return list(dict.fromkeys(Defence.of(one).finetune for one in config.defences)) if name.startswith("attacks.") else ["sft"]


def _stages(config: Config, train: TrainConfig, name: str) -> range:
    """Return the ZeRO stages that a training may have; see `models.quantized` and `training.task`."""
    least = 1 if train.weights == "full" and config.model.dtype == "bfloat16" else 0
    repairs = [repair for one in config.defences if (repair := Defence.of(one).repair) in OBJECTIVES]
    whole = config.model.quantization or (name.startswith("attacks.") and any(OBJECTIVES[one].prompt for one in repairs))
    return range(least, 3 if whole else 4)


def _parts(config: Config, train: TrainConfig) -> list[int]:
    """Return the numbers of micro-batches that a worker's share of a batch can be cut into."""
    return _divisors(train.batch_size // config.resources.workers)


def _directions(config: Config, shape: Shape, pool: Pool) -> dict[str, Any] | None:
    """Return the largest batch of `fit`'s directions that fits, at most the configuration's."""
    if not takes_directions(config):
        return {}
    for tokens in _halves(config.selector.tokens_per_batch, config.model.max_length):
        if _fits(fit_memory(shape, with_values(config, {"selector.tokens_per_batch": tokens})), pool, config):
            return {"selector.tokens_per_batch": tokens}
    return None


def _directions_fit(config: Config, warmup: TrainConfig, shape: Shape, pool: Pool) -> bool:
    selector = config.selector.model_copy(update={"warmup": warmup})
    return _directions(config.model_copy(update={"selector": selector}), shape, pool) is not None


def takes_directions(config: Config) -> bool:
    """Whether `fit` takes gradients at checkpoints."""
    from pharmacist_ray.curation.scorers import parts_of

    return bool({*AT_CHECKPOINTS} & {*parts_of(config.scoring.scorers, config.selector)})


def _too_large(config: Config, shape: Shape, pool: Pool) -> str:
    """Return why no training fits, and what to change: more workers where batch sizes do not let them share, else larger GPUs."""
    sizes = {name: train.batch_size for name, train in config.trainings().items()}
    shared = math.gcd(*sizes.values())
    said = f"training: {shape.parameters / 1e9:.3g}e9 weights do not fit {pool.name}"
    if shared < pool.gpus:
        given = ", ".join(f"{name}.batch_size={size}" for name, size in sizes.items())
        return f"{said} with {shared} workers, and more cannot share these batches evenly ({given}); make them multiples of {pool.gpus}"
    return f"{said} however they are laid out; take more or larger GPUs, or a smaller model.max_length"


# --- scoring and answering


def _actors(
    config: Config, shape: Shape, work: Work, pool: Pool
) -> tuple[tuple[int, dict[str, Any]] | None, dict[str, Any] | None]:
    """Return the quickest way to score, by the smallest groups that can answer too, and how they answer; None for what fits nowhere."""
    first = _scoring(config, shape, work, pool, 1)
    scored = first
    while scored is not None:
        if (answered := _answering(with_values(config, scored[1]), shape, pool, scored[0])) is not None:
            return scored, answered
        scored = _scoring(config, shape, work, pool, scored[0] + 1)
    return first, _answering(config, shape, pool, 1)


def _scoring(config: Config, shape: Shape, work: Work, pool: Pool, least: int) -> tuple[int, dict[str, Any]] | None:
    """Return how many GPUs, of so many or more, hold the model together while it scores, and the keys of the quickest way."""
    length, given = config.model.max_length, config.scoring.tokens_per_batch
    options = []
    for group in (size for size in _group_sizes(config, pool) if size >= least):
        actors = {"resources.actors": pool.gpus // group}
        if not work.checkpoints and not work.forwards:
            return group, actors | groups.in_groups(group)
        batches = _halves(given, length) if group == 1 else sorted({given, *(2**power for power in range(10, MOST.bit_length()))})
        for again, tokens in product((False, True), batches):
            keys = {"scoring.checkpointing": again, "scoring.tokens_per_batch": tokens, **actors}
            tried = with_values(config, keys)
            if tokens >= min(given, length) and _fits(score_memory(shape, tried, group), pool, config):
                time = total(batch_seconds(shape, tried, work, pool, group)) / tokens
                rather = 2 if tokens < LEAST and not again else 1
                options.append((rather * time, (group, again, -min(tokens, given), tokens), group, keys))
    if not options:
        return None
    _, _, group, keys = simplest_of(options, lambda one: one[0], lambda one: one[1])
    return group, keys | groups.in_groups(group)


def _group_sizes(config: Config, pool: Pool) -> Iterator[int]:
    """Yield the sizes of groups of GPUs that may hold a model together: one, some of a node, or whole nodes."""
    yield 1
    if groups.may_share(config):
        for size in range(2, pool.gpus + 1):
            if pool.per_node % size == 0 or size % pool.per_node == 0:
                yield size


def _answering(config: Config, shape: Shape, pool: Pool, group: int) -> dict[str, Any] | None:
    """Return the largest batch of answers that fits: at most the configuration's, or for a group, which gathers for each, a unit's."""
    settings = config.evaluation
    if settings is None:
        return {}
    most = settings.batch_size if group == 1 else max(settings.batch_size, PROMPTS_PER_UNIT // group)
    for size in _halves(most, 1):
        if _fits(answer_memory(shape, with_values(config, {"evaluation.batch_size": size}), group), pool, config):
            return {"evaluation.batch_size": size}
    return None


def _tensor_parallel(shape: Shape, pool: Pool) -> int:
    """Return the fewest GPUs, a power of two, over which the weights and some room for answers fit."""
    weights = shape.parameters * 2
    return next((size for size in (1, 2, 4, 8, 16, 32) if 1.2 * weights / size < room(pool)), 64)


def _least(config: Config, shape: Shape, stage: str) -> str:
    """Return what a single row takes, with activations computed again."""
    again, tokens = ("selector.warmup.checkpointing", "selector") if stage == "fit" else ("scoring.checkpointing", "scoring")
    alone = with_values(config, {again: True, f"{tokens}.tokens_per_batch": config.model.max_length})
    items = fit_memory(shape, alone) if stage == "fit" else score_memory(shape, alone, 1)
    return f"{total(items) / 2**30:.0f} GiB with a single row"


# --- what all share


def _fits(items: list[Item], pool: Pool, config: Config) -> bool:
    """Whether a worker's share fits its GPU, and what it moves to CPU memory its part of the node's, where that is known."""
    if total(items) > room(pool):
        return False
    return all(one.memory is None or total(items, host=True) * one.gpus <= FILLED * one.memory for one in pool.nodes)


def _cpus(config: Config, pool: Pool) -> dict[str, Any]:
    """Return CPUs of a worker that leave two of each node free, where the configuration's do not and the nodes' CPUs are known."""
    known = [(one.cpus - 2) // one.gpus for one in pool.nodes if one.cpus is not None]
    most = min(known, default=math.inf)
    return {"resources.cpus_per_worker": max(1, int(most))} if config.resources.cpus_per_worker > max(1, most) else {}


def simplest_of(options: list[T], time: Callable[[T], float], effort: Callable[[T], Any]) -> T:
    """Return the option of least effort among those that are nearly as quick as the quickest."""
    quickest = min(map(time, options))
    return min((one for one in options if time(one) <= NEARLY * quickest), key=lambda one: (effort(one), time(one)))


def with_values(config: Config, *values: dict[str, Any] | None) -> Config:
    """Return the configuration with other values, unchecked: a layout under way need not be whole."""
    for keys in values:
        for key, value in (keys or {}).items():
            config = _set(config, key.split("."), value)
    return config


def _set(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    if isinstance(section, list):
        place = int(first)
        return [_set(one, rest, value) if number == place else one for number, one in enumerate(section)]
    return section.model_copy(update={first: _set(getattr(section, first), rest, value) if rest else value})


def _halves(most: int, least: int) -> list[int]:
    """Return a number and its halves down to another one, which is in any case among them."""
    found = [most]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
