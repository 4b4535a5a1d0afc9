from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from transformers import PreTrainedTokenizerFast

from pharmacist_ray.curation import ingest as module
from pharmacist_ray.curation import partition
from pharmacist_ray.curation.ingest import IngestReport, Source, ingest
from pharmacist_ray.data.schema import ROW_SCHEMA, row_id, shard_of
from pharmacist_ray.errors import ConfigError, DataError, ModelError
from pharmacist_ray.models.ref import ModelRef


@pytest.fixture(autouse=True, params=["here", "by tasks"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ray_local: None) -> None:
    """Ingest all that is small in this process, and then by Ray's tasks."""
    if request.param == "by tasks":
        monkeypatch.setattr(module, "SMALL_BYTES", 0)


def records(count: int) -> list[dict[str, object]]:
    return [{"prompt": f"question {i}", "response": f"answer {i}", "category": f"c{i % 3}", "extra": [i]} for i in range(count)]


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def table(out: Path, kind: str = "rows") -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((out / kind).glob("*.parquet"))])


def digests(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*.*"))}


def test_rows_are_sharded_by_id_sorted_and_keep_their_columns(tmp_path):
    shown: list[tuple[int, int]] = []
    path = jsonl(tmp_path / "a.jsonl", records(50))
    report = ingest(Source([path]), tmp_path / "out", progress=lambda *at: shown.append(at))
    assert report == IngestReport(rows_in=50, rows_out=50, duplicates=0, quarantined=0, reasons={}, shards=8)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.__dict__
    files = sorted((tmp_path / "out" / "rows").iterdir())
    assert [file.name for file in files] == [f"part-{i:05d}.parquet" for i in range(8)]
    for shard, file in enumerate(files):
        part = pq.read_table(file)
        assert part.schema.equals(ROW_SCHEMA)
        ids = part["id"].to_pylist()
        assert ids == sorted(ids)
        assert {shard_of(id, 8) for id in ids} <= {shard}
    by_id = {row["id"]: row for row in table(tmp_path / "out").to_pylist()}
    for line, record in enumerate(records(50), 1):
        row = by_id[row_id(str(record["prompt"]), str(record["response"]))]
        assert json.loads(row["raw"]) == record
        assert (row["category"], row["source"]) == (record["category"], f"{path}:{line}")
    assert shown in ([], [(done, 1 + 8) for done in range(1, 1 + 8 + 1)])  # here at once, or one lot and eight buckets
    assert not (tmp_path / "out" / "staging").exists()


BROKEN: list[tuple[bytes, str]] = [
    (b'{"prompt": "q", "response": \n', "bad_json"),
    (b"[1, 2]\n", "bad_json"),
    (b'{"prompt": "q", "response": "\xff\xfe"}\n', "invalid_utf8"),
    (b'{"prompt": "q", "response": "\\ud800"}\n', "invalid_utf8"),
    (b'{"prompt": "q"}\n', "missing_field"),
    (b'{"prompt": "q", "response": "  "}\n', "empty_field"),
    (b'{"prompt": "q", "response": 3}\n', "wrong_type"),
    (b'{"messages": [{"role": "user", "content": "q"}]}\n', "bad_turns"),
    (b'{"text": "q"}\n', "unknown_layout"),
    (b'{"prompt": "q", "response": "a", "completion": "b"}\n', "ambiguous_layout"),
    (b'{"prompt": "' + b"x" * (16 << 20) + b'", "response": "a"}\n', "line_too_long"),
    (b"[" * 5000 + b"\n", "bad_json"),
    (b"\x00\x00\n", "bad_json"),
]


@pytest.mark.parametrize("chunk_bytes", [32 << 20, 1 << 20])
def test_broken_rows_go_to_quarantine_with_place_and_reason(tmp_path, chunk_bytes):
    good = records(len(BROKEN))
    path = jsonl(tmp_path / "a.jsonl", [b"\n", *(row for k, (bad, _) in enumerate(BROKEN) for row in (bad, good[k], b" \n"))])
    report = ingest(Source([path]), tmp_path / "out", chunk_bytes=chunk_bytes)
    assert (report.rows_in, report.rows_out, report.quarantined) == (2 * len(BROKEN), len(BROKEN), len(BROKEN))
    expected = [reason for _, reason in BROKEN]
    assert report.reasons == {reason: expected.count(reason) for reason in sorted(expected)}
    found = {row["line"]: row for row in table(tmp_path / "out", "quarantine").to_pylist()}
    lines = [2 + 3 * k for k in range(len(BROKEN))]
    assert [found[line]["reason"] for line in lines] == expected
    for line, (bad, _) in zip(lines, BROKEN, strict=True):
        assert found[line]["source"] == path
        assert found[line]["detail"]
        assert found[line]["text"] == bad.decode(errors="replace").rstrip("\n")[:2000]


def test_strict_makes_broken_rows_an_error_after_they_are_written(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*records(3), b"{\n"])
    with pytest.raises(DataError, match=r"1 broken rows and --strict in .*a.jsonl: bad_json 1; .*quarantine"):
        ingest(Source([path]), tmp_path / "out", strict=True)
    assert table(tmp_path / "out", "quarantine")["line"].to_pylist() == [4]


def test_the_first_of_equal_rows_stays_and_the_others_are_counted(tmp_path):
    rows = [{**row, "copy": copy} for copy in range(4) for row in records(20)]
    paths = [jsonl(tmp_path / "b.jsonl", rows[:50]), jsonl(tmp_path / "a.jsonl", rows[50:])]
    for chunk_bytes in (32 << 20, 500):
        report = ingest(Source(paths), tmp_path / "out", chunk_bytes=chunk_bytes)
        assert (report.rows_in, report.rows_out, report.duplicates) == (80, 20, 60)
        kept = table(tmp_path / "out").to_pylist()
        assert {json.loads(row["raw"])["copy"] for row in kept} == {0}
        assert sorted(int(row["source"].rpartition(":")[2]) for row in kept) == list(range(1, 21))
        assert {row["source"].rpartition(":")[0] for row in kept} == {paths[0]}


def test_the_output_depends_on_neither_workers_nor_chunks_nor_an_earlier_run(tmp_path, monkeypatch):
    rows: list[object] = [*records(300), *records(40), b"{broken\n", {"prompt": "q"}]
    random.Random(0).shuffle(rows)
    path = jsonl(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    ingest(Source([path]), out, shards=19)  # its files 8 to 18 must not stay
    (out / "rows" / ".part-00000.parquet.killed.tmp").write_bytes(b"half")
    first: dict[str, str] = {}
    for chunk_bytes, small_bytes, buckets in (
        (32 << 20, 0, 4096),
        (1000, 0, 4096),
        (1000, 10**6, 4096),
        (1000, 0, 1),
        (3333, 0, 3),
        (32 << 20, 10**6, 4096),
    ):
        monkeypatch.setattr(module, "SMALL_BYTES", small_bytes)
        monkeypatch.setattr(partition, "MAX_BUCKETS", buckets)
        ingest(Source([path]), out, chunk_bytes=chunk_bytes)
        first = first or digests(out)
        assert digests(out) == first
    assert [name for name in first if name.startswith("rows/")] == [f"rows/part-{i:05d}.parquet" for i in range(8)]


def test_the_order_of_the_lines_changes_only_where_a_row_was_read(tmp_path):
    rows = records(200)
    contents = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        ingest(Source([jsonl(tmp_path / "a.jsonl", rows)]), tmp_path / "out")
        contents.append([pq.read_table(path).drop(["source"]) for path in sorted((tmp_path / "out" / "rows").iterdir())])
    assert contents[0] == contents[1]


def test_every_format_and_layout_gives_the_same_rows(tmp_path):
    pairs = [(f"q{i}", f"a{i}") for i in range(12)]
    plain = [{"prompt": q, "response": a} for q, a in pairs]
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    data = b"".join(orjson.dumps({"instruction": q, "input": "", "output": a}) + b"\n" for q, a in pairs)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "c.parquet", row_group_size=5)
    jsonl(tmp_path / "d.jsonl", [{"prompt": q, "completion": a} for q, a in pairs])
    jsonl(tmp_path / "e.ndjson", [{"frage": q, "antwort": a} for q, a in pairs])
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(plain).save_to_disk(str(tmp_path / "saved"))
    ids = sorted(row_id(q, a) for q, a in pairs)
    named = {"prompt": "frage", "response": "antwort"}
    for name, columns in (
        ("a.jsonl.gz", {}),
        ("b.*", {}),
        ("c.parquet", {}),
        ("d.jsonl", {}),
        ("e.ndjson", named),
        ("saved", {}),
    ):
        report = ingest(Source([str(tmp_path / name)], columns=columns), tmp_path / "out" / name[0])
        assert (report.rows_in, report.rows_out) == (12, 12), name
        assert sorted(table(tmp_path / "out" / name[0])["id"].to_pylist()) == ids
    assert table(tmp_path / "out" / "s")["source"][0].as_py().startswith(f"{tmp_path / 'saved'}[train]:")
    together = ingest(Source([str(tmp_path / "[a-d].*"), str(tmp_path / "saved")]), tmp_path / "out" / "all")
    assert (together.rows_in, together.rows_out, together.duplicates) == (60, 12, 48)


def test_hostile_text_passes_untouched(tmp_path):
    texts = [
        "nul \x00 in it",
        "\u202eright to left\u202c",
        "\ufeffbom",
        "line\u2028break\r\x85",
        "😀" * 3,
        "x" * 100_000,
        "{{7*7}}</s>",
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": text, "response": text, "category": text[:20]} for text in texts])
    report = ingest(Source([path]), tmp_path / "out", chunk_bytes=10_000)
    assert report.rows_out == len(texts)
    rows = {row["prompt"]: row for row in table(tmp_path / "out").to_pylist()}
    for text in texts:
        assert (rows[text]["response"], rows[text]["category"]) == (text, text[:20])
        assert json.loads(rows[text]["raw"])["prompt"] == text


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<eos>", "<unk>", "w"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_prompts_that_leave_no_room_are_quarantined(tmp_path, tokenizer_folder):
    spec = ModelRef(tokenizer_folder, template="plain", max_length=10)
    rows = [{"prompt": " ".join("w" * length), "response": "w w w"} for length in range(1, 21)]
    report = ingest(Source([jsonl(tmp_path / "a.jsonl", rows)]), tmp_path / "out", model=spec)
    assert (report.rows_out, report.reasons) == (9, {"no_room": 11})
    assert sorted(table(tmp_path / "out", "quarantine")["line"].to_pylist()) == list(range(10, 21))
    prompts = [{"prompt": row["prompt"]} for row in rows]
    report = ingest(Source([jsonl(tmp_path / "b.jsonl", prompts)]), tmp_path / "out", model=spec, require_response=False)
    assert (report.rows_out, report.reasons) == (9, {"no_room": 11})


def test_a_chat_prompt_with_a_control_token_is_quarantined(tmp_path, tokenizer_folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {"prompt": "w", "response": "w <eos> w"},
        {"prompt": "w <eos> w", "response": "w"},
        {"prompt": "w w", "response": "w"},
    ]
    source = Source([jsonl(tmp_path / "a.jsonl", rows)])
    report = ingest(source, tmp_path / "out", model=ModelRef(str(tmp_path / "chat"), template="chat", max_length=20))
    assert (report.rows_out, report.reasons) == (2, {"control_token": 1})
    assert table(tmp_path / "out", "quarantine")["line"].to_pylist() == [2]


def test_a_missing_tokenizer_is_the_models_fault_and_one_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", records(2))
    with pytest.raises(ModelError, match=f"^cannot load a tokenizer from {tmp_path}/nothing: [^\n]*$"):
        ingest(Source([path]), tmp_path / "out", model=ModelRef(f"{tmp_path}/nothing"))


def test_errors_of_the_source_come_out_as_they_are(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(orjson.dumps(records(100)))[:-20])
    for path, message in (("none.jsonl", "no such file: .*none.jsonl"), ("cut.jsonl.gz", "^cannot read .*cut.jsonl.gz: ")):
        with pytest.raises(DataError, match=message) as caught:
            ingest(Source([str(tmp_path / path)]), tmp_path / "out")
        assert type(caught.value) is DataError
    with pytest.raises(DataError, match=r"no rows in .*empty.jsonl"):
        ingest(Source([jsonl(tmp_path / "empty.jsonl", [b"\n"])]), tmp_path / "out")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"no rows in .*empty.parquet"):
        ingest(Source([str(tmp_path / "empty.parquet")]), tmp_path / "out")
    with pytest.raises(DataError, match=r"no usable row in .*bad.jsonl: missing_field 2; .*quarantine"):
        ingest(Source([jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": "b"}])]), tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown layout 'chat'"):
        ingest(Source([str(tmp_path / "bad.jsonl")], layout="chat"), tmp_path / "out")


def test_a_lost_row_is_noticed(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", records(10))
    honest = module._count
    monkeypatch.setattr(module, "_count", lambda *args, **kwargs: (honest(*args, **kwargs)[0], 11))
    with pytest.raises(RuntimeError, match="rows were lost or doubled"):
        ingest(Source([path]), tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("rows", "size", "shards"),
    [
        (100, 10_000, 8),
        (10_000, 10**6, 10),
        (100_000, 5 * 10**7, 98),
        (10**6, 5 * 10**8, 977),
        (10**7, 5 * 10**9, 1024),
        (10**8, 10**9, 6104),
        (1000, 10**9, 60),
    ],
)
def test_small_sets_have_shards_for_many_actors_and_large_ones_few_files(rows: int, size: int, shards: int) -> None:
    assert module.shards_of(rows, size) == shards


def test_the_number_of_shards_follows_from_the_input_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1000)
    path = jsonl(tmp_path / "a.jsonl", records(200))
    expected = -(-Path(path).stat().st_size // 1000)
    for chunk_bytes in (32 << 20, 3000):
        assert ingest(Source([path]), tmp_path / "out", chunk_bytes=chunk_bytes).shards == expected
    assert len(list((tmp_path / "out" / "rows").iterdir())) == expected


def test_ray_is_asked_for_only_where_a_source_is_large_or_may_be(tmp_path, monkeypatch):
    rows = records(20)
    plain = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    for path, small_bytes, expected in ((plain, 10**6, 0), (plain, 10, 1), (str(tmp_path / "b.jsonl.gz"), 10**6, 1)):
        monkeypatch.setattr(module, "SMALL_BYTES", small_bytes)
        asked: list[None] = []
        assert ingest(Source([path]), tmp_path / "out", connect=lambda asked=asked: asked.append(None)).rows_out == 20
        assert len(asked) == expected
