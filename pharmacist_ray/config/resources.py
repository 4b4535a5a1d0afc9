"""What a run may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pharmacist_ray.config.section import Count, Positive, Section


class ResourcesConfig(Section):
    """What the run may use. Nothing is guessed from the machine that starts it."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Ray Train workers of one training run; 0 trains in the stage's own process, as Ray Train's local mode does, without a GPU: small
    models then start at once, but what ends that process ends the stage, and the same command goes on."""
    parallel_runs: Count = 1
    """Training runs at the same time (arms × seeds are independent)."""
    actors: Annotated[int, Field(ge=0)] = 1
    """Ray Data actors for scoring and for evaluation; 0 does both in the stage's own process, as for `workers`."""
    workers_per_actor: Count = Field(default=1, exclude_if=lambda value: value == 1)
    """Workers that score and answer together in the place of one actor, where a model does not fit one GPU: its weights are spread over
    them and gathered layer by layer (ZeRO 3). Each takes what a training worker takes; `actors` counts their groups."""
    cpus_per_worker: Positive = 1.0
    """CPUs of a training worker or an actor."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs of a training worker or an actor; 0 runs on the CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures that a training run survives."""

    @model_validator(mode="after")
    def _can_be_given(self) -> ResourcesConfig:
        if not self.workers and (self.gpus_per_worker or self.parallel_runs > 1):
            raise ValueError(
                "resources.workers=0 trains in one process that has no GPU; it needs gpus_per_worker=0 and parallel_runs=1"
            )
        if not self.actors and self.gpus_per_worker:
            raise ValueError("resources.actors=0 scores and evaluates in one process that has no GPU; it needs gpus_per_worker=0")
        if self.workers_per_actor > 1 and not self.actors:
            raise ValueError(
                "resources.workers_per_actor above 1 needs resources.actors of 1 or more: each is a group of so many workers"
            )
        if self.workers_per_actor > 1 and not float(self.gpus_per_worker).is_integer():
            raise ValueError(
                "resources.workers_per_actor above 1 needs a whole gpus_per_worker: a model is not spread over parts of one"
            )
        if self.gpus_per_worker > 1 and not float(self.gpus_per_worker).is_integer():
            raise ValueError("resources.gpus_per_worker above 1 must be a whole number")
        return self
