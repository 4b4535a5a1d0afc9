"""Rows by step: those of a large set that no step takes are never read, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pharmacist_ray.config.schema import TrainConfig
from pharmacist_ray.data.batches import BatchOrder
from pharmacist_ray.data.rows import read_numbered, read_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.models.ref import ModelRef
from pharmacist_ray.runtime.ranks import Ranks
from pharmacist_ray.training.streams import FEW, alignment_stream
from pharmacist_ray.training.task import TrainTask

STEPS, SIZE = 3, 4


@pytest.fixture
def task(model_folder: Path, rows_of: Callable[..., list[Row]], tmp_path: Path) -> TrainTask:
    """Return a task over more rows than its steps take, in two folders that share a row, with replay and weights."""
    rows = rows_of(120, seed=3)
    for number in range(3):
        write_rows(rows[number * 40 : (number + 1) * 40], tmp_path / "set" / f"part-{number}.parquet")
    write_rows(rows[:1], tmp_path / "again" / "part-0.parquet")
    write_rows(rows_of(30, seed=4), tmp_path / "replay" / "part-0.parquet")
    ids = [row.id for row in rows]
    pq.write_table(pa.table({"id": ids, "weight": [1.0 + place for place in range(len(ids))]}), tmp_path / "weights.parquet")
    return TrainTask(
        name="align",
        out=str(tmp_path / "out"),
        model=ModelRef(str(model_folder), template="plain", max_length=32),
        rows=(str(tmp_path / "set"), str(tmp_path / "again")),
        replay=(str(tmp_path / "replay"),),
        replay_share=0.25,
        row_weights=(str(tmp_path / "weights.parquet"),),
        train=TrainConfig(steps=STEPS, batch_size=SIZE),
        seed=5,
    )


def batches(stream: Any, workers: int) -> list[tuple[torch.Tensor, ...]]:
    found = []
    for number in range(STEPS):
        for rank in range(workers):
            micro, _ = stream.step(number, Ranks(rank, workers, torch.device("cpu")), 1)
            found += [(one.input_ids, one.labels, one.weights) for one in micro]
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_rows_that_steps_take_are_read_and_every_batch_is_what_it_was(task: TrainTask, workers: int) -> None:
    renderer = task.model.renderer()
    whole, some = alignment_stream(task, renderer), alignment_stream(task, renderer, steps=STEPS)
    assert FEW * STEPS * SIZE < len(whole) == len(some) == 151
    assert whole.table.num_rows == 151
    assert some.table.num_rows == STEPS * SIZE
    for one, other in zip(batches(whole, workers), batches(some, workers), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for number in range(STEPS):
        assert some.whole(number) == whole.whole(number)
        assert some.ids(number, workers - 1, workers, 1, 0) == whole.ids(number, workers - 1, workers, 1, 0)
    row = some.order.batch(1)[2]
    assert torch.equal(some.single(row).input_ids, whole.single(row).input_ids)


def test_where_steps_take_many_all_are_read_once(task: TrainTask) -> None:
    many = alignment_stream(task, task.model.renderer(), steps=150 // SIZE)
    assert many.table.num_rows == 151


def test_rows_by_their_numbers_are_those_of_the_whole_table(task: TrainTask) -> None:
    whole = read_rows(task.rows, raw=False)
    numbers = [0, 7, 8, 64, 120]
    assert read_numbered(task.rows, numbers) == whole.take(numbers)
    first = [place for place, id in enumerate(whole["id"].to_pylist()) if whole["id"].to_pylist().count(id) == 2]
    assert len(first) == 2  # the row that is there twice
    assert read_numbered(task.rows, first)["id"].to_pylist() == whole.take(first)["id"].to_pylist()


def test_what_steps_take_is_counted_over_epochs() -> None:
    order = BatchOrder(10, 4, seed=1, replay_rows=3, replay_per_batch=1)
    drawn = order.drawn(5)
    assert drawn == sorted({row for step in range(5) for row in order.batch(step)})
    assert set(drawn) == set(range(13))
