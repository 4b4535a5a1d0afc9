"""The calibrated score against SciPy and against definitions written out, whatever the shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest, rankdata

from pharmacist_ray.curation.calibrate import (
    PENALTY,
    PlantedScores,
    calibrate,
    calibration_columns,
    fit_logistic,
    separation,
    weights_of,
    wilson,
)
from pharmacist_ray.curation.combine import rank_sum
from pharmacist_ray.curation.grades import auroc
from pharmacist_ray.curation.planted import FILE, raw_of
from pharmacist_ray.curation.select import Rule, write_selection
from pharmacist_ray.data.rows import write_rows
from pharmacist_ray.data.schema import Row, row_id
from pharmacist_ray.errors import ArtifactError, ConfigError, DataError

COLUMNS = ("pharmacist", "loss_gap")
BAD = ("mislabelled", "garbled", "ordinary", "over_refusal")
Make = Callable[..., tuple[pa.Table, np.ndarray, PlantedScores]]


def test_the_logistic_model_is_the_minimum_that_scipy_finds():
    rng = np.random.default_rng(0)
    for count, k, shift in ((60, 2, 0.2), (40, 3, 2.0), (12, 1, 9.0)):  # from hardly to wholly separable
        x = rng.uniform(-0.5, 0.5, (count, k))
        good = x[:, 0] * shift + rng.normal(size=count) * 0.2 > 0
        weights = rng.uniform(0.1, 1, count)
        weights /= weights.sum()

        def loss(beta: np.ndarray, x: Any = x, good: Any = good, weights: Any = weights) -> float:
            z = beta[0] + x @ beta[1:]
            each = np.log1p(np.exp(np.where(good, -z, z)))
            return float((weights * each).sum() + PENALTY / 2 * (beta[1:] ** 2).sum())

        want = minimize(loss, np.zeros(k + 1), method="BFGS", options={"gtol": 1e-9}).x
        intercept, slopes = fit_logistic(x, good, weights)
        np.testing.assert_allclose([intercept, *slopes], want, atol=2e-4)
        assert loss(np.array([intercept, *slopes])) <= loss(want) + 1e-12


def test_each_kind_of_corruption_weighs_the_same_and_the_good_rows_as_much_as_all_of_them():
    kinds = np.array(["good"] * 7 + ["garbled"] * 2 + ["ordinary"] * 5)
    weights = weights_of(kinds)
    assert [weights[kinds == kind].sum() for kind in ("good", "garbled", "ordinary")] == pytest.approx([0.5, 0.25, 0.25])
    assert len(set(weights[kinds == "good"])) == 1


def test_the_share_of_kept_rows_has_wilsons_interval():
    for hits, count in ((0, 20), (3, 20), (19, 20), (20, 20)):
        found = binomtest(hits, count).proportion_ci(method="wilson")
        assert wilson(hits, count) == pytest.approx((hits / count, found.low, found.high))


def test_the_area_is_that_of_the_grades_and_its_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(5)
    units = np.tile(np.arange(40), 2)
    good = np.arange(80) < 40
    covered, truth = 0, 0.760250  # Φ(1 / √2), for rows of two units; those of one are 1 of 40 pairs
    for _ in range(400):
        shared = np.tile(rng.normal(size=40), 2)  # two rows of a unit are alike
        values = 0.6 * shared + 0.8 * rng.normal(size=80) + good
        area, low, high = separation(values, good, ~good, units)
        assert area == pytest.approx(auroc(values, good))
        covered += low <= truth <= high
    assert 0.9 <= covered / 400 <= 0.99


def test_rows_that_are_wholly_apart_have_an_interval_too():
    values, units = np.array([3.0, 4, 5, 0, 1]), np.arange(5)
    good = values > 2
    assert separation(values, good, ~good, units) == (1.0, pytest.approx(0.025**0.5), 1.0)
    assert separation(-values, good, ~good, units) == (0.0, 0.0, pytest.approx(1 - 0.025**0.5))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a maker of candidates' scores (with which rows are good) and planted ones.

    ``pharmacist`` finds the first two kinds of corruption, ``loss_gap`` the others.
    """

    def draw(kinds: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        finds = (("mislabelled", "garbled"), ("ordinary", "over_refusal"))
        return [np.where(np.isin(kinds, found), -2.5, 0) + rng.normal(size=len(kinds)) for found in finds]

    def made(candidates: int = 2000, units: int = 60, kinds: tuple[str, ...] = BAD, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        labels = rng.choice(("good", *BAD), candidates, p=(0.4, 0.15, 0.15, 0.15, 0.15))
        ids = [row_id(f"c{seed}-{number}", "x") for number in range(candidates)]
        table = pa.table({"id": ids, **dict(zip(COLUMNS, draw(labels, rng), strict=True))})
        rows = [
            Row(row_id(f"p{number}", kind), f"p{number}", kind, category=kind, raw=raw_of(number))
            for kind in ("good", *kinds)
            for number in range(units)
        ]
        rows.sort(key=lambda row: row.id)
        write_rows(rows, tmp_path / "planted" / "rows" / FILE)
        scores = draw(np.array([row.category for row in rows]), rng)
        (tmp_path / "planted" / "scores").mkdir(exist_ok=True)
        planted = pa.table({"id": [row.id for row in rows], **dict(zip(COLUMNS, scores, strict=True))})
        pq.write_table(planted, tmp_path / "planted" / "scores" / FILE)
        where = PlantedScores(tmp_path / "planted" / "rows", tmp_path / "planted" / "scores", COLUMNS)
        return table, labels == "good", where

    return made


def test_it_beats_each_score_where_each_finds_what_the_other_misses(make: Make) -> None:
    table, good, planted = make()
    calibrated = calibrate([table], planted)
    areas = {name: auroc(table[name].to_numpy(), good) for name in COLUMNS}
    assert auroc(calibrated.of(table), good) > max(areas.values()) + 0.1
    assert (calibrated.slopes > 1).all()


def test_it_beats_the_sum_of_ranks_where_one_score_is_noise(make: Make) -> None:
    table, good, planted = make()
    noise = np.random.default_rng(1)
    table = table.set_column(1, "pharmacist", pa.array(noise.normal(size=len(table))))
    scores = pq.read_table(planted.scores / FILE)
    pq.write_table(scores.set_column(1, "pharmacist", pa.array(noise.normal(size=len(scores)))), planted.scores / FILE)
    calibrated = calibrate([table], planted)
    assert auroc(calibrated.of(table), good) > auroc(rank_sum([table], dict.fromkeys(COLUMNS, 1.0)).of(table), good) + 0.02
    assert calibrated.slopes[1] > 5 * abs(calibrated.slopes[0])
    warnings = calibrated.facts(0.4)["warnings"]
    assert [line.split()[4] for line in warnings] == ["mislabelled", "garbled"]
    assert warnings[0] == (
        "no score tells planted mislabelled rows from good ones (every interval of the AUROC holds 0.5): expect such rows among the "
        "kept ones, or add a scorer"
    )


def test_the_score_is_the_models_chance_of_the_ranks_and_a_row_without_one_has_none(make: Make) -> None:
    table, _, planted = make(candidates=100)
    holes = table.set_column(1, "pharmacist", pa.array([None, *table["pharmacist"].to_pylist()[1:]], pa.float64()))
    calibrated = calibrate([holes], planted)
    got = calibrated.of(holes)
    rest = holes.slice(1)
    z = calibrated.intercept + sum(
        slope * ((rankdata(rest[name].to_numpy()) - 0.5) / 99 - 0.5)
        for name, slope in zip(COLUMNS, calibrated.slopes, strict=True)
    )
    np.testing.assert_allclose(got[1:], 1 / (1 + np.exp(-z)), rtol=1e-12)
    assert np.isnan(got[0])


def test_shards_order_and_monotone_changes_of_a_score_change_nothing(make: Make) -> None:
    table, _, planted = make(candidates=300)
    whole = calibrate([table], planted)
    parts = [table.slice(0, 7), table.slice(7, 0), table.slice(7)]
    again = calibrate(parts[::-1], planted)
    np.testing.assert_array_equal(again.of(table), whole.of(table))
    assert again.facts(0.4) == whole.facts(0.4)
    scores = pq.read_table(planted.scores / FILE)
    bend = [one.set_column(1, "pharmacist", pa.array(np.exp(one["pharmacist"].to_numpy()) * 7)) for one in (table, scores)]
    pq.write_table(bend[1], planted.scores / FILE)
    np.testing.assert_array_equal(calibrate([bend[0]], planted).of(bend[0]), whole.of(table))


def test_a_row_is_judged_by_a_model_that_has_not_seen_its_unit(make: Make) -> None:
    """Scores without any signal and many of them: fitted rows would look separated, held-out ones must not."""
    table, _, planted = make(candidates=400, units=10)
    names = tuple(f"noise{number}" for number in range(25))
    rng = np.random.default_rng(2)
    table = pa.table({"id": table["id"], **{name: rng.normal(size=len(table)) for name in names}})
    ids = pq.read_table(planted.scores / FILE)["id"]
    pq.write_table(pa.table({"id": ids, **{name: rng.normal(size=len(ids)) for name in names}}), planted.scores / FILE)
    calibrated = calibrate([table], PlantedScores(planted.rows, planted.scores, names))
    good = calibrated.kinds == "good"
    seen = calibrated.intercept + (calibrated.planted - 0.5) @ calibrated.slopes
    assert auroc(seen, good) > 0.9
    assert auroc(calibrated.places, good) < 0.7


def test_what_is_estimated_of_the_kept_rows_is_near_what_holds_for_the_candidates(make: Make) -> None:
    table, good, planted = make(candidates=4000, units=150)
    calibrated = calibrate([table], planted)
    scores = calibrated.of(table)
    facts = calibrated.facts(0.4)
    top = scores >= np.sort(scores)[-1600]
    kept = facts["kept"]
    assert kept["good"]["low"] < top[good].mean() < kept["good"]["high"]
    assert kept["good"]["planted"] == 150
    assert kept["good"]["estimate"] == kept["good"]["kept"] / 150
    hit = sum(kept[kind]["kept"] for kind in BAD)
    assert hit / 600 == pytest.approx(top[~good].mean(), abs=0.05)
    assert facts["auroc"].keys() == {*COLUMNS, "calibrated"}
    assert facts["auroc"]["pharmacist"]["garbled"]["low"] > 0.9
    assert facts["auroc"]["pharmacist"]["ordinary"]["low"] < 0.5 < facts["auroc"]["pharmacist"]["ordinary"]["high"]
    assert facts["warnings"] == []


def test_kinds_that_were_not_planted_are_named(make: Make) -> None:
    table, _, planted = make(kinds=("mislabelled", "garbled"))
    facts = calibrate([table], planted).facts(0.4)
    assert facts["kept"].keys() == {"good", "mislabelled", "garbled"}
    assert facts["warnings"] == [
        "no ordinary or over_refusal rows were planted, so nothing is known about them; data.benign gives what they are made of"
    ]


def test_no_planted_row_is_selected_and_the_manifest_says_what_the_score_is_made_of(make: Make, tmp_path: Path) -> None:
    table, _, planted = make(candidates=200)
    table = table.sort_by("id")
    rows = [Row(id, "p", "x", source="made", raw="{}") for id in table["id"].to_pylist()]
    (tmp_path / "scores").mkdir()
    for shard, part in enumerate((slice(0, 60), slice(60, 200))):
        write_rows(rows[part], tmp_path / "candidates" / "rows" / f"part-{shard:05d}.parquet")
        pq.write_table(table.slice(part.start, part.stop - part.start), tmp_path / "scores" / f"part-{shard:05d}.parquet")
    places = (tmp_path / "candidates", tmp_path / "scores")
    report = write_selection(*places, Rule("calibrated", count=50), tmp_path / "out", provenance={}, planted=planted)
    kept = pq.read_table(tmp_path / "out" / "rows")["id"].to_pylist()
    scores = calibrate([table], planted).of(table)
    assert set(kept) == {table["id"][int(place)].as_py() for place in np.argsort(-scores)[:50]}
    assert not set(kept) & set(pq.read_table(planted.rows / FILE)["id"].to_pylist())
    assert report.cut == pytest.approx(np.sort(scores)[-50])
    calibration = json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"]
    assert calibration == calibrate([table], planted).facts(0.25)
    write_selection(*places, Rule("loss_gap", count=50), tmp_path / "plain", provenance={})
    assert "calibration" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())


def test_errors(make: Make) -> None:
    table, _, planted = make(candidates=50)
    scores = pq.read_table(planted.scores / FILE)
    kinds = pq.read_table(planted.rows / FILE)["category"].to_pylist()
    seen = {"good": 0}
    holes = []
    for kind, value in zip(kinds, scores["loss_gap"].to_pylist(), strict=True):
        seen["good"] += kind == "good"
        holes.append(None if kind == "good" and seen["good"] > 4 else value)
    pq.write_table(scores.set_column(2, "loss_gap", pa.array(holes, pa.float64())), planted.scores / FILE)
    message = (
        "^only 4 of the good planted rows have every score of pharmacist, loss_gap, and a calibrated selection needs 5; give more "
        "trusted rows, or select by another score$"
    )
    with pytest.raises(DataError, match=message):
        calibrate([table], planted)
    pq.write_table(scores.slice(1), planted.scores / FILE)
    with pytest.raises(ArtifactError, match=r"has the scores of other planted rows; score again$"):
        calibrate([table], planted)


def test_what_sees_labels_or_nothing_takes_no_part():
    assert calibration_columns(["random", "less", "oracle", "keyword", "naive_bayes", "pharmacist_iterative"]) == (
        "less",
        "naive_bayes",
    )
    with pytest.raises(
        ConfigError,
        match=r"^only scores that see .* can be held against known ones, and scoring\.scorers has none",
    ):
        calibration_columns(["random", "oracle", "keyword"])
