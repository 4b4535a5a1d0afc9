"""Actors that take units of work."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.runtime.actors import on_actors


class Waiter:
    """Holds every unit, or its own start, until as many actors as there should be have met."""

    def __init__(self, folder: str, actors: int, at_start: bool) -> None:
        self.folder, self.actors = Path(folder), actors
        if at_start:
            self._wait()

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        self._wait()
        return unit | {"actors": len(list(self.folder.iterdir()))}

    def _wait(self) -> None:
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < self.actors and time.monotonic() < end:
            time.sleep(0.05)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("at_start", [False, True])
def test_as_many_actors_work_as_were_asked_for(tmp_path, at_start):
    """Ray Data by itself begins with one, and adds others only where those that are there have enough to do."""
    resources = ResourcesConfig(actors=2, cpus_per_worker=0.5)
    units = [{"number": number} for number in range(6)]
    arguments = {"folder": str(tmp_path), "actors": 2, "at_start": at_start}
    found = list(on_actors(Waiter, arguments, units, attempts=1, resources=resources, what="waiting"))
    assert sorted(one["number"] for one in found) == list(range(6))
    assert {one["actors"] for one in found} == {2}
