from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pharmacist_ray.curation import curated, topk
from pharmacist_ray.curation.select import Rule, select_ids, write_selection
from pharmacist_ray.data.schema import Row, row_id, shard_of, table_from_rows
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError


def make_rows(records: list[dict[str, Any]]) -> list[Row]:
    return [
        Row(
            id=row_id(record.get("prompt", ""), str(index)),
            prompt=record.get("prompt", ""),
            response=str(index),
            category=record.get("category", ""),
            source=f"in.jsonl:{index + 1}",
            raw=json.dumps(record, ensure_ascii=False),
        )
        for index, record in enumerate(records)
    ]


def write_inputs(folder: Path, rows: list[Row], scores: dict[str, list[float | None]], shards: int = 4) -> tuple[Path, Path]:
    """Write candidates and scores as the earlier stages do; return the two folders."""
    (folder / "candidates" / "rows").mkdir(parents=True)
    (folder / "scores").mkdir()
    for shard in range(shards):
        chosen = sorted((row.id, index) for index, row in enumerate(rows) if shard_of(row.id, shards) == shard)
        table = table_from_rows([rows[index] for _, index in chosen])
        pq.write_table(table, folder / "candidates" / "rows" / f"part-{shard:05d}.parquet", row_group_size=3)
        columns = {name: pa.array([values[index] for _, index in chosen], pa.float32()) for name, values in scores.items()}
        ids = pa.array([id for id, _ in chosen], pa.string())
        pq.write_table(pa.table({"id": ids, **columns}), folder / "scores" / f"part-{shard:05d}.parquet")
    return folder / "candidates", folder / "scores"


def simple(
    folder: Path, scores: list[float | None], categories: list[str] | None = None, shards: int = 4
) -> tuple[Path, Path, list[Row]]:
    categories = categories or [""] * len(scores)
    rows = make_rows([{"prompt": f"p{index}", "category": category} for index, category in enumerate(categories)])
    return *write_inputs(folder, rows, {"s": scores}, shards), rows


def kept_ids(candidates: Path, scores: Path, rule: Rule) -> set[str]:
    tables = list(select_ids(scores, candidates, rule))
    found = [id for table in tables for id in table["id"].to_pylist()]
    assert len(set(found)) == len(found)
    return set(found)


def best(rows: list[Row], scores: list[float | None], k: int, descending: bool = True) -> set[str]:
    """The reference: sort everything."""
    known = [(value, row.id) for value, row in zip(scores, rows, strict=True) if value is not None and not math.isnan(value)]
    return {id for _, id in sorted(known, key=lambda pair: (-pair[0] if descending else pair[0], pair[1]))[:k]}


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 1.0])
def test_a_ratio_keeps_the_best_with_ties_by_id(tmp_path: Path, ratio: float, descending: bool) -> None:
    draw = np.random.default_rng(0)
    scores: list[float | None] = [float(value) for value in draw.integers(-3, 4, 200)]
    scores[::7] = [None] * len(scores[::7])
    scores[3] = math.nan
    candidates, folder, rows = simple(tmp_path, scores)
    expected = best(rows, scores, max(1, math.floor(ratio * 200 + 0.5)), descending)
    assert kept_ids(candidates, folder, Rule("s", ratio=ratio, descending=descending)) == expected


def test_the_selection_does_not_depend_on_shards_or_on_the_order_of_the_scores(tmp_path: Path) -> None:
    scores: list[float | None] = [float(index % 5) for index in range(60)]
    rules = [Rule("s", count=23), Rule("s", count=23, quotas="proportional"), Rule("s", threshold=2.5)]
    found = []
    for shards in (1, 3, 8):
        candidates, folder, _ = simple(tmp_path / str(shards), scores, ["a", "b", "c"] * 20, shards)
        for path in folder.glob("*.parquet"):
            table = pq.read_table(path)
            pq.write_table(table.take(list(reversed(range(len(table))))), path)
        found.append([kept_ids(candidates, folder, rule) for rule in rules])
    assert found[0] == found[1] == found[2]
    assert [len(kept) for kept in found[0]] == [23, 23, 24]


@pytest.mark.parametrize(("n", "ratio", "kept"), [(10, 0.25, 3), (10, 0.24, 2), (10, 0.01, 1), (3, 0.5, 2)])
def test_the_kept_count_is_rounded_half_up_and_at_least_one(tmp_path: Path, n: int, ratio: float, kept: int) -> None:
    candidates, folder, _ = simple(tmp_path, [1.0] * n)
    assert len(kept_ids(candidates, folder, Rule("s", ratio=ratio))) == kept


def test_a_ratio_counts_unscored_candidates_but_never_keeps_them(tmp_path: Path) -> None:
    candidates, folder, rows = simple(tmp_path, [None, 1.0, None, 2.0, 3.0, None])
    assert kept_ids(candidates, folder, Rule("s", ratio=0.5)) == {rows[index].id for index in (1, 3, 4)}
    assert kept_ids(candidates, folder, Rule("s", ratio=1.0)) == {rows[index].id for index in (1, 3, 4)}


@pytest.mark.parametrize(("descending", "kept"), [(True, {1, 2, 3}), (False, {0, 1, 2})])
def test_a_threshold_is_inclusive(tmp_path: Path, descending: bool, kept: set[int]) -> None:
    candidates, folder, rows = simple(tmp_path, [-1.0, 0.0, -0.0, 2.0, None])
    rule = Rule("s", threshold=0.0, descending=descending)
    assert kept_ids(candidates, folder, rule) == {rows[index].id for index in kept}


def test_quotas_come_first_and_the_rest_goes_by_score(tmp_path: Path) -> None:
    scores: list[float | None] = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    candidates, folder, rows = simple(tmp_path, scores, ["a", "a", "a", "a", "b", "b", "c", "c"])
    kept = kept_ids(candidates, folder, Rule("s", count=4, quotas={"c": 0.5, "b": 0.25}))
    assert kept == {rows[index].id for index in (6, 7, 4, 0)}
    first = kept_ids(candidates, folder, Rule("s", count=4, quotas={"a": 0.5}))  # a share that is sure, not a limit
    assert first == {rows[index].id for index in (0, 1, 2, 3)}
    short = kept_ids(candidates, folder, Rule("s", count=5, quotas={"c": 1.0}))  # c has two rows only: three places are left
    assert short == {rows[index].id for index in (6, 7, 0, 1, 2)}


def test_proportional_quotas_keep_each_categorys_share(tmp_path: Path) -> None:
    categories = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    candidates, folder, rows = simple(tmp_path, [float(index) for index in range(100)], categories)
    kept = kept_ids(candidates, folder, Rule("s", count=25, quotas="proportional"))
    expected = {*range(45, 60), *range(82, 90), *(98, 99)}  # 15, 7.5 and 2.5 places; the tie of remainders goes by name: b
    assert kept == {rows[index].id for index in expected}


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf]), st.floats(allow_nan=False)),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_radix_selection_equals_sorting(scores: list[float], data: st.DataObject) -> None:
    ids = sorted(row_id(str(index), "") for index in range(len(scores)))
    descending = data.draw(st.booleans())
    codes = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(scores), max_size=len(scores))))
    keys = topk.keys_of(np.array(scores), np.array(ids, dtype="S32"), descending)
    sizes = [int((codes == group).sum()) for group in range(3)]
    wanted = [(data.draw(st.integers(0, size)), size) for size in sizes]

    def ask(query: topk.Query) -> Any:
        for part in np.array_split(np.arange(len(scores)), 4):
            yield topk.answer(query, codes[part], keys[part])

    for group, cut in enumerate(topk.kth_keys(ask, wanted, direct=3)):
        mine = [(scores[i] if not descending else -scores[i], ids[i], i) for i in range(len(scores)) if codes[i] == group]
        expected = {i for _, _, i in sorted(mine)[: wanted[group][0]]}
        assert {i for i in range(len(scores)) if codes[i] == group and keys[i] <= cut} == expected


def test_radix_selection_narrows_down_equal_scores_without_holding_them() -> None:
    ids = np.array(sorted(row_id(str(index), "") for index in range(5000)), dtype="S32")
    keys = topk.keys_of(np.zeros(5000), ids, descending=True)
    passes = itertools.count()

    def ask(query: topk.Query) -> Any:
        next(passes)
        yield topk.answer(query, np.zeros(5000, dtype=np.int64), keys)

    assert topk.kth_keys(ask, [(1234, 5000)], direct=50)[0] == bytes(keys[1233])
    assert next(passes) <= 7


RECORDS: list[dict[str, Any]] = [
    {"prompt": "Größe? 😀", "messages": [{"role": "user", "content": "hi"}], "n": 1, "meta": {"a": 1}, "mixed": "text"},
    {"prompt": "line\nbreak", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "n": 2.5},
    {"prompt": "c", "messages": [], "n": None, "meta": {"b": [True]}, "mixed": {"x": 1}, "big": 2**63},
    {"prompt": "d", "messages": None, "meta": {}, "empty": {}, "mixed": 3, "nothing": None},
]


def selection(tmp_path: Path, records: list[dict[str, Any]] = RECORDS, **options: Any) -> tuple[Path, list[Row]]:
    rows = make_rows(records)
    candidates, scores = write_inputs(tmp_path, rows, {"s": [float(index) for index in range(len(rows))]})
    out = tmp_path / "out"
    write_selection(candidates, scores, Rule("s", ratio=1.0), out, provenance={"seed": 7, "note": "```"}, **options)
    return out, rows


def test_load_dataset_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    out, rows = selection(tmp_path)
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    by_prompt = {record["prompt"]: record for record in loaded}
    assert len(loaded) == 4
    first = by_prompt["Größe? 😀"]
    assert first["messages"] == [{"role": "user", "content": "hi"}]
    assert by_prompt["line\nbreak"]["messages"][1] == {"role": "assistant", "content": None}
    assert [by_prompt[record["prompt"]]["n"] for record in RECORDS] == [1.0, 2.5, None, None]
    assert first["meta"] == {"a": 1, "b": None}
    assert by_prompt["c"]["meta"] == {"a": None, "b": [True]}
    assert json.loads(first["mixed"]) == "text"
    assert json.loads(by_prompt["c"]["mixed"]) == {"x": 1}
    assert json.loads(by_prompt["c"]["big"]) == 2**63
    assert by_prompt["d"]["empty"] == "{}"
    assert by_prompt["line\nbreak"]["mixed"] is None
    assert {record["pharmacist_id"]: record["pharmacist_score"] for record in loaded} == {
        row.id: float(index) for index, row in enumerate(rows)
    }
    assert json.loads((out / "manifest.json").read_text())["json_columns"] == ["big", "empty", "mixed"]


def test_the_folder_tells_how_it_came_about(tmp_path: Path) -> None:
    scores: list[float | None] = [1.0, 2.0, 3.0, None]
    candidates, folder, rows = simple(tmp_path, scores, ["a", "b", "b", "a"])
    report = write_selection(candidates, folder, Rule("s", ratio=0.5), tmp_path / "out", provenance={"seed": 7})
    assert (report.candidates, report.scored, report.kept, report.cut) == (4, 3, 2, 2.0)
    assert report.categories == {
        "a": {"candidates": 2, "scored": 1, "kept": 0},
        "b": {"candidates": 2, "scored": 2, "kept": 2},
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["provenance"] == {"seed": 7}
    assert manifest["rule"]["ratio"] == 0.5
    assert manifest["kept"] == 2
    assert manifest["files"] == ["data/train-00000-of-00001.parquet"]
    assert "2 of 4 candidates" in (tmp_path / "out" / "README.md").read_text()
    canonical = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out" / "rows").glob("part-*.parquet")))
    assert set(canonical["id"].to_pylist()) == {rows[1].id, rows[2].id}
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 4


def test_the_same_selection_has_the_same_bytes_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    out, _ = selection(tmp_path / "a")
    again, _ = selection(tmp_path / "b")
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    candidates, scores = tmp_path / "a" / "candidates", tmp_path / "a" / "scores"
    write_selection(candidates, scores, Rule("s", count=1), out, provenance={})
    assert json.loads((out / "manifest.json").read_text())["kept"] == 1
    assert {path.name for path in out.parent.iterdir()} == {"candidates", "scores", "out"}


def test_jsonl_holds_the_records_as_they_were_read(tmp_path: Path) -> None:
    out, rows = selection(tmp_path, jsonl=True)
    lines = (out / "curated.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert sorted(lines) == sorted(row.raw for row in rows)


def test_a_failed_selection_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    out, _ = selection(tmp_path)
    before = (out / "manifest.json").read_bytes()
    bad = tmp_path / "bad"
    candidates, scores = write_inputs(bad, make_rows([{"prompt": "p", "pharmacist_score": 1}]), {"s": [1.0]})
    with pytest.raises(DataError, match=r"column 'pharmacist_score' of the data has a name .* rename or drop it"):
        write_selection(candidates, scores, Rule("s", ratio=1.0), out, provenance={})
    assert (out / "manifest.json").read_bytes() == before
    assert not (tmp_path / ".out.new").exists()


def test_a_folder_that_is_no_selection_is_not_replaced(tmp_path: Path) -> None:
    candidates, folder, _ = simple(tmp_path, [1.0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"mine is there and is not a selection"):
        write_selection(candidates, folder, Rule("s", ratio=1.0), tmp_path / "mine", provenance={})
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of .* got none"),
        ({"ratio": 0.5, "count": 3}, r"exactly one of .* got \['ratio', 'count'\]"),
        ({"ratio": 0.0}, r"selection.ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"selection.ratio must lie in \(0, 1\], got 1.5"),
        ({"ratio": math.nan}, "selection.ratio must lie"),
        ({"count": 0}, "selection.count must be at least 1, got 0"),
        ({"threshold": math.nan}, "selection.threshold must be a finite number"),
        ({"threshold": 0.0, "quotas": "proportional"}, "use selection.ratio or count"),
        ({"ratio": 0.5, "quotas": "equal"}, "or be 'proportional', got 'equal'"),
        ({"ratio": 0.5, "quotas": {"a": 0.7, "b": 0.4}}, "add up to at most 1"),
        ({"ratio": 0.5, "quotas": {"a": -0.1}}, "shares from 0 to 1"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rule("s", **options)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (Rule("loss", ratio=0.5), ConfigError, "unknown scorer 'loss'; known: s"),
        (Rule("s", threshold=9.0), DataError, "selection.threshold=9.0 keeps none of the 2 scored rows"),
        (Rule("s", count=3), DataError, "selection.count=3 but only 2 of 3 candidates have a score"),
        (Rule("s", count=1, quotas={"c": 0.1}), DataError, "no candidate has the category 'c'; there are 'a', 'b'"),
    ],
)
def test_a_rule_that_fits_no_row_is_one_clear_line(tmp_path: Path, rule: Rule, error: type[Exception], message: str) -> None:
    candidates, folder, _ = simple(tmp_path, [1.0, 2.0, None], ["a", "b", "b"])
    with pytest.raises(error, match=message):
        list(select_ids(folder, candidates, rule))


def test_no_score_at_all_is_an_error(tmp_path: Path) -> None:
    candidates, folder, _ = simple(tmp_path, [None, math.nan])
    with pytest.raises(DataError, match=r"no candidate has a score in column 's'"):
        list(select_ids(folder, candidates, Rule("s", ratio=0.5)))


def test_the_scores_of_other_candidates_are_refused(tmp_path: Path) -> None:
    candidates, _, _ = simple(tmp_path / "a", [1.0] * 8)
    rows = make_rows([{"prompt": f"other {index}"} for index in range(8)])
    _, other = write_inputs(tmp_path / "b", rows, {"s": [1.0] * 8})
    with pytest.raises(ArtifactError, match=r"has the scores of other candidates: .* score again"):
        list(select_ids(other, candidates, Rule("s", ratio=0.5)))
    _, fewer, _ = simple(tmp_path / "c", [1.0] * 8, shards=3)
    with pytest.raises(ArtifactError, match=r"do not have the same shards: part-00003.parquet is in one only"):
        list(select_ids(fewer, candidates, Rule("s", ratio=0.5)))
    with pytest.raises(ArtifactError, match=r"nowhere has no part-\*.parquet files"):
        list(select_ids(tmp_path / "nowhere", candidates, Rule("s", ratio=0.5)))


def test_categories_without_end_are_refused_with_quotas_and_not_listed_without(tmp_path: Path) -> None:
    candidates, folder, _ = simple(tmp_path, [1.0] * 1001, [str(index) for index in range(1001)])
    with pytest.raises(DataError, match=r"quotas take at most 1000 categories"):
        list(select_ids(folder, candidates, Rule("s", ratio=0.5, quotas="proportional")))
    report = write_selection(candidates, folder, Rule("s", ratio=0.5), tmp_path / "out", provenance={})
    assert (report.kept, report.categories) == (501, {})


def test_hostile_text_stays_inside_the_cards_code_block(tmp_path: Path) -> None:
    out, _ = selection(tmp_path)
    assert (out / "README.md").read_text().count("```") == 2


def test_an_object_with_endless_keys_becomes_json(tmp_path: Path) -> None:
    out, _ = selection(tmp_path, [{"prompt": str(index), "deep": {f"k{index}": index}} for index in range(200)])
    table = pq.read_table(out / "data" / "train-00000-of-00001.parquet")
    assert table.schema.field("deep").type == pa.string()
    assert all(len(json.loads(value)) == 1 for value in table["deep"].to_pylist())


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    "rule",
    [
        Rule("s", ratio=0.4),
        Rule("both", ratio=0.4, weights={"s": 1.0, "t": 2.0}),
        Rule("s", count=70, quotas="proportional", near_duplicates=1, descending=False),
    ],
)
def test_tasks_of_ray_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    draw = np.random.default_rng(0)
    records: list[dict[str, Any]] = [
        {"prompt": f"p {number // 3}", "category": "ab"[number % 2], "n": number if number % 7 else 0.5} for number in range(200)
    ]
    records[17] |= {"deep": {"x": 1}}
    records[120] |= {"deep": {"y": [None, 2]}, "n": "many"}
    scores: dict[str, list[float | None]] = {name: [float(value) for value in draw.normal(size=200)] for name in "st"}
    scores["s"][5] = None
    candidates, folder = write_inputs(tmp_path, make_rows(records), scores, 12)
    monkeypatch.setattr(curated, "_FILE_BYTES", 1500)

    def made(place: Path) -> dict[Path, bytes]:
        write_selection(candidates, folder, rule, place, provenance={}, jsonl=True)
        return {file.relative_to(place): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}

    monkeypatch.setattr("pharmacist_ray.runtime.tasks.ray.is_initialized", lambda: False)
    here = made(tmp_path / "here")
    monkeypatch.undo()
    monkeypatch.setattr(curated, "_FILE_BYTES", 1500)
    monkeypatch.setattr("pharmacist_ray.runtime.tasks.in_tasks.__kwdefaults__", {"fewest": 2, "what": "selection"})
    monkeypatch.setattr("pharmacist_ray.curation.select.MANY", 2)  # so that sums of ranks are kept between passes
    before = set(tmp_path.iterdir())
    assert made(tmp_path / "tasks") == here
    assert set(tmp_path.iterdir()) - before == {tmp_path / "tasks"}
    assert sum(str(file).startswith("data/") for file in here) > 2
    assert not any(str(file).startswith("lines") for file in here)


@given(
    st.lists(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-3, 3)
            | st.just(2**70)
            | st.floats(allow_nan=False)
            | st.text("ab", max_size=2),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", max_size=1), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    ),
    st.integers(0, 6),
)
def test_the_types_of_two_parts_together_are_those_of_the_whole(values: list[Any], cut: int) -> None:
    def of(some: list[Any]) -> Any:
        return functools.reduce(curated._merge, some, None)

    assert curated._both(of(values[:cut]), of(values[cut:])) == of(values)
