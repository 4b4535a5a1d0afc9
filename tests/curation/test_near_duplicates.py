"""Groups of near-duplicates against sets of words, whatever the shards."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pharmacist_ray.curation import near_duplicates
from pharmacist_ray.curation.near_duplicates import BANDS, ROWS, signatures
from pharmacist_ray.curation.select import Rule, select_ids, write_selection
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.storage import storage_path
from tests.curation.test_select import write_inputs


def text(draw: random.Random, words: int = 40) -> str:
    return " ".join(f"w{draw.randrange(10_000)}" for _ in range(words))


def runs(one: str) -> set[tuple[str, ...]]:
    words = one.split()
    return {tuple(words[place : place + 3]) for place in range(len(words) - 2)}


def test_two_texts_share_a_signature_with_the_chance_of_their_common_runs():
    draw = random.Random(0)
    shared, wanted = 0, []
    for _ in range(1500):
        words = text(draw).split()
        other = list(words)
        other[draw.randrange(40)] = "changed"
        one, two = " ".join(words), " ".join(other)
        wanted.append((len(runs(one) & runs(two)) / len(runs(one) | runs(two))) ** ROWS)
        found = signatures([one, two])
        shared += int((found[0] == found[1]).sum())
    assert shared / (1500 * BANDS) == pytest.approx(np.mean(wanted), abs=0.025)


def test_case_and_punctuation_count_for_nothing_and_order_does():
    found = signatures(["I cannot help. With that!", "i cannot\nhelp with that", "that with help cannot i", "No", "no", ""])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[3], found[4])
    assert not (found[0] == found[2]).any()
    assert len(set(found[5].tolist())) == BANDS  # bands never meet each other


def pool(folder: Path, shards: int = 4) -> tuple[Path, Path, list[Row], list[int]]:
    """Rows in 6 groups of equal texts but for case (10, 7, 3, 1, 1 and 1 rows), with scores; the last row has none."""
    draw = random.Random(1)
    rows, groups = [], []
    for group, size in enumerate((10, 7, 3, 1, 1, 1)):
        words = text(draw).split()
        for number in range(size):
            varied = [word.upper() if number >> bit & 1 else word for bit, word in enumerate(words[:4])] + words[4:]
            prompt, response = " ".join(varied[:10]), " ".join(varied[10:])
            rows.append(Row(row_id(prompt, response), prompt, response, category="ab"[number % 2], source="made", raw="{}"))
            groups.append(group)
    scores: list[float | None] = [float(draw.randrange(8)) for _ in rows]
    scores[-1] = None
    folder.mkdir(exist_ok=True)
    return *write_inputs(folder, rows, {"s": scores}, shards), rows, groups


def kept(candidates: Path, scores: Path, rule: Rule) -> set[str]:
    return {id for table in select_ids(scores, candidates, rule) for id in table["id"].to_pylist()}


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("descending", [True, False])
def test_the_best_of_each_group_stay_and_the_rule_chooses_among_them(tmp_path, most, descending):
    candidates, scores, rows, groups = pool(tmp_path)
    column = dict(zip([row.id for row in rows], read_scores(scores, rows), strict=True))
    eligible = []
    for group in range(6):
        mine = [row.id for row, one in zip(rows, groups, strict=True) if one == group and column[row.id] is not None]
        eligible += sorted(mine, key=lambda id: (-column[id] if descending else column[id], id))[:most]
    for count in (1, 4, len(eligible)):
        want = sorted(eligible, key=lambda id: (-column[id] if descending else column[id], id))[:count]
        assert kept(candidates, scores, Rule("s", count=count, descending=descending, near_duplicates=most)) == set(want)


def read_scores(folder: Path, rows: list[Row]) -> list[float | None]:
    found = {one["id"]: one["s"] for one in pq.read_table(folder).to_pylist()}
    return [found[row.id] for row in rows]


def test_shards_and_parts_change_nothing(tmp_path, monkeypatch):
    rule = Rule("s", ratio=0.3, quotas="proportional", near_duplicates=2)
    found = []
    for number, (shards, part) in enumerate(((1, 1 << 20), (5, 1 << 20), (5, 16))):
        monkeypatch.setattr(near_duplicates, "PART", part)
        candidates, scores, _, _ = pool(tmp_path / str(number), shards)
        found.append(kept(candidates, scores, rule))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 7


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_by_way_of_files_in_pieces_the_same_are_kept_and_no_file_is_left(tmp_path, monkeypatch, s3, place):
    candidates, scores, _, _ = pool(tmp_path)
    for file in scores.iterdir():  # a second score, so that a sum of ranks is kept there too
        table = pq.read_table(file)
        pq.write_table(table.append_column("t", pc.negate(pc.power(table["s"], 2))), file)
    rule = Rule("sum", ratio=0.3, near_duplicates=2, weights={"s": 2.0, "t": 1.0})
    want = kept(candidates, scores, rule)
    assert len(want) == 7
    monkeypatch.setattr("pharmacist_ray.curation.select.MANY", 1)
    monkeypatch.setattr(near_duplicates, "PART", 16)
    monkeypatch.setattr(near_duplicates, "PIECE_BYTES", 500)
    scratch = storage_path(tmp_path / "scratch") if place == "folder" else storage_path(s3.uri("near/scratch"))
    tables = select_ids(scores, candidates, rule, scratch=scratch)
    first = next(tables)
    assert [entry.name for entry in scratch.iterdir()] == ["scores"]
    assert {id for one in (first, *tables) for id in one["id"].to_pylist()} == want
    assert not scratch.exists()


def test_signatures_are_found_once_and_those_of_other_rows_are_not_taken(tmp_path, monkeypatch):
    candidates, scores, rows, _ = pool(tmp_path)
    rule = Rule("s", count=5, near_duplicates=2)
    first = kept(candidates, scores, rule)
    files = sorted((candidates / "signatures").iterdir())
    assert [file.name for file in files] == [file.name for file in sorted((candidates / "rows").iterdir())]
    made = [file.stat().st_mtime_ns for file in files]
    with monkeypatch.context() as patched:
        patched.setattr(near_duplicates, "signatures", lambda texts: pytest.fail("found again"))
        assert kept(candidates, scores, rule) == first
    assert [file.stat().st_mtime_ns for file in files] == made

    other, _, others, _ = pool(tmp_path / "other")
    assert {row.id for row in rows} == {row.id for row in others}
    moved = pq.read_table(files[0]).schema.metadata[b"of"], pq.read_table(files[1]).schema.metadata[b"of"]
    assert moved[0] != moved[1]
    (other / "signatures").mkdir()
    for file, instead in zip(files, reversed(files), strict=True):  # what an ingestion of other data would have left
        (other / "signatures" / file.name).write_bytes(instead.read_bytes())
    assert kept(other, scores, rule) == first
    assert pq.read_table(other / "signatures" / files[0].name).equals(pq.read_table(files[0]), check_metadata=True)


def test_the_report_counts_what_is_left_out(tmp_path):
    candidates, scores, _, _ = pool(tmp_path)
    report = write_selection(candidates, scores, Rule("s", count=5, near_duplicates=2), tmp_path / "out", provenance={})
    assert (report.candidates, report.scored, report.left_out, report.kept) == (23, 8, 14, 5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out"] == 14
    assert manifest["rule"]["near_duplicates"] == 2
    assert "14 near-duplicates of better rows left out" in (tmp_path / "out" / "README.md").read_text()
    message = r"^selection.count=9 but only 8 of 23 candidates have a score, 14 near-duplicates left out$"
    with pytest.raises(DataError, match=message):
        kept(candidates, scores, Rule("s", count=9, near_duplicates=2))
    with pytest.raises(ConfigError, match=r"^selection.near_duplicates must be at least 1, got 0$"):
        Rule("s", count=9, near_duplicates=0)
