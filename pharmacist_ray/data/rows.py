"""Canonical rows on disk: read them, address them, write them atomically."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pharmacist_ray.data.schema import ROW_SCHEMA, Row, rows_from_table, table_from_rows, uniform
from pharmacist_ray.errors import ArtifactError
from pharmacist_ray.storage import StoragePath, matching, opened_parquet, read_table, rows_of_all, storage_path, write_parquet


def parquet_files(path: StoragePath | str) -> list[StoragePath]:
    """Return a Parquet file, or the Parquet files of a folder in name order.

    Raises:
        ArtifactError: There is none.
    """
    found = storage_path(path)
    files = [found] if found.is_file() else matching(found, "*.parquet")
    if not files:
        raise ArtifactError(f"no Parquet files at {found}; run the stage that writes them first")
    return files


def read_rows(paths: Iterable[StoragePath | str], *, raw: bool = True) -> pa.Table:
    """Return canonical rows ordered by id as one table in memory; a row that is there twice counts twice.

    The order makes everything that draws by position a function of the ids alone. Meant for training sets; scoring and selection
    stream instead.

    Args:
        paths: Parquet files or folders of them.
        raw: Also the rows as they came, which are as large again; whoever renders rows needs none of it.
    """
    names = [name for name in ROW_SCHEMA.names if raw or name != "raw"]
    files = [file for path in paths for file in parquet_files(path)]
    return pa.concat_tables([read_table(file, columns=names, schema=ROW_SCHEMA) for file in files]).sort_by("id")


def read_numbered(paths: Sequence[StoragePath | str], numbers: Sequence[int]) -> pa.Table:
    """Return some of the rows of `read_rows`, without ``raw``, in the order of their numbers there.

    Memory holds the ids of all rows, and the rows that are asked for. Of rows with one id, any stands for the others.

    Args:
        paths: Parquet files or folders of them.
        numbers: Places in the order by id.
    """
    files = [file for path in paths for file in parquet_files(path)]
    ids = pa.concat_tables([read_table(file, columns=["id"]) for file in files])["id"]
    wanted = ids.take(pc.sort_indices(ids)).take(pa.array(numbers, pa.int64()))
    names = [name for name in ROW_SCHEMA.names if name != "raw"]
    some = pc.field("id").isin(pc.unique(wanted))
    found = pa.concat_tables([read_table(file, columns=names, schema=ROW_SCHEMA, filters=some) for file in files])
    return found.take(pc.index_in(wanted, value_set=found["id"].combine_chunks()))


def sample_rows(path: StoragePath | str, count: int, seed: int) -> list[Row]:
    """Return at most ``count`` rows, drawn by a hash of id and seed, in the order of that hash.

    The draw depends on neither files nor workers. One pass reads the ids alone, a second one the drawn rows; memory is proportional
    to ``count``.
    """
    best: list[tuple[float, str]] = []
    for file in parquet_files(path):
        with opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(batch_size=65536, columns=["id"]):
                drawn = ((uniform(id, seed), id) for id in batch.column(0).to_pylist())
                best = heapq.nsmallest(count, heapq.merge(best, sorted(drawn)))
    rank = {id: index for index, (_, id) in enumerate(best)}
    wanted = pa.array(list(rank), pa.string())
    rows = []
    for file in parquet_files(path):
        table = read_table(file, schema=ROW_SCHEMA, filters=pc.field("id").isin(wanted))
        rows += rows_from_table(table)
    return sorted(rows, key=lambda row: rank[row.id])


def iterate_rows(path: StoragePath | str) -> Iterator[Row]:
    """Yield the rows of a file or folder, one record batch in memory at a time."""
    for file in parquet_files(path):
        with opened_parquet(file) as parquet:
            for batch in parquet.iter_batches(batch_size=4096):
                yield from rows_from_table(pa.Table.from_batches([batch]))


def row_at(table: pa.Table, index: int) -> Row:
    """Return one row of a table from `read_rows`."""
    return rows_from_table(table.slice(index, 1))[0]


def count_rows(path: StoragePath | str) -> int:
    """Return the number of rows of a file or folder, read from the Parquet footers."""
    return rows_of_all(parquet_files(path))


def write_rows(rows: Sequence[Row], path: StoragePath) -> None:
    """Write canonical rows as one Parquet file, ordered by id."""
    ordered = sorted(rows, key=lambda row: row.id)
    write_parquet(table_from_rows(ordered), path)
