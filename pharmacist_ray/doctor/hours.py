"""How long each stage takes on a cluster: operations at a share of the peak, weights over links, files from a disk.

Nothing is taken to overlap, and training rows are all of full length; candidates have a mean length, for they are bucketed by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pharmacist_ray.config.schema import Config
from pharmacist_ray.doctor.cluster import Cluster
from pharmacist_ray.doctor.estimate import BYTES, Item, Setup, setup_of, total
from pharmacist_ray.doctor.gpus import GPUS, Gpu
from pharmacist_ray.doctor.groups import fitting_group, group_of
from pharmacist_ray.doctor.pace import PCIE, arithmetic, gathering, seconds, token_flops
from pharmacist_ray.doctor.passes import base_memory, differentiated, pass_setup
from pharmacist_ray.doctor.shape import Shape
from pharmacist_ray.doctor.workload import INGEST_S, SELECT_S, Trained, Work

REACHED = 0.7
"""Share of a link's speed that gathers reach (ours, an assumption)."""
DISK = 1e9
"""Bytes/s at which a node reads weights from the shared volume (ours, an assumption)."""
START_S = 60.0
"""Seconds in which the processes of a training or an actor start (ours, an assumption)."""
LAUNCH_S = 9e-4
"""Seconds a layer takes at least to make a token, however small it is: kernels are launched one by one (ours, an assumption)."""


@dataclass(frozen=True)
class Pool:
    """GPUs that a run is planned for as if all were alike: a worker lands on any of them, so each counts as the least of them."""

    nodes: Cluster

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(one.all_gpus for one in self.nodes)

    @property
    def per_node(self) -> int:
        """GPUs of the node that has fewest."""
        return min(one.gpus for one in self.nodes)

    @property
    def name(self) -> str:
        """As it is written."""
        return ",".join(one.name for one in self.nodes)

    @property
    def smallest(self) -> Gpu:
        """The GPU with the least memory."""
        return min((one.gpu for one in self.nodes), key=lambda gpu: gpu.memory)

    @property
    def slowest(self) -> str:
        """The key of the GPU that computes slowest."""
        return min((one.kind for one in self.nodes), key=lambda kind: GPUS[kind].bfloat16)

    def link(self, gpus: int) -> tuple[float, str]:
        """Return bytes/s at which each of so many GPUs receives what the others have, and over what.

        All gathers of a node come in once, over all its network adapters, and are handed on within it (a ring, as NCCL makes it).
        """
        inside, within = min((one.gpu.nvlink or PCIE, "NVLink" if one.gpu.nvlink else "PCIe") for one in self.nodes)
        if gpus <= self.per_node:
            return REACHED * inside, within
        outside = min(one.network for one in self.nodes) / 8
        return REACHED * min(inside, outside), "the network" if outside < inside else within

    @property
    def cpus(self) -> float | None:
        """CPUs of all nodes, where they are known."""
        known = [one.count * one.cpus for one in self.nodes if one.cpus is not None]
        return sum(known) if len(known) == len(self.nodes) else None


def step_seconds(shape: Shape, setup: Setup, pool: Pool) -> list[Item]:
    """Return the seconds of an optimiser step on a pool, item by item."""
    return seconds(shape, setup, pool.slowest, pool.link(setup.workers)[0])


def load_seconds(shape: Shape, config: Config) -> float:
    """Return the seconds in which a group of workers or an actor starts and reads the weights."""
    return START_S + shape.parameters * BYTES[config.model.dtype] / DISK


def training_seconds(shape: Shape, config: Config, one: Trained, pool: Pool) -> float:
    """Return the seconds of all runs of a training section, some side by side."""
    setup = setup_of(config, config.trainings()[one.section], one.objective)
    run = load_seconds(shape, config) + one.steps * total(step_seconds(shape, setup, pool))
    return math.ceil(one.runs / config.resources.parallel_runs) * run


def batch_seconds(shape: Shape, config: Config, work: Work, pool: Pool, group: int | None = None) -> list[Item]:
    """Return the seconds in which a GPU scores a batch of ``scoring.tokens_per_batch``, item by item.

    Args:
        shape: The model.
        config: The configuration.
        work: Passes over each row.
        pool: Where.
        group: GPUs that hold the model together; None: as the configuration says.
    """
    scoring, group = config.scoring, group_of(config) if group is None else group
    setup = pass_setup(config, scoring.tokens_per_batch, scoring.checkpointing, group)
    return _passes(shape, setup, work.checkpoints, work.forwards, pool, differentiated(shape, config))


def _passes(shape: Shape, setup: Setup, both: int, forwards: int, pool: Pool, back: int | None = None) -> list[Item]:
    """Return the seconds of passes over a batch: some forward and backward, through the last ``back`` layers, some forward alone."""
    share = 1.0 if back is None else back / shape.layers
    weights = shape.parameters - shape.embedding
    spared = (1 - share) * 2.0 * (1 + setup.checkpointing) * (weights - shape.head)
    flops = both * (token_flops(shape, setup) - spared) + forwards * 2.0 * weights
    tokens = (setup.micro_batch * setup.length, "tokens")
    items = [arithmetic((flops, "FLOP"), tokens, gpu=pool.slowest, dtype=setup.dtype)] if flops else []
    if setup.workers > 1 and flops:
        gathers = both * (1 + share * (1 + setup.checkpointing)) + forwards
        items.append(gathering(shape, setup.dtype, setup.workers, gathers, pool.link(setup.workers)[0]))
    return items


def score_seconds(shape: Shape, config: Config, work: Work, pool: Pool, group: int | None = None) -> float:
    """Return the seconds in which all candidates are scored; see `batch_seconds`."""
    scoring, group = config.scoring, group_of(config) if group is None else group
    setup = pass_setup(config, scoring.tokens_per_batch, scoring.checkpointing, group)
    batches = work.rows * work.tokens / (setup.micro_batch * setup.length)
    gpus = group * max(1, config.resources.actors)
    return load_seconds(shape, config) + batches * total(batch_seconds(shape, config, work, pool, group)) / gpus


def direction_seconds(shape: Shape, config: Config, work: Work, pool: Pool) -> float:
    """Return the seconds in which the directions of all checkpoints are taken, and logits are learnt."""
    if not work.checkpoints * work.directions + work.learnt:
        return 0.0
    selector = config.selector
    setup = pass_setup(config, selector.tokens_per_batch, selector.warmup.checkpointing, fitting_group(config))
    rows = math.ceil((work.checkpoints * work.directions + work.learnt) / max(1, config.resources.workers))
    once = total(_passes(shape, setup, 1, 0, pool))
    return load_seconds(shape, config) + math.ceil(rows / setup.micro_batch) * once


def token_seconds(shape: Shape, config: Config, pool: Pool, group: int | None = None) -> list[Item]:
    """Return the seconds in which a GPU makes the next token of a batch of answers: all weights are read, and in a group gathered.

    Args:
        shape: The model.
        config: The configuration.
        pool: Where.
        group: GPUs that hold the model together; None: as the configuration says.
    """
    group = group_of(config) if group is None else group
    weights = total(base_memory(shape, pass_setup(config, config.model.max_length, False)))
    read = Item("reading weights", ((weights, "B"),), ((GPUS[pool.slowest].bandwidth, "B/s"),))
    items = [max(read, Item("launching kernels", ((shape.layers, "layers"), (LAUNCH_S, "s"))), key=lambda item: item.amount)]
    return items + ([gathering(shape, config.model.dtype, group, 1, pool.link(group)[0])] if group > 1 else [])


def answer_seconds(shape: Shape, config: Config, work: Work, pool: Pool) -> float:
    """Return the seconds in which all models answer; of an endpoint nothing is known."""
    settings = config.evaluation
    if settings is None or settings.engine is not None or not work.models:
        return 0.0
    flops = 2.0 * (shape.parameters - shape.embedding)
    dtype = config.model.dtype
    read = arithmetic((flops, "FLOP"), (settings.batch_size * work.tokens, "tokens"), gpu=pool.slowest, dtype=dtype).amount
    batches = math.ceil(work.prompts / (settings.batch_size * group_of(config)))
    one = batches * (read + settings.max_new_tokens * total(token_seconds(shape, config, pool)))
    return math.ceil(work.models / max(1, min(config.resources.actors, work.models))) * (load_seconds(shape, config) + one)


def stage_seconds(shape: Shape, config: Config, work: Work, pool: Pool) -> dict[str, float]:
    """Return stage → seconds; of ingestion and selection, which take CPUs, where their number is known.

    Args:
        shape: The model.
        config: The configuration with the layout.
        work: What there is to do.
        pool: Where.
    """
    trained = {
        stage: sum(training_seconds(shape, config, one, pool) for one in work.trainings if one.stage == stage)
        for stage in ("fit", "align", "attack")
    }
    trained["fit"] += direction_seconds(shape, config, work, pool)
    scored = score_seconds(shape, config, work, pool) if work.checkpoints or work.forwards else 0.0
    found = {"fit": trained["fit"], "score": scored, "align": trained["align"], "attack": trained["attack"]}
    found["evaluate"] = answer_seconds(shape, config, work, pool)
    if pool.cpus:
        found = {"ingest": work.rows * INGEST_S / pool.cpus, **found, "select": work.rows * SELECT_S / pool.cpus}
    return {stage: seconds_ for stage, seconds_ in found.items() if seconds_}
