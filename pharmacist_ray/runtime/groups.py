"""Groups of workers, each of which does units of work together: what actors are where a model fits none of them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import ResourceError
from pharmacist_ray.runtime.actors import Done, Unit, check_room, per_worker, plain_errors, room_for
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.runtime.threads import side_by_side
from pharmacist_ray.runtime.workers import run_on_workers
from pharmacist_ray.storage import StoragePath

LOOK_EVERY_S = 0.2
"""Seconds between two looks at what the groups have done."""


def on_groups(
    kind: Callable[..., Callable[[Unit], Done]],
    arguments: dict[str, Any],
    units: Sequence[Unit],
    *,
    attempts: int,
    resources: ResourcesConfig,
    what: str,
    storage: StoragePath,
) -> Iterator[Done]:
    """Have groups of workers do units of work, as `on_actors` has actors; yield what became of each, as soon as it is done.

    A group is a Ray Train worker group that stays up over units. Each takes the next unit from one list, so that a slow one holds nobody
    up. A worker that dies costs its group the unit in hand: the group begins again, and with that unit.

    Args:
        kind: Called as in `on_actors` by every worker of a group, with the same unit at the same time; ``group`` (`Ranks`) is given to it
            besides ``arguments``. What the first worker returns is kept.
        arguments: What it is made from.
        units: At least one.
        attempts: How often a unit is begun anew after its group ended.
        resources: ``actors`` groups of ``workers_per_actor`` workers, or as many as the cluster has room for.
        what: What is being done, for errors.
        storage: Folder for Ray Train's own files, reachable by all nodes.

    Raises:
        PharmacistError: What the work raised.
        ResourceError: The cluster has no room for a group.
        TrainingError: Groups ended more often than they begin anew.
    """
    size, needed = resources.workers_per_actor, per_worker(resources)
    check_room(needed, size, setting="workers_per_actor")
    groups = min(resources.actors, len(units), max(1, room_for(needed) // size))
    of_group = resources.model_copy(update={"workers": size, "max_failures": attempts * len(units)})
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # it lives and dies with who asks
    name = f"{what}-{uuid.uuid4().hex[:8]}"
    work = ray.remote(WorkList).options(name=name, num_cpus=0, scheduling_strategy=here).remote(list(units))  # type: ignore[attr-defined]
    ended: list[BaseException | None] = []

    def run(group: int) -> None:
        payload = (kind, arguments, name, group)
        run_on_workers(_serve, payload, name=f"{what}-{group}", storage=storage / f"group-{group}", resources=of_group)

    def run_all() -> None:
        try:
            side_by_side(run, range(groups), at_a_time=groups)
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again below
            ended.append(error)

    thread = threading.Thread(target=run_all, daemon=True)
    thread.start()
    seen = 0
    try:
        with plain_errors(what):
            while True:
                last = bool(ended)  # looked at first, so that what is done by then is all there is
                done = ray.get(work.done_since.remote(seen))
                yield from done
                seen += len(done)
                if last:
                    break
                thread.join(LOOK_EVERY_S)
    finally:
        work.close.remote()  # where nobody asks any more, groups end with what they have in hand
    if ended[0] is not None:
        raise ended[0]
    if seen < len(units):
        raise ResourceError(
            f"{what}: its groups ended with {len(units) - seen} of {len(units)} units undone; run the same command again"
        )


class WorkList:
    """What is to be done, who does it, and what became of it; an actor beside the driver."""

    def __init__(self, units: list[Unit]) -> None:
        """Begin with nothing done."""
        self.left = units[::-1]
        self.in_hand: dict[int, Unit] = {}
        self.done: list[Done] = []

    def take(self, group: int) -> Unit | None:
        """Return the unit that a group has in hand, as after its end, or else the next one; None: nothing is left."""
        if group not in self.in_hand and self.left:
            self.in_hand[group] = self.left.pop()
        return self.in_hand.get(group)

    def finish(self, group: int, done: Done) -> None:
        """Note what became of a group's unit."""
        del self.in_hand[group]
        self.done.append(done)

    def done_since(self, seen: int) -> list[Done]:
        """Return what was done after so many units."""
        return self.done[seen:]

    def close(self) -> None:
        """Hand out nothing more."""
        self.left.clear()


def _serve(payload: tuple[Callable[..., Callable[[Unit], Done]], dict[str, Any], str, int], ranks: Ranks) -> None:
    """Do units with the other workers of a group until none is left."""
    kind, arguments, name, group = payload
    work = ray.get_actor(name) if ranks.first else None
    do = kind(**arguments, group=ranks)
    while (unit := ranks.share(ray.get(work.take.remote(group)) if work else None)) is not None:
        done = do(unit)
        if work:
            ray.get(work.finish.remote(group, done))
