"""Intervals that know which answers belong together: a crossed and clustered bootstrap, and Student's t where units are few.

Answers are not independent. All runs answer the same prompts, so prompts and runs are crossed: a prompt is drawn once for all runs.
Prompts about the same thing are a cluster, which is drawn whole. A run has a seed and, for random selections, a draw: the draws of
three selections with three seeds each are two crossed factors with three levels, not nine independent runs. Where there are several
worlds, each with a base model of its own, a world is the unit that is independent of the others, and is drawn with all that is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from pharmacist_ray.errors import ConfigError, DataError

Values = NDArray[np.float64]
Statistic = Callable[..., Values]
"""Takes one array of means for each sample, (B,) each, and returns a number for each place, (B,)."""

FEW = 30
"""With fewer units of some kind the interval is Student's t; percentiles of a bootstrap over few units are too narrow (ours)."""
CLUSTERS = 1000
"""More clusters than these are put together in as many: their spread tells the same, and memory is bounded."""
_CELL_DRAWS = 200
"""Draws that the answers' own spread is taken from; it corrects another variance and need not be sharp."""


@dataclass(frozen=True)
class Sample:
    """The values of one quantity in one arm, with the units that each belongs to; sequences of one length n."""

    values: Sequence[float]
    """NaN is unscored."""
    worlds: Sequence[str]
    draws: Sequence[str]
    """Which random selection the run was aligned on; the empty string where the selection is not random."""
    seeds: Sequence[int]
    clusters: Sequence[str]
    """The prompt, or what it shares with others."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds, and how many units of the kind that is independent it rests on."""

    estimate: float
    low: float
    high: float
    units: int
    """Worlds, if there are several, else clusters."""


@dataclass(frozen=True)
class _World:
    """An arm in one world: sums of values and numbers of them by run and cluster, (R, C), and each run's levels, (R,)."""

    sums: Values
    counts: Values
    draws: NDArray[np.int64]
    seeds: NDArray[np.int64]
    """Places among all levels, −1 for no draw."""
    runs: NDArray[np.int64]

    def means(
        self, draw: Values | None = None, seed: Values | None = None, cluster: Values | None = None, cell: Values | None = None
    ) -> Values:
        """Return the mean over runs of each run's mean, (B,), under how often each level was drawn, (B, levels); None: once."""
        if cell is not None:
            weights = cell[:, self.runs]
            tops, bottoms = (weights * self.sums).sum(axis=2), (weights * self.counts).sum(axis=2)
        elif cluster is not None:
            tops, bottoms = cluster @ self.sums.T, cluster @ self.counts.T
        else:
            tops, bottoms = self.sums.sum(axis=1)[None], self.counts.sum(axis=1)[None]
        times = (bottoms > 0).astype(float)
        if draw is not None:
            times = times * np.where(self.draws < 0, 1.0, draw[:, self.draws])
        if seed is not None:
            times = times * seed[:, self.seeds]
        with np.errstate(invalid="ignore"):  # what was not drawn at all has no mean
            return np.asarray((times * tops / np.maximum(bottoms, 1)).sum(axis=1) / times.sum(axis=1))


def estimate(
    statistic: Statistic,
    samples: Sequence[Sample],
    *,
    seed: int,
    draws: int = 2000,
    level: float = 0.95,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Return a function of the samples' means with an interval; the same units are drawn for all samples.

    In a sample every run weighs the same, and over several worlds every world does. With fewer than `FEW` units of some kind the
    interval is the estimate ± t times the standard error: the variances that the draws of worlds, or of random selections, of seeds
    and of clusters give, each times n / (n − 1), are added up; the answers' own, which is in each of them, is counted once; and the
    degrees of freedom are Satterthwaite's (n − 1 if one kind rules). With more units it has the percentiles of joint draws. One run
    says nothing about training noise, and an interval over one run is blind to it.

    Args:
        statistic: Takes the means of each sample as arrays of one length.
        samples: One for each argument, none without a value.
        seed: Seed of the draws; the same seed gives the same interval.
        draws: Number of draws.
        level: Coverage.
        limits: Values that the quantity cannot leave.

    Raises:
        DataError: A sample has no value.
        ConfigError: ``draws`` or ``level`` is out of range.
    """
    if draws < 1:
        raise ConfigError(f"evaluation.bootstrap_draws must be at least 1, got {draws}")
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval must lie between 0 and 1, got {level}")
    if not samples or not all(np.isfinite(np.asarray(sample.values)).any() for sample in samples):
        raise DataError("an interval needs at least one value in every sample")
    worlds = sorted({world for sample in samples for world in sample.worlds})
    if len(worlds) > 1:
        means = [_over_worlds(sample, worlds) for sample in samples]
        found = float(statistic(*(np.array([np.nanmean(one)]) for one in means))[0])
        sizes = {"world": len(worlds)}

        def drawn(**levels: Values) -> Values:
            return statistic(*(_weighted(one, levels["world"]) for one in means))
    else:
        order, tables = _tables(samples)
        found = float(statistic(*(table.means() for table in tables))[0])
        sizes = {name: count for name, count in order.items() if count > 1 and name != "run"}

        def drawn(**levels: Values) -> Values:
            return statistic(*(table.means(**levels) for table in tables))

    units = sizes.get("world", sizes.get("cluster", 1))
    chosen = {name: _times(size, draws, seed, name) for name, size in sizes.items()}
    if sizes and min(sizes.values()) >= FEW:
        low, high = np.nanquantile(drawn(**chosen), [(1 - level) / 2, (1 + level) / 2])
        return Interval(found, max(float(low), limits[0]), min(float(high), limits[1]), units)
    parts = {name: float(np.nanvar(drawn(**{name: times}))) * sizes[name] / (sizes[name] - 1) for name, times in chosen.items()}
    variance = sum(parts.values())
    if len(parts) > 1 and "cluster" in parts:
        cells = _cell_times(order["run"], order["cluster"], min(draws, _CELL_DRAWS), seed)
        variance = max(*parts.values(), variance - (len(parts) - 1) * float(np.nanvar(drawn(cell=cells))))
    if not parts:
        return Interval(found, *limits, units)  # one unit of every kind: nothing is known of their spread
    freedom = sum(parts.values()) ** 2 / sum(v**2 / (sizes[name] - 1) for name, v in parts.items()) if variance else 1.0
    slack = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(variance)
    return Interval(found, max(found - slack, limits[0]), min(found + slack, limits[1]), units)


def _tables(samples: Sequence[Sample]) -> tuple[dict[str, int], list[_World]]:
    """Return the number of levels of each factor, and the samples with their levels as places among these."""
    draws = {key: n for n, key in enumerate(sorted({key for sample in samples for key in sample.draws if key}))}
    seeds = {key: n for n, key in enumerate(sorted({key for sample in samples for key in sample.seeds}))}
    clusters = sorted({key for sample in samples for key in sample.clusters})
    place = {key: n % CLUSTERS for n, key in enumerate(clusters)}
    runs = {key: n for n, key in enumerate(sorted({pair for one in samples for pair in zip(one.draws, one.seeds, strict=True)}))}
    sizes = {"draw": len(draws), "seed": len(seeds), "cluster": min(len(clusters), CLUSTERS), "run": len(runs)}

    def table(sample: Sample) -> _World:
        mine = sorted(set(zip(sample.draws, sample.seeds, strict=True)))
        rows = {key: n for n, key in enumerate(mine)}
        row = np.array([rows[key] for key in zip(sample.draws, sample.seeds, strict=True)])
        column = np.array([place[key] for key in sample.clusters])
        values = np.asarray(sample.values, dtype=float)
        known = ~np.isnan(values)
        sums, counts = np.zeros((2, len(mine), sizes["cluster"]))
        np.add.at(sums, (row[known], column[known]), values[known])
        np.add.at(counts, (row[known], column[known]), 1.0)
        places = [[draws.get(draw, -1), seeds[seed], runs[draw, seed]] for draw, seed in mine]
        return _World(sums, counts, *np.array(places, dtype=np.int64).T)

    return sizes, list(map(table, samples))


def _over_worlds(sample: Sample, worlds: Sequence[str]) -> Values:
    """Return the mean over runs of each run's mean for every world, (W,); NaN where there is none."""
    values = np.asarray(sample.values, dtype=float)
    runs: dict[str, dict[tuple[str, int], list[float]]] = {world: {} for world in worlds}
    for value, world, draw, seed in zip(values, sample.worlds, sample.draws, sample.seeds, strict=True):
        if not math.isnan(value):
            runs[world].setdefault((draw, seed), []).append(value)
    return np.array([np.mean([*map(np.mean, found.values())]) if found else math.nan for found in runs.values()])


def _weighted(means: Values, times: Values) -> Values:
    known = ~np.isnan(means)
    with np.errstate(invalid="ignore"):
        return np.asarray(times[:, known] @ means[known] / times[:, known].sum(axis=1))


@lru_cache(maxsize=8)
def _times(levels: int, draws: int, seed: int, name: str) -> Values:
    """Return how often each of the levels was drawn, (draws, levels)."""
    generator = np.random.default_rng([seed, *name.encode()])
    return generator.multinomial(levels, np.full(levels, 1 / levels), size=draws).astype(np.float64)


@lru_cache(maxsize=4)
def _cell_times(runs: int, clusters: int, draws: int, seed: int) -> Values:
    """Return how often each cluster was drawn where every run draws for itself, (draws, runs, clusters)."""
    generator = np.random.default_rng([seed, *b"cell"])
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=(draws, runs)).astype(np.float64)
