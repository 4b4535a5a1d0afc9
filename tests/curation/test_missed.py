"""The bound and the interval, against an enumeration, and against simulated cascades whose truth is known."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta

from pharmacist_ray.curation.missed import fewest_members, in_words, lost, lowest_taken


def chances(wanted: int, missed: int, members: int) -> list[Fraction]:
    """How likely each number of misses is among ``members`` of ``wanted`` rows, so many of them missed: counted, not looked up."""
    ways = [math.comb(missed, x) * math.comb(wanted - missed, members - x) for x in range(members + 1)]
    return [Fraction(way, math.comb(wanted, members)) for way in ways]


@pytest.mark.parametrize(("wanted", "members", "missed"), [(30, 10, 0), (30, 10, 3), (30, 10, 10), (25, 24, 1), (40, 7, 6)])
def test_the_interval_is_that_of_the_numbers_that_the_sample_does_not_speak_against(
    wanted: int, members: int, missed: int
) -> None:
    possible = []
    for more in range(wanted - members + 1):
        of_each = chances(wanted, missed + more, members)
        if sum(of_each[missed:]) > Fraction(1, 40) and sum(of_each[: missed + 1]) > Fraction(1, 40):
            possible.append(more)
    found = lost(wanted, members, missed, outside=10**6)
    assert (found.low, found.high) == (min(possible) / wanted, max(possible) / wanted)
    assert found.estimate == pytest.approx(missed / members * (wanted - members) / wanted)


def test_of_very_many_rows_it_is_clopper_and_pearsons() -> None:
    found = lost(400_000_000, 800, 16, outside=10**9)
    low, high = beta.ppf(0.025, 16, 785), beta.ppf(0.975, 17, 784)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.02, low, high), rel=1e-4)


def test_no_more_is_lost_than_there_are_rows_that_nobody_saw() -> None:
    nothing = lost(100, 20, 0, outside=0)
    assert (nothing.estimate, nothing.low, nothing.high) == (0, 0, 0)
    assert lost(100, 20, 0, outside=3).high == 0.03
    whole = lost(100, 100, 7, outside=50)  # all of the top rows are in the sample, so none is lost
    assert (whole.estimate, whole.low, whole.high) == (0, 0, 0)
    blind = lost(100, 0, 0, outside=500)  # a sample without any says nothing
    assert (blind.estimate, blind.low, blind.high) == (1, 0, 1)


@pytest.mark.parametrize(("wanted", "members", "miss"), [(12, 5, 0.2), (12, 5, 0.05), (9, 3, 0.3), (14, 10, 0.1), (11, 11, 0.01)])
def test_the_last_row_that_is_passed_on_is_the_lowest_by_which_the_mean_loss_stays_under_the_bound(
    wanted: int, members: int, miss: float
) -> None:
    """The mean over all samples of the top rows, which stand in some order with the proxy, added up one by one."""

    def mean_loss(taken: int) -> Fraction:
        total = Fraction(0)
        for place in range(wanted):  # of the row that stands taken-th lowest, counted from the lowest
            ways = math.comb(place, taken - 1) * math.comb(wanted - place - 1, members - taken)
            total += Fraction(ways, math.comb(wanted, members)) * (place - (taken - 1))
        return total / wanted

    taken = lowest_taken(wanted, members, miss)
    allowed = [number for number in range(1, members + 1) if mean_loss(number) <= miss + 1e-12]
    assert taken == max(allowed, default=0)


def test_a_sample_needs_so_many_top_rows_that_one_of_them_may_be_missed() -> None:
    for miss in (0.02, 0.05, 0.1, 0.3):
        fewest = fewest_members(miss)
        assert lowest_taken(10**9, fewest, miss) == 1
        assert lowest_taken(10**9, fewest - 1, miss) == 0
    assert fewest_members(0.02) == 49


def as_good(values: NDArray[Any], points: NDArray[Any]) -> NDArray[Any]:
    """How many values are as high as each point, or higher."""
    return len(values) - np.searchsorted(np.sort(values), points, side="left")


def cascade(large: NDArray[Any], proxy: NDArray[Any], share: float, rows: int, miss: float, draw: Any) -> tuple[float, ...]:
    """A cascade in a few lines: what is lost in truth, and what the sample says about it."""
    total, wanted = len(large), round(share * len(large))
    top = np.zeros(total, bool)
    top[np.argsort(-large)[:wanted]] = True
    sample = draw.random(total) < rows / total
    of_sample = np.flatnonzero(sample)
    members = math.ceil(wanted * len(of_sample) / total)
    taken = lowest_taken(wanted, members, miss)
    standing = np.sort(proxy[of_sample[np.argsort(-large[of_sample])[:members]]])
    passed = proxy >= (min(standing[taken - 1], np.sort(proxy)[-wanted]) if taken else -np.inf)
    rest = sample & ~passed
    truth = (top & ~passed & ~sample).sum() / wanted
    better, others = (as_good(large[rows], large[of_sample]) for rows in (passed, rest))
    mine = better + others * ((~passed).sum() + 1) / (rest.sum() + 1) <= wanted
    stated = lost(wanted, int(mine.sum()), int((mine & ~passed[of_sample]).sum()), int((~passed & ~sample).sum()))
    return truth, stated.low, stated.high


@pytest.mark.parametrize(
    ("total", "share", "alike", "rows", "miss"),
    [(4000, 0.4, 0.8, 500, 0.02), (4000, 0.1, 0.95, 1500, 0.05), (600, 0.4, 0.9, 150, 0.05), (600, 0.3, 0.0, 300, 0.1)],
)
def test_what_is_lost_stays_under_the_bound_on_average_and_in_the_interval_nearly_always(
    total: int, share: float, alike: float, rows: int, miss: float
) -> None:
    draw = np.random.default_rng(7)
    found = []
    for _ in range(300):
        large = draw.standard_normal(total)
        proxy = alike * large + math.sqrt(1 - alike**2) * draw.standard_normal(total)
        found.append(cascade(large, proxy, share, rows, miss, draw))
    truth, low, high = np.array(found).T
    error = truth.std() / math.sqrt(len(truth))
    assert truth.mean() <= miss + 2 * error
    assert truth.mean() > miss / 2  # and not by sending everything on
    assert ((low <= truth + 1e-12) & (truth <= high + 1e-12)).mean() >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / len(truth))


def test_the_statement_in_words() -> None:
    arm = {"wanted": 400, "members": 60, "missed": 1, "estimate": 0.014, "low": 0.0, "high": 0.071, "enough": True}
    few = arm | {"members": 12, "missed": 0, "estimate": 0.0, "high": 0.0, "enough": False}
    facts = {
        "candidates": 1000, "sampled": 150, "passed_on": 520, "seen": 590, "miss": 0.02, "level": 0.95,
        "arms": {"pharmacist": arm, "loss_gap": few},
    }  # fmt: skip
    assert in_words(facts) == [
        "the model saw 590 of 1,000 rows (59%): 150 drawn at random and 440 more that the proxy passed on",
        "pharmacist: of the model's own top 400 an estimated 1.4% is lost, with 95% confidence 0.0% to 7.1% (1 of 60 in the sample are "
        "missed)",
        "loss_gap: of the model's own top 400 an estimated 0.0% is lost, with 95% confidence 0.0% to 0.0% (0 of 12 in the sample are "
        "missed)",
        "warning: loss_gap: the sample has 12 of the model's top rows, too few to leave anything out at scoring.proxy.miss=0.02, for which "
        "it takes 49: raise scoring.proxy.sample",
    ]
