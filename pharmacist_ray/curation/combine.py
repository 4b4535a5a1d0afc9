"""Several scores as one: the weighted sum of a row's ranks by each.

Scores have no common scale, ranks do. A rank is the share of scored rows below a value, those with the same value counted half, so
it lies between 0 and 1 and no unit or outlier of a score matters. Of more than `SAMPLE` rows, the ranks are taken among the `SAMPLE`
whose ids come first in a fixed order that has nothing to do with the scores: a rank is then off by less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pharmacist_ray.data.schema import uniform

SAMPLE = 1 << 20
"""Rows among which ranks are taken: 8 MB a score (ours)."""

_SEED = 2_654_435_761


@dataclass(frozen=True)
class RankSum:
    """Score columns with their weights, and the sorted values among which a row's ranks are found."""

    weights: Mapping[str, float]
    values: Mapping[str, NDArray[np.float64]]

    def of(self, table: pa.Table) -> NDArray[np.float64]:
        """Return Σ_k w_k · rank_k / Σ_k w_k of each row, (n,); NaN where a row lacks one of the scores.

        Args:
            table: The columns of `weights`.
        """
        total = np.zeros(len(table))
        for name, weight in self.weights.items():
            known = self.values[name]
            given = _floats(table, name)
            below, up_to = (np.searchsorted(known, given, side) for side in ("left", "right"))
            total += weight * np.where(np.isnan(given), np.nan, (below + up_to) / (2 * max(1, len(known))))
        return total / sum(self.weights.values())


def rank_sum(tables: Iterable[pa.Table], weights: Mapping[str, float]) -> RankSum:
    """Return the sum of ranks among all rows that have every score.

    Args:
        tables: Shard after shard, the id and the columns of ``weights``; read once.
        weights: Score column → weight above 0.
    """
    order = np.empty(0)
    kept = {name: np.empty(0) for name in weights}
    for table in tables:
        columns = {name: _floats(table, name) for name in weights}
        known = ~np.isnan(np.sum(list(columns.values()), axis=0))
        order = np.concatenate([order, [uniform(id, _SEED) for id in table.column("id").filter(pa.array(known)).to_pylist()]])
        kept = {name: np.concatenate([values, columns[name][known]]) for name, values in kept.items()}
        if len(order) > SAMPLE:
            first = np.argpartition(order, SAMPLE)[:SAMPLE]
            order, kept = order[first], {name: values[first] for name, values in kept.items()}
    return RankSum(dict(weights), {name: np.sort(values) for name, values in kept.items()})


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table.column(name).cast(pa.float64()).to_numpy())
