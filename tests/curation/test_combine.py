"""Rank sums against SciPy's ranks, whatever the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

from pharmacist_ray.curation import combine
from pharmacist_ray.curation.combine import best_rank, rank_sum
from pharmacist_ray.curation.select import Rule, select_ids
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ConfigError

WEIGHTS = {"a": 1.0, "b": 3.0}


def table_of(count: int, seed: int = 0) -> pa.Table:
    generator = np.random.default_rng(seed)
    ids = [row_id(f"p{number}", "x") for number in range(count)]
    a = np.round(generator.normal(size=count), 1)  # with ties
    return pa.table({"id": ids, "a": a, "b": a * 0.5 + generator.normal(size=count) * 1e6})


def test_it_is_the_weighted_mean_of_mid_ranks():
    table = table_of(50)
    want = sum(w * (rankdata(table[name].to_numpy()) - 0.5) / 50 for name, w in WEIGHTS.items()) / 4
    np.testing.assert_allclose(rank_sum([table], WEIGHTS).of(table), want, rtol=1e-12)


def test_columns_that_take_turns_keep_what_a_round_robin_takes(tmp_path: Path):
    table = table_of(60)
    scores = {name: np.random.default_rng(seed).permutation(60).astype(float) for seed, name in enumerate("abc")}
    table = pa.table({"id": table["id"], **scores})
    orders = {name: np.argsort(-values) for name, values in scores.items()}
    found = best_rank([table.slice(0, 20), table.slice(20)], list("abc")).of(table)
    taken: set[int] = set()
    for turn in range(12):
        for order in orders.values():
            taken.add(int(order[turn]))  # what another gave already counts as given
        assert set(np.argsort(-found, kind="stable")[: len(taken)].tolist()) == taken
    ids = table["id"].to_pylist()
    write_rows([Row(id, "p", "x") for id in sorted(ids)], tmp_path / "candidates" / "rows" / "part-00000.parquet")
    (tmp_path / "scores").mkdir()
    pq.write_table(table.sort_by("id"), tmp_path / "scores" / "part-00000.parquet")
    rule = Rule("coverage", count=len(taken), turns=("a", "b", "c"))
    kept = [id for one in select_ids(tmp_path / "scores", tmp_path / "candidates", rule) for id in one["id"].to_pylist()]
    assert kept == sorted(ids[place] for place in taken)


def test_shards_and_monotone_changes_of_a_score_change_nothing():
    table = table_of(60)
    whole = rank_sum([table], WEIGHTS).of(table)
    parts = [table.slice(0, 7), table.slice(7, 0), table.slice(7)]
    np.testing.assert_array_equal(rank_sum(parts[::-1], WEIGHTS).of(table), whole)
    bent = table.set_column(1, "a", pa.array(np.exp(table["a"].to_numpy())))
    np.testing.assert_array_equal(rank_sum([bent], WEIGHTS).of(bent), whole)


def test_a_row_without_one_of_the_scores_has_none_and_counts_for_nobody():
    table = table_of(20)
    holes = [None if number in (3, 4) else value for number, value in enumerate(table["b"].to_pylist())]
    broken = table.set_column(2, "b", pa.array(holes, pa.float64()))
    found = rank_sum([broken], WEIGHTS).of(broken)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 4]
    rest = table.filter(pa.array([number not in (3, 4) for number in range(20)]))
    np.testing.assert_array_equal(found[~np.isnan(found)], rank_sum([rest], WEIGHTS).of(rest))


def test_among_more_rows_than_the_sample_ranks_are_those_of_rows_chosen_by_id(monkeypatch):
    table = table_of(4000)
    exact = rank_sum([table], WEIGHTS).of(table)
    monkeypatch.setattr(combine, "SAMPLE", 1000)
    parts = [table.slice(first, 500) for first in range(0, 4000, 500)]
    near = rank_sum(parts, WEIGHTS)
    assert {len(values) for values in near.values.values()} == {1000}
    assert np.abs(near.of(table) - exact).max() < 0.06
    np.testing.assert_array_equal(rank_sum(parts[::-1], WEIGHTS).of(table), near.of(table))


def test_a_selection_keeps_the_best_by_the_sum_and_names_a_column_that_is_not_there(tmp_path: Path):
    rows = sorted(
        (Row(row_id(f"p{number}", "x"), f"p{number}", "x", source="made", raw="{}") for number in range(30)),
        key=lambda row: row.id,
    )
    generator = np.random.default_rng(1)
    scores = pa.table({"id": [row.id for row in rows], "a": generator.normal(size=30), "b": generator.normal(size=30)})
    (tmp_path / "scores").mkdir()
    for shard, part in enumerate((slice(0, 11), slice(11, 30))):
        write_rows(rows[part], tmp_path / "candidates" / "rows" / f"part-{shard:05d}.parquet")
        pq.write_table(scores.slice(part.start, part.stop - part.start), tmp_path / "scores" / f"part-{shard:05d}.parquet")
    rule = Rule("both", count=5, weights=WEIGHTS)
    kept = [id for table in select_ids(tmp_path / "scores", tmp_path / "candidates", rule) for id in table["id"].to_pylist()]
    sums = rankdata(scores["a"].to_numpy()) + 3 * rankdata(scores["b"].to_numpy())
    assert set(kept) == {scores["id"][int(place)].as_py() for place in np.argsort(-sums)[:5]}
    with pytest.raises(ConfigError, match=r"^unknown scorer 'c'; known: a, b$"):
        list(select_ids(tmp_path / "scores", tmp_path / "candidates", Rule("both", count=5, weights={"a": 1.0, "c": 1.0})))
