"""Near-duplicates share a quota: of rows that say nearly the same, at most so many can be kept, the best ones.

A row is the set of its runs of `SHINGLE` words, prompt and answer together. MinHash (Broder 1997) gives `BANDS` signatures of it,
each of `ROWS` minima. Two rows share a signature with the chance J^`ROWS`, J being the part of runs that they have in common, and
any of the four in 99 of 100 cases for J = 0.9, in 23 for J = 0.5 and in 3 for J = 0.3. Rows with the same signature are a group, and
a row that is not among the best of each of its groups is left out. No two rows are compared with each other, and the result is a
function of texts, scores and ids.

Signatures are found once: they are kept beside the rows, for other selections. On the way to their groups they go through files, 240 bytes
a row, as rows do on the way to their shards (see `partition`), in parts that fit into memory. In memory are a few shards or parts, and a
bit a row.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.curation.partition import PIECE_BYTES, buckets_of, read_bucket, write_pieces
from pharmacist_ray.curation.scored import Ranking, Shard, read_scored
from pharmacist_ray.curation.topk import KEY_BYTES
from pharmacist_ray.runtime.tasks import in_tasks
from pharmacist_ray.storage import (
    StoragePath,
    disk_full_errors,
    opened_parquet,
    read_table,
    remove_tree,
    rows_of_all,
    write_parquet,
)

BANDS = 4
"""Signatures of a row (ours)."""

ROWS = 4
"""Minima of a signature (ours)."""

SHINGLE = 3
"""Words of a run; a shorter text is one run (ours)."""

KEPT = "signatures"
"""Folder of the signatures, beside that of the rows."""

PART = 1 << 20
"""Signatures of a part, more or less: 60 MB."""

_WORDS = re.compile(r"\w+")
_BATCH = 1024  # rows
_RECORD_BYTES = 4 + 8 + KEY_BYTES + 4 + 4


def within_quota(shards: Sequence[Shard], ranking: Ranking, most: int, scratch: StoragePath | None = None) -> list[Shard]:
    """Return the shards with the rows marked that are left out.

    Args:
        shards: All shards.
        ranking: Says which rows of a group are the best; ties are broken by id.
        most: At most so many rows of a group stay.
        scratch: A folder for files on the way, where Ray's tasks reach it; it is removed. None: this process does it all.

    Raises:
        ResourceError: The disk is full.
    """
    left_out: list[NDArray[np.uint8]] = []  # a bit a row
    rows = rows_of_all(shard.rows for shard in shards)
    parts = max(1, math.ceil(rows * BANDS / PART))
    lots = np.array_split(np.arange(len(shards)), min(len(shards), max(1, rows * BANDS * _RECORD_BYTES // PIECE_BYTES)))
    with tempfile.TemporaryDirectory() if scratch is None else nullcontext(scratch) as place:
        folder = Path(place) if isinstance(place, str) else place
        tasks = partial(in_tasks, fewest=sys.maxsize if scratch is None else 1, what="the search for near-duplicates")
        pieces: list[StoragePath] = []
        with disk_full_errors(folder):
            write = partial(_write_lot, shards=list(shards), ranking=ranking, parts=parts, folder=folder)
            for names, counts in tasks(write, lots, count=len(lots)):
                pieces += [folder / name for name in names]
                left_out += [np.zeros(-(-count // 8), np.uint8) for count in counts]
            buckets = range(buckets_of(parts))
            for beyond in tasks(partial(_beyond_in, pieces=pieces, most=most), buckets, count=len(buckets)):
                for number in np.unique(beyond[0]):
                    row = beyond[1][beyond[0] == number]
                    np.bitwise_or.at(left_out[number], row >> 3, (128 >> (row & 7)).astype(np.uint8))
    if scratch is not None:
        remove_tree(scratch)
    return [replace(shard, left_out=bits) for shard, bits in zip(shards, left_out, strict=True)]


def signatures(texts: Sequence[str]) -> NDArray[np.uint64]:
    """Return the signatures of texts, (n, bands)."""
    found = np.empty((len(texts), BANDS), np.uint64)
    for number, text in enumerate(texts):
        words = _WORDS.findall(text.lower())
        runs = {" ".join(words[first : first + SHINGLE]) for first in range(max(1, len(words) - SHINGLE + 1))}
        hashes = np.array([_hash(run) for run in runs], np.uint64)
        minima = (hashes[:, None] * _FACTORS + _TERMS).min(axis=0).reshape(BANDS, ROWS)
        found[number] = (minima * _FACTORS[:ROWS]).sum(axis=1, dtype=np.uint64) + np.arange(BANDS, dtype=np.uint64)
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


_FACTORS = np.array([_hash(f"factor {number}") | 1 for number in range(BANDS * ROWS)], np.uint64)
_TERMS = np.array([_hash(f"term {number}") for number in range(BANDS * ROWS)], np.uint64)


def signatures_of(rows: StoragePath) -> tuple[pa.Array, NDArray[np.uint64]]:
    """Return the ids of a shard's rows and their signatures, (n, bands): those that are kept beside the rows, or new ones, which then are.

    Ids are made of the texts, so signatures of the same ids are the same; those of others, from an earlier ingestion, are not taken.

    Args:
        rows: The shard's file.
    """
    ids = read_table(rows, columns=["id"])["id"].combine_chunks()
    mark = (
        hashlib.blake2b("\n".join([f"{BANDS} {ROWS} {SHINGLE}", *ids.to_pylist()]).encode(), digest_size=16).hexdigest().encode()
    )
    kept = rows.parent.with_name(KEPT) / rows.name
    if kept.exists():
        table = read_table(kept)
        if (table.schema.metadata or {}).get(b"of") == mark:
            return ids, np.column_stack([column.to_numpy() for column in table.columns])
    found = signatures(list(_texts(rows)))
    columns = {f"band_{band}": found[:, band] for band in range(BANDS)}
    write_parquet(pa.table(columns).replace_schema_metadata({"of": mark}), kept)
    return ids, found


def _texts(rows: StoragePath) -> Iterator[str]:
    """Yield prompt and answer of each of a shard's rows."""
    with opened_parquet(rows) as file:
        for batch in file.iter_batches(_BATCH, columns=["prompt", "input", "response"]):
            yield from map("\n".join, zip(*(batch[name].to_pylist() for name in ("prompt", "input", "response")), strict=True))


def _write_lot(
    lot: NDArray[np.int64], *, shards: Sequence[Shard], ranking: Ranking, parts: int, folder: StoragePath
) -> tuple[list[str], list[int]]:
    """Write the records of some shards' scored rows as pieces; return their names, and the number of rows of each shard."""
    counts: list[int] = []

    def signed() -> Iterator[pa.Table]:
        for number in lot:
            table = _signed(int(number), shards[number], ranking, parts)
            counts.append(len(table) // BANDS)
            yield table

    return write_pieces(signed(), parts, buckets_of(parts), folder, f"{lot[0]:06d}"), counts


def _signed(number: int, shard: Shard, ranking: Ranking, parts: int) -> pa.Table:
    """Return a record for each signature of each of a shard's scored rows; what `partition` calls a shard is the part that it goes to."""
    rows = read_scored(shard, ranking)[1]
    ids, found = signatures_of(shard.rows)
    if len(rows.ids) < len(ids):
        found = found[pc.index_in(rows.ids, value_set=ids).to_numpy()]
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), found.size, [None, pa.py_buffer(np.repeat(rows.keys, BANDS))]
    )
    return pa.table(
        {
            "shard": pa.array((found.ravel() % np.uint64(parts)).astype(np.int32)),
            "group": pa.array(found.ravel()),
            "key": keys,
            "of": pa.array(np.full(found.size, number, np.int32)),
            "row": pa.array(np.repeat(np.arange(len(found), dtype=np.int32), BANDS)),
        }
    )


def _beyond_in(bucket: int, *, pieces: Sequence[StoragePath], most: int) -> NDArray[np.int32]:
    """Return shards and rows, (2, n) with repeats, of all of a bucket that are not among the best of their group."""
    found = [_beyond(table, most) for table in read_bucket(bucket, pieces=pieces)]
    return np.concatenate(found, axis=1) if found else np.empty((2, 0), np.int32)


def _beyond(table: pa.Table, most: int) -> NDArray[np.int32]:
    _, which, counts = np.unique(table["group"].to_numpy(), return_inverse=True, return_counts=True)
    many = np.flatnonzero(counts[which] > most)
    if not len(many):
        return np.empty((2, 0), np.int32)
    table, which = table.take(pa.array(many)).combine_chunks(), which[many]
    keys = table["key"].combine_chunks()
    order = np.lexsort((np.frombuffer(keys.buffers()[1], f"S{KEY_BYTES}")[keys.offset :][: len(keys)], which))
    first = np.searchsorted(which[order], which[order], "left")
    beyond = order[np.arange(len(order)) - first >= most]
    return np.stack([table[name].to_numpy()[beyond] for name in ("of", "row")])
