"""Waiting for several things at a time, so that Ctrl-C ends the waiting at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Iterable[T], *, at_a_time: int = 1) -> list[R]:
    """Call a function on each item, in threads, and return the results in the items' order, once all have ended.

    The threads are daemons: an interruption is raised here and may end the program, which would else wait for what they wait for. And
    Ray Train, called in the main thread, would put a handler of its own in the place of Ctrl-C for good, one that ends with code 0.

    Args:
        function: What to do; it waits for something outside this process.
        items: What to do it with.
        at_a_time: Threads.

    Raises whatever the first of the items that failed raised.
    """
    left = deque(enumerate(items))
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}

    def run() -> None:
        while left:
            try:
                number, item = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                results[number] = function(item)
            except BaseException as error:  # noqa: BLE001 - raised again by who waits
                errors[number] = error

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(at_a_time, len(left)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in sorted(results)]
