"""Rows of many pieces, shard by shard."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from pharmacist_ray.curation import partition
from pharmacist_ray.curation.partition import buckets_of, read_bucket, write_pieces
from pharmacist_ray.storage import storage_path
from tests.conftest import Bucket

SCHEMA = pa.schema([("id", pa.string()), ("shard", pa.int32())])


def table(count: int, shards: int, seed: int) -> pa.Table:
    draw = random.Random(seed)
    rows = [{"id": f"{seed}-{number}", "shard": draw.randrange(shards)} for number in range(count)]
    return pa.Table.from_pylist(rows, SCHEMA)


@pytest.mark.parametrize(("shards", "most"), [(1, 4096), (8, 4096), (100, 7), (100, 1)])
@pytest.mark.parametrize("piece_bytes", [1, 300, 10**6])
def test_every_row_is_found_once_in_its_shard_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, most: int, piece_bytes: int
) -> None:
    monkeypatch.setattr(partition, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(partition, "MAX_BUCKETS", most)
    tables = [[table(30, shards, 0), table(0, shards, 1), table(1, shards, 2)], [table(50, shards, 3)], [table(0, shards, 4)]]
    buckets = buckets_of(shards)
    pieces = [
        tmp_path / name
        for lot, some in enumerate(tables)
        for name in write_pieces(iter(some), shards, buckets, tmp_path, f"{lot:06d}")
    ]
    assert sorted(tmp_path.iterdir()) == pieces
    assert len(pieces) == {1: 4, 300: 4, 10**6: 3}[piece_bytes]
    found: Counter[tuple[str, int]] = Counter()
    seen: list[int] = []
    for bucket in range(buckets):
        for one in read_bucket(bucket, pieces=pieces):
            [shard] = set(one["shard"].to_pylist())
            seen.append(shard)
            found.update((id, shard) for id in one["id"].to_pylist())
    wanted = Counter((row["id"], row["shard"]) for some in tables for one in some for row in one.to_pylist())
    assert found == wanted
    assert len(seen) == len(set(seen))  # no shard is in two buckets: it has one writer
    assert max(wanted.values()) == 1


def test_the_same_rows_make_the_same_files_and_a_bucket_reads_its_own_part_alone(tmp_path: Path) -> None:
    tables = [table(2000, 64, seed) for seed in range(3)]
    for folder in ("a", "b"):
        assert write_pieces(tables, 64, 64, tmp_path / folder, "000000") == ["000000-000.arrow"]
    file = tmp_path / "a" / "000000-000.arrow"
    assert file.read_bytes() == (tmp_path / "b" / "000000-000.arrow").read_bytes()
    broken = bytearray(file.read_bytes())
    with pa.ipc.open_file(file) as opened:
        assert opened.num_record_batches == 64
        assert {opened.get_batch(number)["shard"].unique().to_pylist()[0] for number in range(64)} == set(range(64))
    middle = len(broken) // 2
    broken[middle : middle + 400] = bytes(400)
    file.write_bytes(broken)
    whole = 0
    for bucket in range(64):
        try:
            whole += read_bucket(bucket, pieces=[file]) == read_bucket(bucket, pieces=[tmp_path / "b" / file.name])
        except (pa.ArrowException, OSError):
            continue
    assert 55 < whole < 64  # what is broken is in a few buckets only


def test_pieces_lie_on_an_object_store_as_well(s3: Bucket) -> None:
    folder = storage_path(s3.uri("pieces"))
    names = write_pieces([table(40, 5, 0)], 5, 5, folder, "000000")
    rows = [one for number in range(5) for one in read_bucket(number, pieces=[folder / name for name in names])]
    assert sum(map(len, rows)) == 40
