from __future__ import annotations

import gzip
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from pharmacist_ray.data import readers
from pharmacist_ray.data.layouts import BadRow
from pharmacist_ray.data.readers import count_chunk, numbered, plan, public_name, read_chunk, stage_huggingface
from pharmacist_ray.errors import DataError

LINES = [json.dumps({"prompt": f"question {i}", "response": "ä" * (i % 13)}, ensure_ascii=False) for i in range(200)]
TEXT = ("\n".join(LINES) + "\n").encode()


def read_all(chunks):
    counts = [count_chunk(chunk) for chunk in chunks]
    rows = [pair for chunk in numbered(chunks, [lines for lines, _ in counts]) for pair in read_chunk(chunk)]
    assert len(rows) == sum(count for _, count in counts)
    return rows


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_split_files_give_the_same_lines_with_absolute_numbers(tmp_path, monkeypatch, chunk_bytes, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    text = b"\xef\xbb\xbf{}\r\n\n  \n" + "\n".join(LINES[:20]).encode()  # BOM, CRLF, blank lines, no newline at the end
    path = write(tmp_path / "a.jsonl", text)
    chunks = plan([path], chunk_bytes=chunk_bytes)
    assert len(chunks) == max(1, -(-len(text) // chunk_bytes))
    assert read_all(chunks) == [(1, b"{}\r"), *((i + 4, line.encode()) for i, line in enumerate(LINES[:20]))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL", "a.jsonl.gz", "a.ndjson.zst", "a.json.gz"])
def test_every_kind_of_json_lines_file_is_read(tmp_path, name):
    data = TEXT
    if name.endswith("gz"):
        data = gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:])  # what appending to a .gz makes
    if name.endswith("zst"):
        data = zstandard.ZstdCompressor().compress(TEXT)
    chunks = plan([write(tmp_path / name, data)], chunk_bytes=1000)
    assert (len(chunks) == 1) == name.endswith(("gz", "zst"))
    assert [line.decode() for _, line in read_all(chunks)] == LINES


def test_parquet_is_cut_at_row_groups_and_its_rows_are_numbered(tmp_path):
    rows = [{"prompt": str(i), "tags": [i, None], "turns": [{"role": "user", "content": "x"}]} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    for chunk_bytes, pieces in ((1, 10), (1 << 30, 1)):
        chunks = plan([str(tmp_path / "a.parquet")], chunk_bytes=chunk_bytes)
        assert len(chunks) == pieces
        assert read_all(chunks) == list(enumerate(rows, 1))
        assert numbered(chunks, [count_chunk(chunk)[0] for chunk in chunks]) == chunks


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    rows = read_all(plan([str(tmp_path / "a.parquet")]))
    assert [rows[0], rows[2]] == [(1, {"prompt": "good"}), (3, {"prompt": "fine"})]
    assert rows[1][0] == 2
    assert isinstance(rows[1][1], BadRow)
    assert rows[1][1].reason == "invalid_utf8"


@pytest.mark.parametrize("chunk_bytes", [100, 1 << 20])
def test_a_line_over_the_limit_is_skipped_without_being_held(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 64)
    path = write(tmp_path / "a.jsonl", b"{}\n" + b"x" * 1001 + b"\n" + b"y" * 1000 + b"\n{}")
    (_, first), (number, bad), (_, longest), last = read_all(plan([path], chunk_bytes=chunk_bytes))
    assert (first, longest, last) == (b"{}", b"y" * 1000, (4, b"{}"))
    assert (number, bad.reason, bad.text[:3]) == (2, "line_too_long", "xxx")
    assert "1001 bytes" in bad.detail


def test_files_are_found_by_pattern_and_folder_in_a_fixed_order(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "deep/d.jsonl.gz", "README.md", "_logs/x.jsonl", ".cache/y.jsonl"):
        write(tmp_path / "data" / name, gzip.compress(b"{}") if name.endswith("gz") else b"{}")
    monkeypatch.chdir(tmp_path)

    def names(*paths):
        return [chunk.name for chunk in plan(paths)]

    every = ["data/a.jsonl", "data/b.jsonl", "data/deep/d.jsonl.gz", "data/deep/er/c.jsonl"]
    assert names("data") == every
    assert names("data/*.jsonl") == names("data/[ab].jsonl") == names("data/?.jsonl") == every[:2]
    assert names("data/**/[!x-y].jsonl") == [*every[:2], every[3]]
    assert names("data/*/d.*") == [every[2]]
    assert names("data/b.jsonl", "data/*.jsonl") == ["data/b.jsonl", "data/a.jsonl"]  # in the order given, and once
    assert names(f"file://{tmp_path}/data/*.jsonl")[0] == f"file://{tmp_path}/data/a.jsonl"
    assert [chunk.file for chunk in plan(["data"])] == [0, 1, 2, 3]


def test_a_name_with_wildcard_characters_is_first_taken_literally(tmp_path):
    path = write(tmp_path / "odd[1].jsonl", b"{}")
    assert plan([path])[0].path == path


def test_a_given_file_system_is_used(tmp_path):
    write(tmp_path / "x.jsonl", b"{}\n")
    inside = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert read_all(plan(["x.jsonl"], filesystem=inside)) == [(1, b"{}")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file: .*missing.jsonl.*hf:NAME"),
        ("*.ndjson", r"nothing to read at .*\*.ndjson"),
        ("table.csv", r"table.csv: unknown file type; known: .jsonl"),
        ("array.json", "array.json is one JSON array"),
        ("broken.parquet", "cannot read .*broken.parquet"),
        ("gcp://x/y.jsonl", "cannot read gcp://x/y.jsonl"),
        ("empty", "nothing to read at .*empty"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, path, message):
    write(tmp_path / "table.csv", b"a,b")
    write(tmp_path / "array.json", b' [\n{"prompt": 1}]')
    write(tmp_path / "broken.parquet", b"nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        plan([path if "://" in path else str(tmp_path / path)])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_archive_is_an_error_and_not_a_shorter_file(tmp_path, name):
    whole = gzip.compress(TEXT) if name.endswith("gz") else zstandard.ZstdCompressor().compress(TEXT)
    (chunk,) = plan([write(tmp_path / name, whole[:-20])])
    for use in (count_chunk, lambda one: list(read_chunk(one))):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            use(chunk)


def test_credentials_in_a_uri_are_never_shown():
    assert public_name("s3://key:secret@bucket/a*.jsonl?session=secret") == "s3://bucket/a*.jsonl"
    assert public_name("data/a?.jsonl") == "data/a?.jsonl"
    for uri in ("none://key:secret@bucket/a.jsonl", "s3://key:secret@bucket/a.jsonl?nonsense=1"):
        with pytest.raises(DataError) as caught:
            plan([uri])
        assert "secret" not in str(caught.value)
        assert "bucket/a.jsonl" in str(caught.value)


def test_saved_data_sets_are_staged_as_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]} for i in range(30)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "dict"))
    table.to_parquet(str(tmp_path / "plain" / "train.parquet"))
    for path, split, count in (("one", "train", 30), ("dict", "train", 30), ("dict", "test", 1)):
        staged = stage_huggingface(str(tmp_path / path), split, tmp_path / "staging" / path / f"{split}.parquet")
        assert [row for _, row in read_all(plan([str(staged)]))] == rows[:count]
    staged = stage_huggingface(f"hf:{tmp_path / 'plain'}", "train[:5]", tmp_path / "staging" / "plain.parquet")
    assert [row for _, row in read_all(plan([str(staged)]))] == rows[:5]
    assert stage_huggingface(str(tmp_path / "plain"), "train", tmp_path) is None
    with pytest.raises(DataError, match="unknown split 'dev'; known: test, train"):
        stage_huggingface(str(tmp_path / "dict"), "dev", tmp_path / "x")


def test_offline_a_missing_hub_data_set_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load the Hugging Face data set 'hf:nobody/nothing'.*in the cache"):
        stage_huggingface("hf:nobody/nothing", "train", tmp_path / "staging")


def test_an_object_store_is_read_like_a_folder(monkeypatch):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="readers")  # a name of its own: moto's servers share what they hold
        client.put_object(Bucket="readers", Key="dir/a b.jsonl", Body=TEXT)
        client.put_object(Bucket="readers", Key="dir/b.jsonl.gz", Body=gzip.compress(TEXT))
        query = f"?endpoint_override=http%3A%2F%2F127.0.0.1%3A{port}&region=us-east-1&scheme=http"
        for path in ("dir/*", "dir", "**/*.jsonl*"):
            chunks = plan([f"s3://readers/{path}{query}"], chunk_bytes=3000)
            assert {chunk.name for chunk in chunks} == {"s3://readers/dir/a b.jsonl", "s3://readers/dir/b.jsonl.gz"}
            assert [line.decode() for _, line in read_all(chunks)] == LINES + LINES
        assert len(plan([f"s3://readers/dir/a%20b.jsonl{query}"])) == 1
        with pytest.raises(DataError, match=r"no such file: s3://readers/dir/missing.jsonl;"):
            plan([f"s3://readers/dir/missing.jsonl{query}"])
    finally:
        server.stop()


def test_numbering_starts_anew_in_every_file(tmp_path):
    paths = [write(tmp_path / name, TEXT) for name in ("a.jsonl", "b.jsonl")]
    numbers = [number for number, _ in read_all(plan(paths, chunk_bytes=999))]
    assert numbers == [*range(1, 201), *range(1, 201)]
    whole = plan(paths)[0]
    assert [number for number, _ in read_chunk(replace(whole, first=11))][:2] == [11, 12]
