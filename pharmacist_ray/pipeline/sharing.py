"""Trials of a search run side by side in one run directory: what several of them need is made by one, and the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import ray
from filelock import FileLock

from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.console import escaped, say
from pharmacist_ray.pipeline.run import Run
from pharmacist_ray.storage import StoragePath, relative

One = TypeVar("One")


@contextmanager
def lock_missing(
    run: Run, wanted: Iterable[One], folder_of: Callable[[One], StoragePath], ready: Callable[[One], bool]
) -> Iterator[list[One]]:
    """Give what of ``wanted`` still has to be made; until the block ends, no other trial makes it.

    All locks are taken in the order of the folders' names, so that trials never wait for each other in a circle. Who waits is the
    trial's own process, which holds no worker and no actor. A process that dies gives its locks back, see `_lock`. A plain run is
    alone in its directory and locks nothing.

    Args:
        run: The run.
        wanted: What to make; ready ones are left alone.
        folder_of: Returns where one lies.
        ready: Whether one is complete; asked again after waiting.
    """
    missing = {folder_of(one): one for one in wanted if not ready(one)}
    with ExitStack() as held:
        for folder in sorted(missing) if run.base else ():
            release = _lock(run.root, f"{folder.name}-{digest(str(relative(folder, run.root)))[:8]}")
            if ready(missing[folder]):  # another trial made it while this one waited
                release()
                del missing[folder]
            else:
                held.callback(release)
        yield list(missing.values())


def _lock(root: StoragePath, name: str) -> Callable[[], None]:
    """Wait for a lock and return what gives it back.

    In a folder it is a lock on a file (``flock``, so the file system must have it; NFS 4 does). An object store has none: there the
    lock is an actor's name, which only one process of the cluster can hold, and Ray ends the actor with the process that made it.
    """
    if isinstance(root, Path):
        place = root / "search" / ".locks"
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f"{name}.lock")
        lock.acquire()
        return lock.release
    while True:
        try:
            holder = _Holder.options(name=f"{digest(str(root))}-{name}", namespace="pharmacist", num_cpus=0).remote()  # type: ignore[attr-defined]
        except ValueError:  # the name is taken
            time.sleep(1.0)
            continue
        return lambda: ray.kill(holder)


@ray.remote
class _Holder:
    """Does nothing; that it is there is the lock."""


@contextmanager
def lock_missing_artifacts(run: Run, *artifacts: Artifact) -> Iterator[list[Artifact]]:
    """Give the artifacts that still have to be made; see `lock_missing`."""
    with lock_missing(run, artifacts, lambda one: one.folder, lambda one: one.ready) as still:
        say_why_anew(run, still)
        yield still


def say_why_anew(run: Run, missing: Iterable[Artifact]) -> None:
    """Say why what was made before is made anew, in one line a reason. What a trial makes has no before: its folders are its own."""
    places: dict[str, list[str]] = {}
    for artifact in () if run.base else missing:
        if why := artifact.outdated():
            places.setdefault(why, []).append(str(relative(artifact.folder, run.root)))
    for why, (first, *more) in places.items():
        say(f"  {escaped(first)}{f' and {len(more)} more' if more else ''} made anew: what was there was made {escaped(why)}")
