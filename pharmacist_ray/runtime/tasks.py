"""The same work on each of many items: in tasks of Ray where it is connected, in this process where it is not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import ray

from pharmacist_ray.runtime.actors import plain_errors

T = TypeVar("T")
R = TypeVar("R")

MANY = 1024
"""Items from which on it is worth the start of workers, where an item is a shard: there are as many from a million rows on (ours)."""

AHEAD = 2
"""Tasks that are under way for each CPU of the cluster: one works, one waits (ours)."""

RETRIES = 10
"""Times that a task is done anew after its worker's death (ours: it is seconds of work, and ten machines in a row are hardly lost)."""

TURNS = 4
"""Times that there are as many tasks as are under way: items are done several by one task where there are more (ours)."""


def in_tasks(
    function: Callable[[T], R], items: Iterable[T], *, count: int, fewest: int = MANY, what: str = "this stage"
) -> Iterator[R]:
    """Call a function on each item; yield what it returns, in the order of the items.

    Items are taken when there is room for their tasks, so they may depend on what was yielded before. A task whose worker dies is done
    again: the function does the same whenever it is called with an item. One that raises ends the others, and none is left working.

    Args:
        function: Picklable, and sent once: what all items share is bound to it.
        items: What to call it with.
        count: Their number.
        fewest: Fewer items are done here.
        what: What is being done, for errors.

    Raises:
        ResourceError: Workers died more often than they are replaced.
    """
    if count < fewest or not ray.is_initialized():
        yield from map(function, items)
        return
    under_way: deque[ray.ObjectRef[Any]] = deque()
    shared, most = ray.put(function), AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    at_once, rest = max(1, count // (TURNS * most)), iter(items)
    try:
        with plain_errors(what):
            while some := list(islice(rest, at_once)):
                under_way.append(_done.remote(shared, some))
                if len(under_way) >= most:
                    yield from ray.get(under_way.popleft())
            while under_way:
                yield from ray.get(under_way.popleft())
    finally:
        for task in under_way:
            ray.cancel(task)
        if under_way:
            ray.wait(list(under_way), num_returns=len(under_way))


@ray.remote(num_cpus=1, max_retries=RETRIES)  # type: ignore[untyped-decorator]  # Ray has no types
def _done(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    return list(map(function, items))
