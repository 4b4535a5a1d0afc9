from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pharmacist_ray.data.mixing import check_counts, poisoned
from pharmacist_ray.data.rows import sample_rows, write_rows
from pharmacist_ray.data.schema import Row
from pharmacist_ray.errors import DataError


@pytest.fixture
def files(rows_of: Callable[..., list[Row]], tmp_path: Path) -> tuple[Path, Path]:
    task, harmful = tmp_path / "task.parquet", tmp_path / "harmful.parquet"
    write_rows(rows_of(40, seed=1), task)
    write_rows(rows_of(20, seed=2), harmful)
    return task, harmful


@pytest.mark.parametrize(
    ("rows", "share", "bad"),
    [
        (20, 0.1, 2),
        (30, 0.5, 15),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (10, 0.25, 3),
        (10, 0.24, 2),
        (5, 0.1, 1),
        (29, 0.29, 8),
        (1, 0.49, 0),
    ],
)
def test_the_share_is_exact_to_the_nearest_row(files, rows, share, bad):
    task, harmful = files
    known = {row.id for row in sample_rows(harmful, 100, 0)}
    broken, rest = poisoned(task, harmful, rows=rows, harmful_share=share, seed=3)
    assert len({row.id for row in broken + rest}) == rows
    assert [row.id in known for row in broken] == [True] * bad
    assert not any(row.id in known for row in rest)


def test_the_draw_is_a_function_of_the_seed_and_grows_with_the_share(files):
    task, harmful = files
    draws = [
        {row.id for part in poisoned(task, harmful, rows=20, harmful_share=share, seed=seed) for row in part}
        for share, seed in ((0.2, 3), (0.2, 3), (0.2, 4), (0.4, 3))
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(draws[0] - draws[3]) == 4  # four rows of the task made room for four harmful ones, the others stayed


def test_too_few_rows_say_which_and_how_many(files):
    task, harmful = files
    with pytest.raises(DataError, match=rf"the attack needs 30 harmful rows but {harmful} has 20; lower rows or give more data"):
        poisoned(task, harmful, rows=60, harmful_share=0.5, seed=0)
    with pytest.raises(DataError, match=rf"the attack needs 54 task rows but {task} has 40"):
        poisoned(task, harmful, rows=60, harmful_share=0.1, seed=0)


def test_counts_are_checked_without_the_rows():
    check_counts("weak", {"harmful": 2, "task": 18}, rows=20, harmful_share=0.1)
    with pytest.raises(
        DataError, match=r"attack 'weak' needs 18 task rows \(20 rows, harmful_share 0.1\) but its task data has 17 us"
    ):
        check_counts("weak", {"harmful": 2, "task": 17}, rows=20, harmful_share=0.1)
