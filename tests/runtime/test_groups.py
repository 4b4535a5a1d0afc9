"""Groups of workers that do units together: each unit once, whatever becomes of a group."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pharmacist_ray.config.schema import ResourcesConfig
from pharmacist_ray.errors import DataError, ResourceError
from pharmacist_ray.runtime.actors import room_for
from pharmacist_ray.runtime.groups import WorkList, on_groups
from pharmacist_ray.runtime.ranks import Ranks

TWO = ResourcesConfig(actors=2, workers_per_actor=2, cpus_per_worker=0.25)


class Adder:
    """Adds up over a group what each of its workers makes of a unit."""

    def __init__(self, folder: str, group: Ranks) -> None:
        self.folder, self.group = Path(folder), group

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        number = unit["number"]
        mark = self.folder / f"died-{number}"
        if unit.get("dies") and self.group.rank == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
        if unit.get("raises") and self.group.rank == 1:
            raise DataError(f"unit {number} is broken")
        total = self.group.total(torch.tensor([float(number * (self.group.rank + 1))]))
        time.sleep(0.05)
        return {"number": number, "total": float(total), "process": os.getpid()}


def done(units: list[dict[str, Any]], tmp_path: Path, **changed: Any) -> list[dict[str, Any]]:
    how: dict[str, Any] = {"attempts": 2, "resources": TWO, "what": "adding", "storage": tmp_path / "ray", **changed}
    return list(on_groups(Adder, {"folder": str(tmp_path)}, units, **how))


@pytest.mark.usefixtures("ray_local")
def test_each_unit_is_done_once_by_a_whole_group_that_stays_up_and_one_that_dies_costs_only_time(tmp_path: Path) -> None:
    units = [{"number": number, "dies": number == 3} for number in range(8)]
    found = done(units, tmp_path)
    assert sorted(one["number"] for one in found) == list(range(8))
    assert all(one["total"] == 3 * one["number"] for one in found)
    assert (tmp_path / "died-3").exists()
    assert 2 <= len({one["process"] for one in found}) <= 3  # two groups, and the one that took the place of the first


@pytest.mark.usefixtures("ray_local")
def test_an_error_of_ours_ends_it_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^unit 1 is broken$"):
        done([{"number": 1, "raises": True}], tmp_path)


@pytest.mark.usefixtures("ray_local")
def test_a_group_that_cannot_fit_is_said_at_once(tmp_path: Path) -> None:
    much = ResourcesConfig(actors=1, workers_per_actor=1000)
    with pytest.raises(
        ResourceError, match=r"1000 workers need 1000 CPU but .* lower resources.workers_per_actor or resources.cpus_per"
    ):
        done([{"number": 1}], tmp_path, resources=much)


@pytest.mark.usefixtures("ray_local")
def test_room_is_counted_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 7.0, "GPU": 2.0})
    assert [room_for(needed) for needed in ({"CPU": 1.0}, {"CPU": 0.1}, {"CPU": 2.0, "GPU": 1.0})] == [7, 70, 2]


def test_a_group_that_begins_again_begins_with_what_it_had_in_hand() -> None:
    work = WorkList([{"number": 0}, {"number": 1}, {"number": 2}])
    assert [work.take(group) for group in (0, 1, 0, 1)] == [{"number": number} for number in (0, 1, 0, 1)]
    work.finish(0, {"done": 0})
    assert work.take(0) == {"number": 2}
    work.finish(1, {"done": 1})
    assert work.take(1) is None
    assert (work.done_since(0), work.done_since(1)) == ([{"done": 0}, {"done": 1}], [{"done": 1}])
    work.close()
    assert work.take(0) == {"number": 2}  # it may finish that
