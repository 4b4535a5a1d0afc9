from __future__ import annotations

from collections import Counter

import pytest

from pharmacist_ray.data.batches import BatchOrder


def test_every_epoch_holds_every_row_once_also_where_epochs_do_not_divide_into_batches() -> None:
    order = BatchOrder(rows=10, batch_size=4, seed=3)
    drawn = [row for step in range(5) for row in order.batch(step)]
    assert Counter(drawn[:10]) == Counter(range(10)) == Counter(drawn[10:20])
    assert drawn[:10] != drawn[10:20]


@pytest.mark.parametrize(("workers", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3)])
def test_workers_and_accumulation_only_divide_the_batch(workers: int, accumulation: int) -> None:
    order = BatchOrder(rows=50, batch_size=12, seed=0)
    parts = [order.micro_batches(7, rank=rank, workers=workers, accumulation=accumulation) for rank in range(workers)]
    assert {len(micro) for part in parts for micro in part} == {12 // (workers * accumulation)}
    assert all(len(part) == accumulation for part in parts)
    batch = order.batch(7)
    assert sorted(row for part in parts for micro in part for row in micro) == sorted(batch)
    for rank, part in enumerate(parts):
        places = order.micro_batches(7, rank=rank, workers=workers, accumulation=accumulation, places=True)
        assert [[batch[place] for place in micro] for micro in places] == part


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    asked_in_order, asked_at_once = BatchOrder(9, 4, seed=1), BatchOrder(9, 4, seed=1)
    assert [asked_in_order.batch(step) for step in range(6)][5] == asked_at_once.batch(5)
    assert asked_at_once.batch(5) != BatchOrder(9, 4, seed=2).batch(5)


def test_every_batch_has_the_same_share_of_replay_whatever_the_main_set() -> None:
    for rows in (7, 100):
        order = BatchOrder(rows, batch_size=10, seed=0, replay_rows=6, replay_per_batch=3)
        batches = [order.batch(step) for step in range(8)]
        assert {sum(row >= rows for row in batch) for batch in batches} == {3}
        assert Counter(row for batch in batches[:2] for row in batch if row >= rows) == Counter(range(rows, rows + 6))
    assert BatchOrder(7, 10, 0, 6, 3).batch(4)[7:] == [row - 93 for row in BatchOrder(100, 10, 0, 6, 3).batch(4)[7:]]
