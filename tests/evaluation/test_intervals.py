from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pharmacist_ray.errors import ConfigError, DataError
from pharmacist_ray.evaluation import intervals
from pharmacist_ray.evaluation.intervals import Interval, Sample, estimate


def mean(m):
    return m


def sample(values, axes="sc", draw="") -> Sample:
    """Return an array as a sample; each axis is a world (w), a draw (d), a seed (s), a cluster (c) or a prompt in it (p)."""
    values = np.asarray(values, dtype=float)
    at = dict(zip(axes, np.indices(values.shape).reshape(values.ndim, -1), strict=True))
    none = np.zeros(values.size, dtype=int)
    return Sample(
        values.ravel().tolist(),
        [f"w{n}" for n in at.get("w", none)],
        [f"{n}" for n in at["d"]] if "d" in at else [draw] * values.size,
        at.get("s", none).tolist(),
        [f"c{n:04}" for n in at.get("c", none)],
    )


def margin(found: Interval) -> float:
    assert found.high - found.estimate == pytest.approx(found.estimate - found.low)
    return found.high - found.estimate


def test_few_worlds_give_students_interval_of_their_means():
    values = np.random.default_rng(0).normal(size=(5, 3, 7))
    found = estimate(mean, [sample(values, "wsc")], seed=0, draws=40_000)
    means = values.mean(axis=(1, 2))
    assert found.estimate == pytest.approx(means.mean())
    assert margin(found) == pytest.approx(stats.t.ppf(0.975, 4) * means.std(ddof=1) / math.sqrt(5), rel=0.02)
    assert found.units == 5


def test_one_run_gives_students_interval_of_its_cluster_means():
    values = np.random.default_rng(1).normal(size=(1, 9, 4))
    found = estimate(mean, [sample(values, "scp")], seed=0, draws=40_000)
    means = values.mean(axis=(0, 2))
    assert margin(found) == pytest.approx(stats.t.ppf(0.975, 8) * means.std(ddof=1) / 3, rel=0.02)
    assert found.units == 9


def test_runs_and_clusters_are_crossed_as_the_analysis_of_variance_has_it():
    """The variance of a mean over two crossed random factors: mean squares of rows plus columns minus cells."""
    draw = np.random.default_rng(2)
    values = draw.normal(size=(4, 1)) + draw.normal(size=(1, 6)) + 0.5 * draw.normal(size=(4, 6))
    rows, columns = values.mean(axis=1).var(ddof=1) / 4, values.mean(axis=0).var(ddof=1) / 6
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    cells = (rest**2).sum() / (3 * 5) / 24
    freedom = (rows + columns) ** 2 / (rows**2 / 3 + columns**2 / 5)
    found = estimate(mean, [sample(values)], seed=0, draws=40_000)
    # What is taken for the cells' own is a little larger here, for clusters differ within a run.
    assert margin(found) == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(rows + columns - cells), rel=0.1)


def test_many_clusters_give_the_percentiles_of_a_bootstrap_and_repeated_prompts_say_nothing_new():
    values = (np.random.default_rng(3).random(200) < 0.3).astype(float)
    found = estimate(mean, [sample(values[None, :])], seed=0, draws=20_000)
    error = values.std() / math.sqrt(200)
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - 1.96 * error, abs=0.005), pytest.approx(values.mean() + 1.96 * error, abs=0.005),
    )  # fmt: skip
    assert estimate(mean, [sample(np.tile(values[None, :, None], 5), "scp")], seed=0, draws=20_000).low == pytest.approx(
        found.low
    )


def test_draws_and_seeds_are_factors_and_not_so_many_runs():
    luck = np.array([0.0, 0.5, 1.0])
    values = np.tile(luck[:, None, None], (1, 3, 50))  # (draws, seeds, prompts): all is the luck of the draw
    found = estimate(mean, [sample(values, "dsc")], seed=0, draws=40_000)
    assert margin(found) == pytest.approx(stats.t.ppf(0.975, 2) * luck.std(ddof=1) / math.sqrt(3), rel=0.02)
    as_runs = stats.t.ppf(0.975, 8) * np.repeat(luck, 3).std(ddof=1) / 3
    assert margin(found) > 2 * as_runs


def test_what_arms_share_is_drawn_once_for_all_of_them():
    draw = np.random.default_rng(4)
    hard, luck = draw.random(40), draw.random(4)
    a = hard + luck[:, None]
    same = estimate(lambda x, y: x - y, [sample(a + 0.25), sample(a)], seed=0)
    assert (same.estimate, same.low, same.high) == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))
    other = Sample(**{**vars(sample(a)), "seeds": [seed + 9 for seed in sample(a).seeds]})
    assert margin(estimate(lambda x, y: x - y, [sample(a), other], seed=0)) > 0.2


def test_a_run_without_a_draw_weighs_the_same_whichever_draws_the_other_arm_takes():
    values = np.random.default_rng(5).random((3, 2, 40))
    alone = sample(values[0], "sc")
    found = estimate(lambda x, y: y, [sample(values, "dsc"), alone], seed=0, draws=4000)
    assert margin(found) == pytest.approx(margin(estimate(mean, [alone], seed=0, draws=4000)))


def test_any_function_of_the_means_has_an_interval():
    draw = np.random.default_rng(6)
    a, b = 3 + draw.normal(size=(8, 1, 20)), 2 + draw.normal(size=(8, 1, 20))
    found = estimate(lambda x, y: x / y, [sample(a, "wsc"), sample(b, "wsc")], seed=0, draws=20_000)
    x, y = a.mean(axis=(1, 2)), b.mean(axis=(1, 2))
    ratio = x.mean() / y.mean()
    error = (x - ratio * y).std(ddof=1) / y.mean() / math.sqrt(8)  # the delta method
    assert found.estimate == pytest.approx(ratio)
    assert margin(found) == pytest.approx(stats.t.ppf(0.975, 7) * error, rel=0.05)


def test_a_quantity_does_not_leave_its_limits_and_nothing_is_known_from_one_unit():
    found = estimate(mean, [sample([[0.0, 0.0, 1.0]])], seed=0, limits=(0.0, 1.0))
    assert (found.low, found.high) == (0.0, 1.0)
    assert estimate(mean, [sample([[0.5]])], seed=0, limits=(0.0, 1.0)) == Interval(0.5, 0.0, 1.0, 1)


def test_every_run_and_every_world_weighs_the_same_whatever_lacks_a_value():
    values = np.array([[[1.0, math.nan, math.nan], [0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [math.nan, math.nan, math.nan]]])
    assert estimate(mean, [sample(values[0])], seed=0).estimate == 0.5
    assert estimate(mean, [sample(values, "wsc")], seed=0).estimate == (0.5 + 1.0) / 2


def test_more_clusters_than_are_drawn_are_put_together_and_tell_the_same(monkeypatch):
    values = np.random.default_rng(7).normal(size=(1, 4000))
    whole = estimate(mean, [sample(values)], seed=0)
    monkeypatch.setattr(intervals, "CLUSTERS", 400)
    parts = estimate(mean, [sample(values)], seed=0)
    assert parts.units == 400
    assert parts.high - parts.low == pytest.approx(whole.high - whole.low, rel=0.15)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.1)


@pytest.mark.parametrize("clusters", [3, 5, 9])
@pytest.mark.parametrize("kind", ["worlds", "clusters of one run", "seeds"])
def test_intervals_cover_the_truth_as_often_as_they_say(clusters, kind):
    """Simulated: a nominal 95 % covers 90 to 98 %, though answers of one cluster, or of one run, resemble each other."""
    draw = np.random.default_rng([clusters, len(kind)])
    hits, times = 0, 400
    for number in range(times):
        luck = 0.3 * draw.normal(size=(clusters, 1, 1))
        if kind == "worlds":
            one = sample(luck + 0.5 * draw.normal(size=(clusters, 2, 5)), "wsc")
        elif kind == "seeds":
            one = sample(luck + 0.2 * draw.normal(size=(1, 10, 1)) + 0.5 * draw.normal(size=(clusters, 10, 3)), "scp")
        else:
            one = sample((luck + 0.5 * draw.normal(size=(clusters, 1, 5))).transpose(1, 0, 2), "scp")
        found = estimate(mean, [one], seed=number % 4, draws=300)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / times <= 0.98


def test_the_seed_fixes_the_interval():
    values = [sample([[0.0, 1.0, 1.0, 0.0] * 20])]
    assert estimate(mean, values, seed=3) == estimate(mean, values, seed=3)
    assert estimate(mean, values, seed=3, draws=50) != estimate(mean, values, seed=4, draws=50)


def test_errors_say_what_to_do():
    with pytest.raises(DataError, match=r"an interval needs at least one value in every sample"):
        estimate(mean, [sample([[math.nan]])], seed=0)
    with pytest.raises(ConfigError, match=r"bootstrap_draws must be at least 1, got 0"):
        estimate(mean, [sample([[1.0]])], seed=0, draws=0)
    with pytest.raises(ConfigError, match=r"level of an interval must lie between 0 and 1, got 95"):
        estimate(mean, [sample([[1.0]])], seed=0, level=95)
