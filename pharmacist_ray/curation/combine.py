"""Several scores as one: the weighted sum of a row's ranks by each, or its best rank.

Scores have no common scale, ranks do. A rank is the share of scored rows below a value, those with the same value counted half, so
it lies between 0 and 1 and no unit or outlier of a score matters. Of more than `SAMPLE` rows, the ranks are taken among the `SAMPLE`
whose ids come first in a fixed order that has nothing to do with the scores: a rank is then off by less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pharmacist_ray.runtime.tasks import in_tasks

SAMPLE = 1 << 20
"""Rows among which ranks are taken: 8 MB a score (ours)."""

Read = Callable[[Any], pa.Table]
"""Reads the id and the score columns of a part, such as a shard's file."""


def as_it_is(table: pa.Table) -> pa.Table:
    """Read a part that is a table already."""
    return table


@dataclass(frozen=True)
class Ranks:
    """Score columns, and the sorted values among which a row's ranks are found."""

    values: Mapping[str, NDArray[np.float64]]

    @property
    def columns(self) -> list[str]:
        """The score columns that are read."""
        return list(self.values)

    def ranks(self, table: pa.Table) -> NDArray[np.float64]:
        """Return each row's rank by each score, (n, scores); NaN where a row lacks that score.

        Args:
            table: The score columns.
        """
        return np.stack([rank_among(known, _floats(table, name)) for name, known in self.values.items()], axis=1)


@dataclass(frozen=True)
class RankSum(Ranks):
    """Ranks, and the weights by which they are added up."""

    weights: Mapping[str, float]

    def of(self, table: pa.Table) -> NDArray[np.float64]:
        """Return Σ_k w_k · rank_k / Σ_k w_k of each row, (n,); NaN where a row lacks one of the scores.

        Args:
            table: The score columns.
        """
        total = np.zeros(len(table))
        for weight, ranks in zip(self.weights.values(), self.ranks(table).T, strict=True):
            total += weight * ranks
        return total / sum(self.weights.values())


@dataclass(frozen=True)
class BestRank(Ranks):
    """Ranks of which a row's best counts.

    Keeping the top by it lets the scores take turns: each gives its best row, then its second, and so on; a row that several give is
    kept once.
    """

    def of(self, table: pa.Table) -> NDArray[np.float64]:
        """Return max_k rank_k of each row, (n,); NaN where a row lacks one of the scores.

        Args:
            table: The score columns.
        """
        return np.asarray(self.ranks(table).max(axis=1))


def best_rank(parts: Sequence[Any], columns: Sequence[str], read: Read = as_it_is) -> BestRank:
    """Return the best of ranks among all rows that have every score.

    Args:
        parts: Shard after shard; each is read once.
        columns: The score columns.
        read: Reads a part.
    """
    return BestRank({name: np.sort(values) for name, values in sample_scores(parts, columns, read).items()})


def rank_sum(parts: Sequence[Any], weights: Mapping[str, float], read: Read = as_it_is) -> RankSum:
    """Return the sum of ranks among all rows that have every score.

    Args:
        parts: Shard after shard; each is read once.
        weights: Score column → weight above 0.
        read: Reads a part.
    """
    sample = sample_scores(parts, list(weights), read)
    return RankSum({name: np.sort(values) for name, values in sample.items()}, dict(weights))


def sample_scores(parts: Sequence[Any], names: Sequence[str], read: Read = as_it_is) -> dict[str, NDArray[np.float64]]:
    """Return the scores of at most `SAMPLE` rows that have all of them, chosen by id: score → (n,), the same rows in each.

    Args:
        parts: Shard after shard; each is read once.
        names: The score columns.
        read: Reads a part.
    """
    order, kept = np.empty(0), np.empty((len(names), 0))
    last = 1.0  # who comes after it has no place in the sample any more, so of many parts little is sent here

    def asked() -> Iterator[tuple[Any, float]]:
        for part in parts:
            yield part, last

    for found, values in in_tasks(partial(_among_first, names=tuple(names), read=read), asked(), count=len(parts)):
        order, kept = np.concatenate([order, found]), np.concatenate([kept, values], axis=1)
        if len(order) > SAMPLE:
            first = np.argpartition(order, SAMPLE)[:SAMPLE]
            order, kept = order[first], kept[:, first]
            last = float(order.max())
    return dict(zip(names, kept, strict=True))


def _among_first(
    asked: tuple[Any, float], *, names: tuple[str, ...], read: Read
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return place in the order and scores, (n,) and (scores, n), of a part's rows that have all scores and come early enough."""
    part, last = asked
    table = read(part)
    values = np.stack([_floats(table, name) for name in names])
    known = ~np.isnan(values.sum(axis=0))
    digits = "".join(
        id[16:] for id in table.column("id").filter(pa.array(known)).to_pylist()
    )  # the half that says nothing of the shard
    order = np.frombuffer(bytes.fromhex(digits), ">u8") / 2.0**64
    early = order <= last
    return order[early], values[:, known][:, early]


def rank_among(known: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of known values below each value, those equal counted half, (n,); NaN stays NaN.

    Args:
        known: Sorted values without NaN.
        values: The values to rank, (n,).
    """
    order = np.argsort(values)  # in their order, values are looked up next to each other, and what is read stays in the cache
    ordered = values[order]
    below = np.searchsorted(known, ordered)
    upto = below.copy()
    there = np.flatnonzero(known[np.minimum(below, len(known) - 1)] == ordered) if len(known) else below[:0]
    upto[there] = np.searchsorted(known, ordered[there], "right")
    found = np.empty(len(values))
    found[order] = (below + upto) / (2 * max(1, len(known)))
    return np.where(np.isnan(values), np.nan, found)


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table.column(name).cast(pa.float64()).to_numpy())
