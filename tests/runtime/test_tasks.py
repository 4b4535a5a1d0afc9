"""The same work on many items, by Ray's tasks or here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pharmacist_ray.errors import DataError
from pharmacist_ray.runtime.tasks import in_tasks


def squared(item: tuple[int, float]) -> tuple[int, int]:
    number, wait = item
    time.sleep(wait)
    return number * number, os.getpid()


@pytest.mark.usefixtures("ray_local")
def test_results_come_in_the_order_of_the_items_whoever_is_ready_first():
    items = [(0, 1.0), (1, 0.5), (2, 0.0), (3, 0.0)]
    found = list(in_tasks(squared, items, count=4, fewest=2))
    assert [number for number, _ in found] == [0, 1, 4, 9]
    assert os.getpid() not in {process for _, process in found}


@pytest.mark.usefixtures("ray_local")
def test_few_items_are_done_here():
    assert list(in_tasks(squared, [(3, 0.0)], count=1, fewest=2)) == [(9, os.getpid())]
    assert list(in_tasks(squared, [], count=0, fewest=2)) == []
    assert {process for _, process in in_tasks(squared, [(1, 0.0)] * 9, count=9)} == {os.getpid()}


@pytest.mark.usefixtures("ray_local")
def test_items_may_depend_on_what_came_of_earlier_ones(monkeypatch):
    monkeypatch.setattr("pharmacist_ray.runtime.tasks.AHEAD", 1)
    seen: list[int] = []
    told: list[int] = []

    def items() -> Iterator[tuple[int, float]]:
        for number in range(40):
            told.append(len(seen))
            yield number, 0.0

    for number, _ in in_tasks(squared, items(), count=40, fewest=2):
        seen.append(number)
    assert seen == [number * number for number in range(40)]
    assert told == sorted(told)
    assert told[-1] >= 40 - 9  # at most as many are under way as the cluster has CPUs, and a few of those that come first


def slow_or_wrong(number: int, *, folder: str) -> None:
    if number == 0:
        raise DataError("row 7 is broken")
    time.sleep(1.0)
    (Path(folder) / str(number)).touch()


@pytest.mark.usefixtures("ray_local")
def test_an_error_comes_back_as_ours_and_nobody_works_on(tmp_path):
    with pytest.raises(DataError, match=r"^row 7 is broken$"):
        list(in_tasks(partial(slow_or_wrong, folder=str(tmp_path)), range(30), count=30, fewest=2))
    left = len(list(tmp_path.iterdir()))
    time.sleep(2.5)
    assert len(list(tmp_path.iterdir())) == left
    assert left < 29


def dies_once(number: int, *, folder: str) -> int:
    mark = Path(folder) / "died"
    if number == 2 and not mark.exists():
        mark.touch()
        os._exit(1)
    return number


@pytest.mark.usefixtures("ray_local")
def test_what_a_lost_worker_had_in_hand_is_done_again(tmp_path):
    assert list(in_tasks(partial(dies_once, folder=str(tmp_path)), range(6), count=6, fewest=2)) == list(range(6))
    assert (tmp_path / "died").exists()
