"""What every use of Ray here needs: room to run in, and our own errors back as they were raised."""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.annotations import RayDeprecationWarning

from pharmacist_ray import errors
from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ConfigError, PharmacistError, PluginError, ResourceError
from pharmacist_ray.runtime.ranks import stay_on_cpu

Unit = dict[str, Any]
"""One unit of work, a few plain values: they travel through Ray's object store."""
Done = dict[str, Any]
"""What became of it, plain values too."""

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


GROWTH_S = 1800.0
"""Seconds for which a cluster that scales itself is waited for, unless PHARMACIST_AUTOSCALING_SECONDS says otherwise (ours: a node with
GPUs takes minutes to come, and one that has not come after half an hour is not to be had)."""


def room_for(needed: dict[str, float]) -> int:
    """Return how many workers the cluster can hold at the same time, or could if it grew as it may.

    Args:
        needed: Resource → amount per worker.
    """
    if os.environ.get("PHARMACIST_AUTOSCALING") == "1":
        return sys.maxsize
    total = ray.cluster_resources()
    return min(int(total.get(kind, 0.0) / amount + 1e-9) for kind, amount in needed.items())


def check_room(needed: dict[str, float], count: int, *, setting: str = "workers") -> None:
    """Fail where the cluster cannot hold the workers: at once, or, where it scales itself, when it has not grown in a bounded time.

    Args:
        needed: Resource → amount per worker.
        count: Number of workers at the same time.
        setting: What says how many, in the resources section.

    Raises:
        ResourceError: Says what is asked for and what there is.
        ConfigError: PHARMACIST_AUTOSCALING_SECONDS is no number.
    """
    lacks = _lacking(needed, count)
    if not lacks:
        return
    kind, wanted, there = lacks
    asked = f"{count} workers need {wanted:g} {kind}"
    lower = f"lower resources.{setting} or resources.{kind.lower()}s_per_worker"
    if os.environ.get("PHARMACIST_AUTOSCALING") != "1":
        raise ResourceError(f"{asked} but the cluster has {there:g}; {lower}, or set PHARMACIST_AUTOSCALING=1 if it can grow")
    given = os.environ.get("PHARMACIST_AUTOSCALING_SECONDS", str(GROWTH_S))
    if not re.fullmatch(r"\d+(\.\d+)?", given):
        raise ConfigError(f"PHARMACIST_AUTOSCALING_SECONDS={given} is no number of seconds")
    seconds = float(given)
    sys.stderr.write(f"{asked}, the cluster has {there:g}: waiting up to {seconds:g} s for it to grow\n")
    request_resources(bundles=[needed] * count)  # or nothing would tell the autoscaler: no worker asks before there is room
    try:
        end = time.monotonic() + seconds
        while lacks := _lacking(needed, count):
            if time.monotonic() > end:
                raise ResourceError(
                    f"{asked} but the cluster has {lacks[2]:g} and did not grow within {seconds:g} s; {lower}, look at what keeps nodes "
                    "away (`ray status`), or wait longer by PHARMACIST_AUTOSCALING_SECONDS; what is finished is kept"
                )
            time.sleep(min(2.0, seconds / 10))
    finally:
        request_resources(bundles=[])  # what is idle may go again


def _lacking(needed: dict[str, float], count: int) -> tuple[str, float, float] | None:
    """Return the first resource of which there is too little, how much is wanted and how much there is."""
    total = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount * count > total.get(kind, 0.0) + 1e-9:
            return kind, amount * count, total.get(kind, 0.0)
    return None


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
        found = list(re.finditer(r"^pharmacist_ray\.errors\.(\w+): (.+)$", str(error), re.MULTILINE))
        if found:
            own: PharmacistError = getattr(errors, found[-1][1])(found[-1][2])
            if isinstance(own, PluginError):
                own.add_note(str(error)[found[-1].end() :].strip())
            raise own from None
        if isinstance(error, _GONE):
            why = " ".join(str(error).split())[:300]
            raise ResourceError(
                f"{what}: worker processes died again and again ({why}); look at the machines' memory, then run the same command "
                "again: what is finished is kept"
            ) from error
        raise


def on_actors(
    kind: Callable[..., Callable[[Unit], Done]],
    arguments: dict[str, Any],
    units: Sequence[Unit],
    *,
    attempts: int,
    resources: ResourcesConfig,
    what: str,
) -> Iterator[Done]:
    """Have stateless actors of Ray Data do units of work; yield what became of each, as soon as it is done.

    Ray Data by default retries and restarts for ever, and a unit that ends every process would go round and round; and the first
    machine that goes away while an actor starts would end the run. Both are bounded here. An actor may die as often as all units
    together, for it may be given them all.

    Without actors (``resources.actors=0``) the units are done here, one after the other, and nothing begins them anew.

    Args:
        kind: Class of the actors; called with a unit, it returns what became of it.
        arguments: What it is made from.
        units: At least one.
        attempts: How often a unit is begun anew after its actor died.
        resources: Actors and what each may use.
        what: What is being done, for errors.

    Raises:
        ResourceError: The cluster has no room for an actor, or actors died more often than they are replaced.
    """
    if not resources.actors:
        stay_on_cpu()
        yield from map(kind(**arguments), units)
        return
    check_room(per_worker(resources), 1)
    many = min(resources.actors, len(units))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # Ray Data has no other name for an actor's retries yet
        work = ray.data.from_items(list(units), override_num_blocks=len(units)).map(
            kind,
            fn_constructor_kwargs=arguments,
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
            # One unit at a time: Ray Data would queue two at each actor, and the first ones would hoard what later ones could do.
            # All begin at once where there is room for them: else the second would load its model when the first has.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=1 if _lacking(per_worker(resources), many) else many,
                max_size=many,
                max_tasks_in_flight_per_actor=1,
            ),
            max_task_retries=attempts,
            max_restarts=attempts * len(units),
        )
    work.context.max_consecutive_actor_init_deaths = 10  # in a row; these are a broken environment (ours)
    # Ray Data adds an actor when those there are have this many units each; with one at a time its own 1.75 is never reached.
    work.context.autoscaling_config = replace(work.context.autoscaling_config, actor_pool_util_upscaling_threshold=1.0)
    with plain_errors(what):
        yield from work.iter_rows()
