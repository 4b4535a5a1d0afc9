"""Canonical rows on disk: read them, address them, write them atomically."""

from __future__ import annotations

import errno
import heapq
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pharmacist_ray.data.schema import ROW_SCHEMA, Row, rows_from_table, table_from_rows, uniform
from pharmacist_ray.errors import ArtifactError, PharmacistError, ResourceError


def parquet_files(path: Path | str) -> list[Path]:
    """Return a Parquet file, or the Parquet files of a folder in name order.

    Raises:
        ArtifactError: There is none.
    """
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.parquet"))
    if not files:
        raise ArtifactError(f"no Parquet files at {place}; run the stage that writes them first")
    return files


def read_rows(paths: Iterable[Path | str]) -> pa.Table:
    """Return canonical rows ordered by id as one table in memory; a row that is there twice counts twice.

    The order makes everything that draws by position a function of the ids alone. Meant for training sets; scoring and selection
    stream instead.

    Args:
        paths: Parquet files or folders of them.
    """
    return pa.concat_tables([pq.read_table(file, schema=ROW_SCHEMA) for path in paths for file in parquet_files(path)]).sort_by(
        "id"
    )


def sample_rows(path: Path | str, count: int, seed: int) -> list[Row]:
    """Return at most ``count`` rows, drawn by a hash of id and seed, in the order of that hash.

    The draw depends on neither files nor workers. One pass reads the ids alone, a second one the drawn rows; memory is proportional
    to ``count``.
    """
    best: list[tuple[float, str]] = []
    for file in parquet_files(path):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=65536, columns=["id"]):
                drawn = ((uniform(id, seed), id) for id in batch.column(0).to_pylist())
                best = heapq.nsmallest(count, heapq.merge(best, sorted(drawn)))
    place = {id: index for index, (_, id) in enumerate(best)}
    wanted = pa.array(list(place), pa.string())
    rows = []
    for file in parquet_files(path):
        table = pq.read_table(file, schema=ROW_SCHEMA, filters=pc.field("id").isin(wanted))
        rows += rows_from_table(table)
    return sorted(rows, key=lambda row: place[row.id])


def iterate_rows(path: Path | str) -> Iterator[Row]:
    """Yield the rows of a file or folder, one record batch in memory at a time."""
    for file in parquet_files(path):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=4096):
                yield from rows_from_table(pa.Table.from_batches([batch]))


def row_at(table: pa.Table, index: int) -> Row:
    """Return one row of a table from `read_rows`."""
    return rows_from_table(table.slice(index, 1))[0]


def count_rows(path: Path | str) -> int:
    """Return the number of rows of a file or folder, read from the Parquet footers."""
    return sum(int(pq.read_metadata(file).num_rows) for file in parquet_files(path))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table so that no reader ever sees half of it: under another name first, then renamed."""
    with _replacing(path) as temporary:
        pq.write_table(table, temporary)


def write_text(text: str, path: Path) -> None:
    """Write a small text file so that no reader ever sees half of it."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write canonical rows as one Parquet file, ordered by id."""
    ordered = sorted(rows, key=lambda row: row.id)
    write_parquet(table_from_rows(ordered), path)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it takes the place of ``path`` if the block succeeds, and is removed if it fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say in one line what to do when there is no room to write; whatever library writes.

    Args:
        path: What is written, for the message.

    Raises:
        ResourceError: The disk is full, a quota is used up, or a file may not grow as large.
    """
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        raise ResourceError(
            f"no space is left to write {path}; free some, then run the same command again: it goes on"
        ) from error


def no_room(error: Exception) -> bool:
    """Say whether an error means that a disk is full; Arrow and safetensors have it in their text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    known = isinstance(error, OSError) and error.errno in numbers
    return known or (not isinstance(error, PharmacistError) and any(os.strerror(number) in str(error) for number in numbers))
