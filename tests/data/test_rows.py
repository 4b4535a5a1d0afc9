from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pharmacist_ray.data.rows import (
    count_rows,
    iterate_rows,
    parquet_files,
    read_rows,
    row_at,
    sample_rows,
    write_rows,
)  # fmt: skip
from pharmacist_ray.data.schema import ROW_SCHEMA, Row, rows_from_table, table_from_rows, uniform
from pharmacist_ray.errors import ArtifactError

Rows = Callable[..., list[Row]]


def _scatter(rows: list[Row], folder: Path, files: int, seed: int) -> Path:
    """Write rows in a random order over some files with small row groups."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    folder.mkdir()
    for number in range(files):
        pq.write_table(table_from_rows(shuffled[number::files]), folder / f"part-{number}.parquet", row_group_size=3)
    return folder


def test_a_sample_depends_on_the_ids_and_the_seed_alone(rows_of: Rows, tmp_path: Path):
    rows = rows_of(60)
    one, two = _scatter(rows, tmp_path / "one", 1, 1), _scatter(rows, tmp_path / "two", 5, 2)
    expected = sorted(rows, key=lambda row: uniform(row.id, 7))
    for count in (1, 10, 60):
        assert sample_rows(one, count, 7) == sample_rows(two, count, 7) == expected[:count]
    assert sample_rows(two, 10, 8) != expected[:10]


def test_a_sample_has_at_most_the_rows_there_are_and_more_rows_keep_their_order(rows_of: Rows, tmp_path: Path):
    folder = _scatter(rows_of(12), tmp_path / "x", 3, 0)
    assert len(sample_rows(folder, 100, 0)) == 12
    assert sample_rows(folder, 0, 0) == []
    assert sample_rows(folder, 5, 0) == sample_rows(folder, 9, 0)[:5]


def test_reading_orders_by_id_and_a_row_that_is_there_twice_counts_twice(rows_of: Rows, tmp_path: Path):
    rows = rows_of(20)
    one, two = _scatter(rows[:15], tmp_path / "a", 2, 0), _scatter(rows[10:], tmp_path / "b", 2, 0)
    table = read_rows([two, one])
    twice = sorted([*rows[:15], *rows[10:]], key=lambda row: row.id)
    assert rows_from_table(table) == twice
    assert len(twice) == 25
    assert table.schema == ROW_SCHEMA
    assert row_at(table, 3) == twice[3]
    lean = read_rows([two, one], raw=False)
    assert "raw" not in lean.column_names
    assert rows_from_table(lean) == [replace(row, raw="") for row in twice]
    assert row_at(lean, 3) == replace(twice[3], raw="")
    assert rows_from_table(read_rows([one / "part-1.parquet"])) == sorted(
        rows_from_table(pq.read_table(one / "part-1.parquet")), key=lambda row: row.id
    )


def test_rows_are_counted_and_iterated_in_file_order(rows_of: Rows, tmp_path: Path):
    rows = rows_of(11)
    folder = _scatter(rows, tmp_path / "x", 3, 0)
    assert count_rows(folder) == 11
    assert count_rows(folder / "part-0.parquet") == 4
    assert [row.id for row in iterate_rows(folder)] == [
        row.id for file in parquet_files(folder) for row in rows_from_table(pq.read_table(file))
    ]


def test_a_folder_without_files_says_what_to_do(tmp_path: Path):
    for read in (count_rows, parquet_files, lambda path: sample_rows(path, 1, 0), lambda path: read_rows([path])):
        with pytest.raises(ArtifactError, match=f"no Parquet files at {tmp_path}; run the stage that writes them first"):
            read(tmp_path)


def test_written_rows_are_ordered_by_id_so_the_same_rows_are_the_same_bytes(rows_of: Rows, tmp_path: Path):
    rows = rows_of(9)
    write_rows(rows, tmp_path / "deep" / "er" / "a.parquet")
    write_rows(rows[::-1], tmp_path / "b.parquet")
    assert (tmp_path / "deep" / "er" / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert [row.id for row in iterate_rows(tmp_path / "b.parquet")] == sorted(row.id for row in rows)


def test_extra_columns_of_a_file_do_not_disturb(rows_of: Rows, tmp_path: Path):
    row = replace(rows_of(1)[0], category="c")
    pq.write_table(table_from_rows([row]).append_column("score", [[0.5]]), tmp_path / "x.parquet")
    assert list(iterate_rows(tmp_path)) == [row]
    assert sample_rows(tmp_path, 1, 0) == [row]
