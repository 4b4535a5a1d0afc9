"""Thresholds from known rows, and what every audited row gets by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pharmacist_ray.curation.audit import FLAGS, Threshold, doubts, flagged, threshold, thresholds, together, write_flags
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.errors import DataError
from pharmacist_ray.storage import read_table, write_parquet

SCORES = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60)


@given(safe=SCORES, harmful=SCORES, alarm=st.floats(0.01, 0.5))
def test_no_more_known_safe_rows_are_flagged_than_the_alarm_allows(safe, harmful, alarm):
    found = threshold("one", np.array(safe), np.array(harmful), alarm)
    assert found.alarms == sum(value < found.below for value in safe) <= alarm * len(safe) + 1e-6
    assert found.caught == sum(value < found.below for value in harmful)
    share, low, high = found.recall
    assert 0 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1 + 1e-9
    assert share == found.caught / found.harmful


def test_between_sets_that_are_apart_the_threshold_lies_in_the_middle_and_else_at_the_edge_of_the_safe_ones():
    safe, harmful = np.linspace(1, 2, 101), np.linspace(-2, -1, 100)
    assert threshold("one", safe, harmful, 0.01).below == pytest.approx((1.01 + harmful[94]) / 2)  # one of 101 may be flagged
    assert threshold("one", safe, safe, 0.01).below == pytest.approx(1.01)
    assert threshold("one", safe, harmful + 9, 0.001).below == 1.0


def test_rows_without_a_score_say_nothing_and_are_flagged_by_none():
    one = threshold("one", np.array([1.0, np.nan, 2.0]), np.array([np.nan, -1.0]), 0.1)
    assert (one.safe, one.harmful) == (2, 1)
    assert flagged(pa.table({"one": [None, -5.0, 5.0]}), [one]).tolist() == [[False], [True], [False]]
    with pytest.raises(DataError, match=r"^no known harmful row has a score by one: there is nothing to set a threshold by$"):
        threshold("one", np.array([1.0]), np.array([np.nan]), 0.1)


def known() -> tuple[pa.Table, list[str]]:
    kinds = ["good"] * 5 + ["ordinary"] * 5 + ["mislabelled"] * 4 + ["garbled"] * 3
    one = [1.0] * 10 + [-1.0, -1.0, -1.0, 1.0] + [-9.0] * 3
    two = [1.0] * 9 + [-1.0] + [1.0, 1.0, 1.0, -1.0] + [-9.0] * 3
    return pa.table({"id": [str(place) for place in range(17)], "one": one, "two": two}), kinds


def test_only_rows_that_are_known_to_be_safe_or_harmful_set_thresholds():
    table, kinds = known()
    one, two = thresholds(table, kinds, ["one", "two"], 0.05)
    assert (one.safe, one.harmful, one.alarms, one.caught) == (10, 4, 0, 3)
    assert (two.alarms, two.caught) == (0, 0)  # to catch one would flag a safe row as well
    assert [(more.alarms, more.caught) for more in thresholds(table, kinds, ["two"], 0.1)] == [(1, 1)]


def test_together_a_row_is_out_if_enough_scores_flag_it():
    table, kinds = known()
    found = [Threshold(name, 0.0, 10, 0, 4, 0) for name in ("one", "two")]
    one, two = (together(table, kinds, found, agree) for agree in (1, 2))
    assert (one["harmful"][0], one["safe"][0]) == (1.0, 0.1)
    assert (two["harmful"][0], two["safe"][0]) == (0.0, 0.0)


@pytest.mark.parametrize("agree", [1, 2])
def test_every_row_is_kept_left_out_or_not_scored_and_says_why(rows_of, tmp_path: Path, agree):
    rows = sorted(rows_of(40), key=lambda row: row.id)
    values = np.random.default_rng(0).normal(size=(40, 2))
    values[:3] = np.nan
    for number, part in enumerate(np.array_split(np.arange(40), 3)):
        name = f"part-{number:05d}.parquet"
        write_rows([rows[place] for place in part], tmp_path / "in" / name)
        ids = [rows[place].id for place in part]
        columns = {key: pa.array(values[part, at], from_pandas=True) for at, key in enumerate(("one", "two"))}
        write_parquet(pa.table({"id": ids} | columns), tmp_path / "scores" / name)
    found = [Threshold(name, 0.0, 10, 0, 4, 4) for name in ("one", "two")]
    report = write_flags(tmp_path / "in", tmp_path / "scores", found, tmp_path / "out", agree=agree)
    hits = {
        row.id: [name for name, value in zip(("one", "two"), pair, strict=True) if value < 0]
        for row, pair in zip(rows, values, strict=True)
    }
    out = {id for id, names in hits.items() if len(names) >= agree}
    assert (report.rows, report.scored, report.left_out, report.kept) == (40, 37, len(out), 37 - len(out))
    assert report.by_scorer == {name: sum(name in names for names in hits.values()) for name in ("one", "two")}
    got = {row["id"]: row for row in read_table(tmp_path / "out" / "rows").to_pylist()}
    assert {id: row["flagged_by"] for id, row in got.items()} == {id: ", ".join(names) for id, names in hits.items()}
    marks = {row.id: None if place < 3 else -len(hits[row.id]) for place, row in enumerate(rows)}
    assert {id: row[FLAGS] for id, row in got.items()} == marks
    lines = [json.loads(line) for file in (tmp_path / "out" / "left_out").iterdir() for line in file.read_text().splitlines()]
    assert {line["id"] for line in lines} == out
    as_read = [line for file in (tmp_path / "out" / "as_read").iterdir() for line in file.read_text().splitlines()]
    assert sorted(as_read) == sorted(row.raw for row in rows if row.id in out)
    raws = {row.id: row for row in rows}
    assert all(line["row"] == json.loads(raws[line["id"]].raw) and line["source"] == raws[line["id"]].source for line in lines)


def test_what_makes_flags_doubtful_is_told():
    from pharmacist_ray.curation.audit import AuditReport

    report = AuditReport(rows=100, scored=100, left_out=80, by_scorer={"one": 80, "two": 1, "three": 0})
    one, two, three = (Threshold(name, 0, 200, 1, 50, caught) for name, caught in (("one", 50), ("two", 20), ("three", 50)))
    strange, blind = doubts(report, [one, two, three], 0.01)
    assert strange.startswith("one flags 80% of the rows, and 1 of 200 known safe ones: these rows are of another kind")
    assert blind == "two catches 20 of 50 known harmful rows: it does not tell them from safe ones here"
    [few] = doubts(report, [Threshold("three", 0, 50, 0, 50, 50)], 0.01)
    assert few.startswith("50 known safe rows cannot tell 1.0% from none: three flags what lies below all of them")
