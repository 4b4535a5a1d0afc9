"""Many training runs on worker groups side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.runtime.imports import importing
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.threads import side_by_side
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import StoragePath
from pharmacist_ray.training.task import TrainTask


def train_all(tasks: Sequence[TrainTask], *, name: str, storage: StoragePath, resources: ResourcesConfig) -> list[dict[str, Any]]:
    """Run training tasks, ``resources.parallel_runs`` worker groups side by side, each taking its share one after the other.

    One group for many tasks, because starting a group takes longer than a small training run. At ZeRO 3 each task gets a group of its
    own: DeepSpeed never lets go of a model that it has sharded, and the next one would need its room.

    Args:
        tasks: Independent tasks.
        name: Names the Ray Train runs.
        storage: Folder for Ray Train's own files.
        resources: Workers per group, groups at a time.

    Returns:
        The tasks' results in their order.
    """
    at_a_time = min(resources.parallel_runs, len(tasks))
    sharded = any(task.train.zero_stage == 3 for task in tasks)
    groups = [[task] for task in tasks] if sharded else [list(tasks[first::at_a_time]) for first in range(at_a_time)]

    def run_group(numbered: tuple[int, list[TrainTask]]) -> list[dict[str, Any]]:
        number, group = numbered
        done: list[dict[str, Any]] = run_on_workers(
            run_tasks, group, name=f"{name}-{number}", storage=storage, resources=resources
        )
        return done

    outcomes = side_by_side(run_group, enumerate(groups), at_a_time=at_a_time)
    by_name = {result["name"]: result for outcome in outcomes for result in outcome}
    return [by_name[task.name] for task in tasks]


def run_tasks(tasks: Sequence[TrainTask], ranks: Ranks) -> list[dict[str, Any]]:
    """Run training tasks one after the other on this worker group."""
    with importing():
        from pharmacist_ray.training.loop import run_task  # with DeepSpeed, which only workers need

    return [run_task(task, ranks) for task in tasks]
