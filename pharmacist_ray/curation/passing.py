"""Which rows a cascade shows to the large model: those drawn at random, and those that stand high enough with the proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pharmacist_ray.curation.scored import Ranking, Shard, read_scored
from pharmacist_ray.curation.topk import Keys
from pharmacist_ray.data.schema import uniform
from pharmacist_ray.storage import StoragePath

BEST, WORST = b"\x00" * 40, b"\xff" * 40
"""Keys before and behind all others."""

Mask = NDArray[np.bool_]

_SEED = 3_266_489_917


@dataclass(frozen=True)
class Sample:
    """Which rows are drawn: each by itself, by a hash of its id."""

    seed: int
    rate: float
    """Chance of a row to be drawn."""

    def has(self, ids: pa.Array) -> Mask:
        """Return which ids are drawn, (n,)."""
        return np.array([uniform(id, _SEED + self.seed) < self.rate for id in ids.to_pylist()], np.bool_)


@dataclass(frozen=True)
class Passing:
    """The proxy's rankings of all candidates, one for each arm, and the last key of each that is passed on."""

    scores: StoragePath
    rankings: Mapping[str, Ranking]
    cuts: Mapping[str, bytes]

    def keys(self, shard: StoragePath, ids: pa.Array) -> list[Keys]:
        """Return the keys of some of a shard's rows in each arm's ranking; of those without a score the best."""
        mine = Shard(shard, self.scores / shard.name)
        return [keys_in(mine, ranking, ids, BEST) for ranking in self.rankings.values()]

    def inside(self, keys: Sequence[Keys]) -> Mask:
        """Return which rows are passed on by any arm, (n,).

        Args:
            keys: Each arm's keys of the rows.
        """
        found = [mine <= cut for mine, cut in zip(keys, self.cuts.values(), strict=True)]
        return np.asarray(np.any(found, axis=0))


def keys_in(shard: Shard, ranking: Ranking, ids: pa.Array, missing: bytes) -> Keys:
    """Return the keys of some of a shard's rows, (n,).

    Args:
        shard: The shard.
        ranking: What rows are ranked by.
        ids: The rows.
        missing: The key of those without a score.
    """
    scored = read_scored(shard, ranking)[1]
    place = pc.index_in(ids, value_set=scored.ids)
    known = np.asarray(pc.is_valid(place))
    keys = np.full(len(ids), missing, dtype="S40")
    keys[known] = scored.keys[np.asarray(place.drop_null())]
    return keys
