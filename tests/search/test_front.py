from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pharmacist_ray.search.front import non_dominated, on_front, recommend, time_levels


def brute_force(costs: list[list[float]]) -> list[bool]:
    found = []
    for mine in costs:
        beaten = False
        for other in costs:
            no_worse = all(o <= m for o, m in zip(other, mine, strict=True))
            better = any(o < m for o, m in zip(other, mine, strict=True))
            beaten = beaten or (no_worse and better)
        found.append(not beaten)
    return found


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_the_front_is_what_a_loop_over_all_pairs_finds(objectives):
    for seed in range(30):
        costs = np.random.default_rng(seed).integers(0, 4, (25, objectives)).astype(float)  # with ties and equal points
        assert non_dominated(costs).tolist() == brute_force(costs.tolist())


def trial(
    name: str, hs: float, accuracy: float = 0.9, refusal: float = 0.1, seconds: float = 5.0, **more: float
) -> dict[str, Any]:
    numbers = {"worst_hs": hs, "mean_hs": hs, "task_accuracy": accuracy, "over_refusal": refusal, "align_seconds": seconds}
    return {"trial": name, **numbers, **more}


def test_more_accuracy_is_better_and_more_of_the_rest_is_worse():
    best = trial("best", 0.2)
    others = [
        trial("hs", 0.3),
        trial("accuracy", 0.2, accuracy=0.8),
        trial("refusal", 0.2, refusal=0.2),
        trial("s", 0.2, seconds=6),
    ]
    assert on_front([*others, best], 0.0) == [False] * 4 + [True]
    apart = [trial("low", 0.1, accuracy=0.5), trial("quick", 0.5, seconds=1), trial("open", 0.5, refusal=0.0)]
    assert on_front([best, *apart], 0.0) == [True] * 4
    assert on_front([best, best], 0.0) == [True, True]
    assert on_front([], 0.0) == []


def test_times_that_differ_by_little_count_as_the_shortest_of_them():
    seconds = [7.8, 5.6, 16.4, 5.8, 13.7, 8.5, 6.5]
    assert time_levels(seconds, 0.5) == [5.6, 5.6, 13.7, 5.6, 13.7, 8.5, 5.6]
    assert time_levels(seconds, 0.0) == seconds
    assert time_levels([10.0, 11.0, 12.1], 0.1) == [10.0, 10.0, 12.1]  # no chain: the last is more than a tenth above the first
    assert time_levels([0.0, 0.0, 1.0], 0.5) == [0.0, 0.0, 1.0]


def test_nobody_is_on_the_front_for_a_little_luck_with_time():
    good, lucky, quick = trial("good", 0.2, seconds=6.5), trial("lucky", 0.5, seconds=5.6), trial("quick", 0.6, seconds=3.0)
    assert on_front([good, lucky, quick], 0.0) == [True, True, True]
    assert on_front([good, lucky, quick], 0.5) == [True, False, True]
    assert recommend([lucky, good, quick], 0.05, 0.5)[1].startswith("Of the 2 of 2 trials on the Pareto front")


def test_what_is_beaten_within_the_tolerance_is_beaten_by_one_on_the_front():
    generator = np.random.default_rng(0)
    for _ in range(200):
        numbers = generator.integers(0, 3, (12, 3)) / 4
        trials = [trial(str(place), *map(float, row), seconds=generator.uniform(5, 20)) for place, row in enumerate(numbers)]
        front = on_front(trials, 0.3)
        levels = time_levels([one["align_seconds"] for one in trials], 0.3)
        costs = [[t["worst_hs"], -t["task_accuracy"], t["over_refusal"], s] for t, s in zip(trials, levels, strict=True)]
        best = [cost for cost, kept in zip(costs, front, strict=True) if kept]
        for cost, kept in zip(costs, front, strict=True):
            assert kept or any(all(b <= c for b, c in zip(other, cost, strict=True)) and other != cost for other in best)


def test_the_lowest_harmful_score_is_recommended_among_those_that_still_do_their_work():
    mute, shy, good, open_ = (
        trial("mute", 0.0, accuracy=0.1),
        trial("shy", 0.05, refusal=0.3),
        trial("good", 0.2, accuracy=0.85),
        trial("open", 0.6),
    )
    chosen, reason = recommend([mute, shy, good, open_], 0.05, 0.0)
    assert chosen is good  # 0.85 is within 0.05 of 0.9
    assert reason == (
        "Of the 2 of 4 trials on the Pareto front whose task accuracy is within 0.05 of the best (0.900) and whose over-refusal is "
        "within 0.05 of the least (0.100), it has the lowest worst harmful score after an attack: 0.200 (task accuracy 0.850, "
        "over-refusal 0.100)."
    )
    assert recommend([mute, shy, good, open_], 0.04, 0.0)[0] is open_
    assert recommend([mute, shy, good, open_], 0.2, 0.0)[0] is shy
    assert recommend([mute, shy, good, open_], 1.0, 0.0)[0] is mute


def test_equal_harmful_scores_are_told_apart_by_the_mean_then_by_accuracy():
    worse = trial("a", 0.2, accuracy=0.9, mean_hs=0.2)
    assert recommend([worse, trial("b", 0.2, accuracy=0.88, mean_hs=0.1, seconds=1)], 0.05, 0.0)[0]["trial"] == "b"
    assert recommend([trial("a", 0.2, accuracy=0.88, seconds=1), trial("b", 0.2, accuracy=0.9)], 0.05, 0.0)[0]["trial"] == "b"


def test_where_no_trial_is_within_both_the_nearest_is_taken_and_the_reason_says_so():
    trials = [trial("able", 0.1, accuracy=0.9, refusal=0.5), trial("open", 0.3, accuracy=0.5, refusal=0.1)]
    near = trial("near", 0.7, accuracy=0.8, refusal=0.2)
    chosen, reason = recommend([*trials, near], 0.05, 0.0)
    assert chosen is near
    assert (
        "none is within 0.05 of the best task accuracy (0.900) and the least over-refusal (0.100); of those that come nearest"
        in reason
    )
