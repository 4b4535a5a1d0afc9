"""Trials of a search run side by side in one run directory: what several of them need is made by one, and the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from pharmacist_ray.pipeline.artifacts import Artifact, digest
from pharmacist_ray.pipeline.run import Run

One = TypeVar("One")


@contextmanager
def alone(run: Run, wanted: Iterable[One], folder_of: Callable[[One], Path], ready: Callable[[One], bool]) -> Iterator[list[One]]:
    """Give what of ``wanted`` still has to be made; until the block ends, no other trial makes it.

    All locks are taken in the order of the folders' names, so that trials never wait for each other in a circle. Who waits is the
    trial's own process, which holds no worker and no actor. A process that dies gives its locks back (``flock``, so the run
    directory's file system must have it; NFS 4 does). A plain run is alone in its directory and locks nothing.

    Args:
        run: The run.
        wanted: What to make; ready ones are left alone.
        folder_of: Returns where one lies.
        ready: Whether one is complete; asked again after waiting.
    """
    missing = {folder_of(one): one for one in wanted if not ready(one)}
    with ExitStack() as held:
        for folder in sorted(missing) if run.base else ():
            place = run.root / "search" / ".locks"
            place.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place / f"{folder.name}-{digest(str(folder.relative_to(run.root)))[:8]}.lock")
            lock.acquire()
            if ready(missing[folder]):  # another trial made it while this one waited
                lock.release()
                del missing[folder]
            else:
                held.callback(lock.release)
        yield list(missing.values())


@contextmanager
def making(run: Run, *artifacts: Artifact) -> Iterator[list[Artifact]]:
    """Give the artifacts that still have to be made; see `alone`."""
    with alone(run, artifacts, lambda one: one.folder, lambda one: one.ready) as still:
        yield still
