from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from pharmacist_ray.config.schema import SearchConfig
from pharmacist_ray.search.agreement import agreement, spearman

SEARCH = SearchConfig(space={"seed": [0, 1]})


def trials(*worst: float, accuracy: float = 0.9) -> list[dict[str, Any]]:
    numbers = {"task_accuracy": accuracy, "over_refusal": 0.1, "align_seconds": 5.0}
    return [{"trial": f"t{place}", "worst_hs": hs, "mean_hs": hs, **numbers} for place, hs in enumerate(worst)]


def test_the_rank_correlation_is_that_of_scipy_also_with_ties():
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 5, (2, 12)) / 4
        assert spearman(a.tolist(), b.tolist()) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman([0.0, 0.0, 0.0], [0.1, 0.2, 0.3]) is None
    assert spearman([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]) is None


def test_a_look_that_ranks_as_the_end_does_costs_nothing():
    worst = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = agreement("p10", trials(*worst), worst, SEARCH)
    assert (found.attack, found.trials, found.spearman, found.lost, found.regret) == ("p10", 6, pytest.approx(1), 0.0, 0.0)
    assert 0.3 < found.stopped < 0.7
    keen = SEARCH.model_copy(update={"early": SEARCH.early.model_copy(update={"reduction_factor": 5.0})})
    assert agreement("p10", trials(*worst), worst, keen).stopped > found.stopped


def test_a_look_that_ranks_the_other_way_round_loses_the_best_trial():
    worst = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = agreement("p10", trials(*worst), worst[::-1], SEARCH)
    assert found.spearman == pytest.approx(-1)
    # The best has the worst look: it goes on only if it arrives first, in one of six orders.
    assert found.lost == pytest.approx(5 / 6, abs=0.04)
    assert found.regret > 0.2


def test_a_look_that_sees_no_difference_stops_nothing():
    found = agreement("p0", trials(0.1, 0.2, 0.3), [0.0, 0.0, 0.0], SEARCH)
    assert (found.spearman, found.stopped, found.lost, found.regret) == (None, 0.0, 0.0, 0.0)
