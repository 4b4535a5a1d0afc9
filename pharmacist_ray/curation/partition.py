"""Rows find their shard by way of files: each piece of the input is written once, sorted by shard, and read again shard by shard.

    tables ─ write_pieces ─ 000007-000.arrow: bucket 0 │ bucket 1 │ …   ─ read_bucket ─ all rows of some neighbouring shards

A piece is one file with a record batch for each bucket, so there are as many files as pieces, however many shards there are, and whoever
runs the tasks keeps track of pieces and of buckets, never of their pairs. Tasks can be done again: the same rows make the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pharmacist_ray.storage import StoragePath, read_batch, write_batches

PIECE_BYTES = 128 << 20
"""Bytes of rows in memory that make a piece (ours: a task holds twice as much while it sorts them)."""

MAX_BUCKETS = 4096
"""Parts of a piece at most; ours: at 10⁹ rows of 500 bytes a bucket is a quarter of a gigabyte, which one task holds, and its share of a
piece 30 KB, which is still worth reading by itself."""


def buckets_of(shards: int) -> int:
    """Return how many buckets the shards are put into, in order."""
    return min(shards, MAX_BUCKETS)


def write_pieces(tables: Iterable[pa.Table], shards: int, buckets: int, folder: StoragePath, name: str) -> list[str]:
    """Write tables as pieces ``folder/NAME-000.arrow`` and so on, and return these names.

    Args:
        tables: Of one schema, with a column ``shard`` of int32; at least one. They are taken one by one.
        shards: Number of shards.
        buckets: Number of buckets, as `buckets_of` has it.
        folder: Where to write.
        name: Of this part of the input; no other has it.
    """
    names: list[str] = []
    pending: list[pa.Table] = []

    def write() -> None:
        names.append(f"{name}-{len(names):03d}.arrow")
        piece = pa.concat_tables(pending).combine_chunks()
        pending.clear()
        bucket = piece["shard"].to_numpy().astype(np.int64) * buckets // shards
        order = np.argsort(bucket, kind="stable")
        piece = piece.take(pa.array(order)).combine_chunks()
        ends = np.searchsorted(bucket[order], np.arange(buckets + 1))
        [whole] = piece.to_batches() or [pa.RecordBatch.from_pylist([], piece.schema)]
        slices = (whole.slice(start, end - start) for start, end in pairwise(ends))
        write_batches(slices, piece.schema, folder / names[-1])

    for table in tables:
        pending.append(table)
        if sum(one.nbytes for one in pending) > PIECE_BYTES:
            write()
    if pending:
        write()
    return names


def read_bucket(bucket: int, *, pieces: Sequence[StoragePath]) -> list[pa.Table]:
    """Return the rows of each of a bucket's shards that has any, as one table a shard, in no order.

    Args:
        bucket: Its number.
        pieces: All pieces.
    """
    with ThreadPoolExecutor(16) as pool:  # an object store takes its time for each
        table = pa.Table.from_batches(pool.map(lambda piece: read_batch(piece, bucket), pieces))
    return [table.filter(pc.equal(table["shard"], shard)) for shard in pc.unique(table["shard"])]
