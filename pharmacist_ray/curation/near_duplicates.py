"""Near-duplicates share a quota: of rows that say nearly the same, at most so many can be kept, the best ones.

A row is the set of its runs of `SHINGLE` words, prompt and answer together. MinHash (Broder 1997) gives `BANDS` signatures of it,
each of `ROWS` minima. Two rows share a signature with the chance J^`ROWS`, J being the part of runs that they have in common, and
any of the four in 99 of 100 cases for J = 0.9, in 23 for J = 0.5 and in 3 for J = 0.3. Rows with the same signature are a group, and
a row that is not among the best of each of its groups is left out. No two rows are compared with each other, and the result is a
function of texts, scores and ids.

Signatures are found once: they are kept beside the rows, for other selections. On the way to their groups they go to a temporary folder,
224 bytes a row, in parts that fit into memory. In memory are a few shards or parts, and a bit a row.
"""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.curation.scored import Ranking, Shard, read_scored
from pharmacist_ray.runtime.tasks import in_tasks
from pharmacist_ray.storage import StoragePath, disk_full_errors, opened_parquet, read_table, row_count, write_parquet

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
_FEW = 8  # parts from which on it is worth the start of workers
_RECORD = np.dtype([("group", "<u8"), ("key", "S40"), ("shard", "<u4"), ("row", "<u4")])


def within_quota(shards: Sequence[Shard], ranking: Ranking, most: int) -> list[Shard]:
    """Return the shards with the rows marked that are left out.

    Args:
        shards: All shards.
        ranking: Says which rows of a group are the best; ties are broken by id.
        most: At most so many rows of a group stay.

    Raises:
        ResourceError: The disk is full.
    """
    left_out: list[NDArray[np.uint8]] = []  # a bit a row
    with tempfile.TemporaryDirectory() as place, disk_full_errors(Path(place)):
        parts = max(1, math.ceil(sum(row_count(shard.rows) for shard in shards) * BANDS / PART))
        for records in in_tasks(partial(_signed, ranking=ranking), enumerate(shards), count=len(shards)):
            left_out.append(np.zeros(-(-len(records) // BANDS // 8), np.uint8))
            _spill(records, Path(place), parts)
        files = sorted(Path(place).iterdir())
        parts_of = (np.fromfile(file, _RECORD) for file in files)
        for beyond in in_tasks(partial(_beyond, most=most), parts_of, count=len(files), fewest=_FEW):
            for number in np.unique(beyond["shard"]):
                row = beyond["row"][beyond["shard"] == number]
                np.bitwise_or.at(left_out[number], row >> 3, (128 >> (row & 7)).astype(np.uint8))
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


def _signed(numbered: tuple[int, Shard], *, ranking: Ranking) -> NDArray[np.void]:
    """Return a record for each signature of each of a shard's scored rows."""
    number, shard = numbered
    rows = read_scored(shard, ranking)[1]
    ids, found = signatures_of(shard.rows)
    if len(rows.ids) < len(ids):
        found = found[pc.index_in(rows.ids, value_set=ids).to_numpy()]
    records = np.empty(found.size, _RECORD)
    records["group"] = found.ravel()
    records["key"] = np.repeat(rows.keys, BANDS)
    records["shard"] = number
    records["row"] = np.repeat(np.arange(len(found)), BANDS)
    return records


def _spill(records: NDArray[np.void], place: Path, parts: int) -> None:
    """Write signatures to the parts that they belong to."""
    part = records["group"] % np.uint64(parts)
    for number in np.unique(part):
        with (place / f"{int(number):06d}").open("ab") as file:
            records[part == number].tofile(file)


def _beyond(records: NDArray[np.void], *, most: int) -> NDArray[np.void]:
    """Return the shard and row, with repeats, of all that are not among the best of their group."""
    _, which, counts = np.unique(records["group"], return_inverse=True, return_counts=True)
    records, which = records[counts[which] > most], which[counts[which] > most]
    order = np.lexsort((records["key"], which))
    first = np.searchsorted(which[order], which[order], "left")
    return np.asarray(records[["shard", "row"]][order[np.arange(len(order)) - first >= most]])
