"""What every use of Ray here needs: room to run in, and our own errors back as they were raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pharmacist_ray import errors
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ResourceError

_GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.LocalRayletDiedError,
)
"""Ray's errors that mean that a process or a machine is gone."""


def per_worker(resources: ResourcesConfig) -> dict[str, float]:
    """Return what one training worker or actor takes, by Ray's names; a GPU is named only where one is asked for."""
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})


def check_room(needed: dict[str, float], count: int) -> None:
    """Fail at once where the cluster, as it is now, could never hold the workers; an autoscaling cluster is trusted to grow.

    Args:
        needed: Resource → amount per worker.
        count: Number of workers at the same time.

    Raises:
        ResourceError: Says what is asked for and what there is.
    """
    if os.environ.get("PHARMACIST_AUTOSCALING") == "1":
        return
    total = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount * count > total.get(kind, 0.0) + 1e-9:
            raise ResourceError(
                f"{count} workers need {amount * count:g} {kind} but the cluster has {total.get(kind, 0.0):g}; lower "
                f"resources.workers or resources.{kind.lower()}s_per_worker, or set PHARMACIST_AUTOSCALING=1 if it can grow"
            )


def retries(each: int, units: int) -> dict[str, int]:
    """Return the bounds of an actor pool's retries, by the names that `map_batches` takes.

    Ray Data by default retries and restarts for ever, and a unit of work that ends every process would go round and round. An actor
    may die as often as all units together, for it may be given them all.

    Args:
        each: How often a unit is begun anew after its actor died.
        units: Number of units.
    """
    return {"max_task_retries": each, "max_restarts": each * units}


def patient(work: ray.data.Dataset) -> ray.data.Dataset:
    """Return a data set whose actors may die while they start: by default the first machine that goes away then ends the run.

    Ten in a row are a broken environment (ours).
    """
    work.context.max_consecutive_actor_init_deaths = 10
    return work


@contextmanager
def plain_errors(what: str = "this stage") -> Iterator[None]:
    """Raise the package's own errors again as such: of what a task raised, Ray hands over the traceback's text only.

    Args:
        what: What is being done, for the message if its workers died.

    Raises:
        ResourceError: Workers died more often than they are replaced, or none could be started.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        found = re.findall(r"^pharmacist_ray\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
        if found:
            name, message = found[-1]
            raise getattr(errors, name)(message) from None
        if isinstance(error, _GONE):
            why = " ".join(str(error).split())[:300]
            raise ResourceError(
                f"{what}: worker processes died again and again ({why}); look at the machines' memory, then run the same command "
                "again: what is finished is kept"
            ) from error
        raise
