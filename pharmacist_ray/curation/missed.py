"""How much of the large model's top a cascade loses: bounded before its rows are chosen, and stated with an interval afterwards.

Of N candidates, M are the k that the large model would keep if it saw all. It sees G, the rows that the proxy passes on, and S, a random
sample; what is lost is the part of M outside both. Nothing is assumed about how the two models' scores hang together. What is assumed
is that S is drawn at random, by a hash of ids that no score depends on, and that a row's score does not hang on who is scored beside it.

**The choice.** S's own top rows, m = ⌈k n / N⌉ of n, are a random draw of M. Pass on every candidate that stands at least as high with
the proxy as the one of them that stands j-th lowest. How many of M stand lower is then negative hypergeometric whatever the scores are
(Wilks 1941, distribution-free tolerance limits; the same argument as split conformal prediction): of the k rows j (k + 1) / (m + 1) − 1 on
average, of which j − 1 are in the sample and so not lost. The expected loss is j (k − m) / (m + 1) rows, and j the largest for which that
is at most ``miss`` · k. Where even j = 1 is too many (m + 1 < 1 / ``miss``), nothing can be left out.

That the sample's own cut stands for the large model's, which is not known yet, shifts who counts as top by a few rows near the cut. To
first order it shifts as many in as out, and in simulations the mean loss stays below ``miss`` (``tests/curation/test_missed.py``).

**The statement.** When the large model has seen G and S, its cut is known but for the rows that it never saw, and these the sample tells by
their number. Of m rows of M in the sample, x were missed by the proxy. How many of all k were follows by inverting the hypergeometric
distribution's tails, as Clopper and Pearson (1934) do with the binomial's, of which it is the form for a finite population (Buonaccorsi
1987). The interval holds at least at its level where G does not hang on the sample. Here it does, by the place of one row; how often it
holds is measured too, by the same simulations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95
"""Coverage of the interval."""


@dataclass(frozen=True)
class Lost:
    """The share of the large model's top rows that a cascade loses."""

    estimate: float
    low: float
    high: float


def lowest_taken(wanted: int, members: int, miss: float) -> int:
    """Return j: rows that stand as high with the proxy as the j-th lowest of the sample's top rows are passed on; 0: all rows have to be.

    Args:
        wanted: k, the rows that are kept.
        members: m, the sample's top rows.
        miss: Expected share of the k that may be lost.
    """
    if members >= wanted:
        return members
    return min(members, math.floor(miss * wanted * (members + 1) / (wanted - members) + 1e-9))


def fewest_members(miss: float) -> int:
    """Return how many of its top rows a sample needs at least, so that anything can be left out."""
    return math.ceil(1 / miss - 1e-9) - 1


def lost(wanted: int, members: int, missed: int, outside: int, level: float = LEVEL) -> Lost:
    """Return the share of the large model's top rows that is lost, with its interval.

    Args:
        wanted: k, the rows that are kept.
        members: m, those of them in the sample.
        missed: x, those of the sample's that the proxy does not pass on.
        outside: Candidates that the proxy does not pass on and the large model did not see: no more can be lost.
        level: Coverage of the interval.
    """
    from scipy.stats import hypergeom  # takes a second, and only a cascade's end gets here

    members = min(members, wanted)
    unseen = wanted - members  # of the k, those that are not in the sample
    most, tail = min(unseen, outside), (1 - level) / 2
    estimate = min(most, missed / members * unseen if members else most)

    def above(more: int) -> float:
        """The chance of so many misses or more, if so many more rows are missed outside the sample."""
        return float(hypergeom.sf(missed - 1, wanted, missed + more, members))

    def below(more: int) -> float:
        return float(hypergeom.cdf(missed, wanted, missed + more, members))

    low = _first(most, lambda more: above(more) > tail)
    high = _first(most, lambda more: below(more) <= tail)
    high = most if below(high) > tail else max(0, high - 1)
    return Lost(estimate / wanted, low / wanted, high / wanted)


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """Return the first of 0 … last for which something holds that holds for all after it; the last if it holds for none before."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def in_words(facts: Mapping[str, Any]) -> list[str]:
    """Return what a cascade's facts say, a line each."""
    whole = max(1, facts["candidates"])
    lines = [
        f"the model saw {facts['seen']:,} of {facts['candidates']:,} rows ({facts['seen'] / whole:.0%}): {facts['sampled']:,} drawn at "
        f"random and {facts['seen'] - facts['sampled']:,} more that the proxy passed on"
    ]
    for arm, one in facts["arms"].items():
        lines.append(
            f"{arm}: of the model's own top {one['wanted']:,} an estimated {one['estimate']:.1%} is lost, with {facts['level']:.0%} "
            f"confidence {one['low']:.1%} to {one['high']:.1%} ({one['missed']} of {one['members']} in the sample are missed)"
        )
        if not one["enough"]:
            lines.append(
                f"warning: {arm}: the sample has {one['members']} of the model's top rows, too few to leave anything out at "
                f"scoring.proxy.miss={facts['miss']:g}, for which it takes {fewest_members(facts['miss'])}: raise scoring.proxy.sample"
            )
    return lines
